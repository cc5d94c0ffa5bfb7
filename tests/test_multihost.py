"""Two processes of four devices train as one process of eight, and end together when one of them dies."""

import json
import pathlib
import signal
import socket
import time

import numpy as np
import pytest

from jaxrl.runtime.manifest import list_checkpoints
from jaxrl.runtime.metrics import read_metrics
from jaxrl.runtime.model_source import load_model
from tests.test_train import assert_metrics_close, cli_train, on_fake_devices, smooth


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_two_hosts_train_as_one(tmp_path, dial_model, fsdp):
    def start(folder, devices, **env):
        changes = {"steps": 3, "mesh.fsdp": fsdp, "batch.updates": 2, "algorithm.kl_coef": 0.01}
        changes |= {"batch.generation_prompts": 5, "batch.keep_surplus": True, "run_dir": tmp_path / folder}
        changes["sampling.carry_over"] = 5
        flags = smooth(dial_model, **changes, distributed=bool(env))
        return cli_train(*flags, env={**on_fake_devices(devices), **env})

    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    hosts = [start("two", 4, **address, JAX_PROCESS_ID=str(i)) for i in range(2)]
    try:
        printed = [child.communicate(timeout=900) for child in hosts]
    finally:
        for child in hosts:
            child.kill()
    for child, (_, error) in zip(hosts, printed, strict=True):
        assert child.returncode == 0, error[-3000:]
    assert "8 cpu device(s)" in printed[0][0] and "step" not in printed[1][0]  # only process 0 speaks
    one = start("one", 8)
    out, error = one.communicate(timeout=900)
    assert one.returncode == 0, error[-3000:]
    assert "8 cpu device(s)" in out
    assert_metrics_close(tmp_path / "two", tmp_path / "one")
    records = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2, 3] and any(r.get("grad_norm", 0) > 0 for r in records)
    assert any(r.get("selection/surplus") for r in records) and any(r.get("selection/pending") for r in records)
    states = [json.loads((last(tmp_path / name) / "host.json").read_text())["collector"] for name in ("one", "two")]
    assert states[0]["position"] == states[1]["position"]
    waiting = [np.load(last(tmp_path / name) / "host.npz")["pending/tokens"] for name in ("one", "two")]
    assert waiting[0].tolist() == waiting[1].tolist()
    load_model(tmp_path / "two")  # one process reads what two have saved


FLAGS = {"steps": 5, "checkpoint.every": 1, "watchdog.heartbeat": 10}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, dial_model):
    """The run of one process that the ones below are compared with."""
    run = tmp_path_factory.mktemp("undisturbed")
    child = cli_train(*smooth(dial_model, **FLAGS, run_dir=run), env=on_fake_devices(8))
    assert child.communicate(timeout=900) and child.returncode == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_ends_the_other_and_one_host_goes_on(tmp_path, dial_model, undisturbed, victim):
    flags = smooth(dial_model, **FLAGS, run_dir=tmp_path / "run")
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    hosts = [cli_train(*flags, "--config.distributed", env={**on_fake_devices(4), **address, "JAX_PROCESS_ID": str(i)})
             for i in range(2)]  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        while all(h.poll() is None for h in hosts) and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 2):
            time.sleep(0.01)
        hosts[victim].send_signal(signal.SIGKILL)
        printed = [h.communicate(timeout=90) for h in hosts]  # raises TimeoutExpired if the other one hangs
    finally:
        for h in hosts:
            h.kill()
    codes = [h.returncode for h in hosts]
    assert codes[victim] == -signal.SIGKILL, printed[victim][1][-3000:]
    assert codes[1 - victim] == -signal.SIGABRT, printed[1 - victim][1][-3000:]
    # What is left of the machines takes over: same command, one process.
    one = cli_train(*flags, env=on_fake_devices(8))
    out, error = one.communicate(timeout=900)
    assert one.returncode == 0, error[-3000:]
    assert "continuing" in out
    assert [r["step"] for r in read_metrics(metrics)] == list(range(6))
    assert_metrics_close(tmp_path / "run", undisturbed)


def last(run) -> pathlib.Path:
    return list_checkpoints(run / "checkpoints")[-1].path
