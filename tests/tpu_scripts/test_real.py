"""resume.sh with the real training command on two workers that share nothing but a bucket, through a preemption."""

import json
import os
import pathlib
import socket
import tempfile

import pytest

from tests.chaos import assert_same_run
from tests.stores import Store
from tests.tpu_scripts.test_scripts import WHERE, Cloud

TINY = ["--config=tests/tiny.py", "--config.steps=8", "--config.checkpoint.every=2", "--config.sft.steps=20",
        "--config.sft.full_steps=20", "--config.sft.warmup_steps=5",
        "--config.watchdog.heartbeat=10", "--config.log.tensorboard=True"]


def free_ports() -> int:
    """The first of a few ports that are likely free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return min(s.getsockname()[1], 65000)


def resume(store, root: pathlib.Path, run: str, **env) -> tuple[Cloud, int, str]:
    cloud = Cloud(root)
    cloud.states("MISSING")
    cache = {k: v for k, v in os.environ.items() if k.startswith("JAX_")} | {"JAX_PLATFORMS": "cpu"}
    done = cloud.call("resume", *WHERE, "--poll-seconds=1", f"--run-dir={store.url}/{run}", *TINY, timeout=900,
                      env={**cache, **store.env, "REAL_TRAINING": str(free_ports()), **env})
    logs = [p.read_text()[-3000:] for p in root.glob("home*/jaxrl_job/train.log")]
    return cloud, done.returncode, "\n".join([done.stdout[-2000:], done.stderr[-3000:], *logs])


@pytest.mark.slow
def test_resume_of_real_training_through_a_preemption_in_mid_save(tmp_path):
    pytest.importorskip("gcp_storage_emulator")
    with Store("gs") as store:
        for name in ("undisturbed", "preempted"):
            (tmp_path / name).mkdir()
        _, code, printed = resume(store, tmp_path / "undisturbed", "undisturbed")
        assert code == 0, printed
        before = {n.split("/")[2] for n in store.names("undisturbed/checkpoints/")}
        # The first save has 8 requests that change something, the lease 2; the third save is under way at the 25th.
        cloud, code, printed = resume(store, tmp_path / "preempted", "preempted", PREEMPT="25")
        assert code == 0, printed
        assert len(cloud.calls("create")) == 2 and store.counts()["faults"] == 1
        starts = [json.loads(line)["argv"] for line in (tmp_path / "preempted/train.jsonl").read_text().splitlines()]
        assert len(starts) == 4 and all(s == starts[0] for s in starts)
        assert {n.split("/")[2] for n in store.names("preempted/checkpoints/")} == before
        folders = {name: pathlib.Path(tempfile.mkdtemp(dir=tmp_path)) for name in ("undisturbed", "preempted")}
        for name, folder in folders.items():
            store.download(name, folder)
    assert_same_run(folders["preempted"], folders["undisturbed"])
