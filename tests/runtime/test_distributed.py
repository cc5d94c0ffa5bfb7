"""Two processes on this machine, four devices each: they gather, save, restore, stop and die together."""

import os
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import build
from jaxrl.errors import UserError
from jaxrl.runtime import cluster, distributed, manifest
from jaxrl.runtime.checkpoint import restore
from jaxrl.runtime.config import base_config

PRELUDE = """
import os, sys
import numpy as np
from jaxrl.runtime import distributed
distributed.initialize(heartbeat_seconds=10)
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxrl.runtime.checkpoint import Checkpointer, restore
from jaxrl.runtime.signals import StopRequest
me, directory = jax.process_index(), sys.argv[1]
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)

def tree(mesh, spec):
    w = np.arange(128, dtype=np.float32).reshape(16, 8)
    put = lambda x, s: jax.make_array_from_callback(x.shape, NamedSharding(mesh, s), lambda i: x[i])
    return {"w": put(w, spec), "b": put(w.astype(jnp.bfloat16), P()), "n": np.arange(3)}

def show(text):
    print(text, flush=True)
"""


def two(code, *args, torchrun=False):
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        pytest.skip("this machine does not know its own name, by which gloo's processes find each other")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    if torchrun:
        names = {**TORCHRUN, "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
        ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    else:
        names = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
        ranks = [{"JAX_PROCESS_ID": str(i)} for i in range(2)]
    return [subprocess.Popen([sys.executable, "-c", PRELUDE + code, *map(str, args)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env={**env, **names, **rank}) for rank in ranks]


def wait_until_ready(child):
    """Reads on to the line "ready" (Gloo greets on stdout, too)."""
    assert "ready\n" in iter(child.stdout.readline, ""), child.stderr.read()


def finish(children, timeout=120):
    try:
        return [c.communicate(timeout=timeout) for c in children]
    finally:
        for c in children:
            c.kill()


def test_one_process_needs_no_partner(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    distributed.initialize()
    assert distributed.is_main()
    assert distributed.allgather({"a": (1, 2)}) == [{"a": [1, 2]}]  # the same types as with several
    assert distributed.broadcast("x") == "x"
    distributed.barrier("alone")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="needs all of JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES"):
        distributed.initialize()


def test_arrays_go_through_bytes_and_back():
    arrays = {"f": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False, True]),
              "none": np.zeros(0), "w": np.array(["a", "bcd"]), "n": np.array(7), "t": np.arange(6).reshape(2, 3).T}
    for data in (distributed.bytes_of(arrays), memoryview(distributed.bytes_of(arrays))):
        back = distributed.arrays_of(data)
        assert list(back) == list(arrays)
        for name, want in arrays.items():
            assert (back[name].dtype, back[name].shape) == (want.dtype, want.shape), name
            assert (back[name] == want).all()
    assert distributed.arrays_of(distributed.bytes_of({})) == {}


def test_the_heartbeat_of_the_config_reaches_jax(monkeypatch):
    """The tests below wait longer than it takes: with jax's own 100 s the other process ends after about 70."""
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: seen.append((args, options)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for key, value in (("COORDINATOR_ADDRESS", "127.0.0.1:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        monkeypatch.setenv(f"JAX_{key}", value)
    config = base_config()
    config.distributed, config.compilation_cache, config.watchdog.heartbeat = True, False, 7
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # what the user says stays
    build.start_backend(config)
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    [(args, options)] = seen
    assert args == ("127.0.0.1:1", 2, 0)
    assert options == {"heartbeat_timeout_seconds": 7, "shutdown_timeout_seconds": 21,
                       "cluster_detection_method": "deactivate"}


def test_what_slurm_says_reaches_jax_and_all_gpus_of_the_task_are_used(monkeypatch):
    """jax's own choice for a task of Slurm is one GPU of the machine's."""
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: seen.append((args, options)))
    monkeypatch.setattr(cluster, "machine", lambda env: cluster.Machine(gpus=8))
    for name, value in (("NUM_TASKS", "2"), ("TASKS_PER_NODE", "1(x2)")):
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    distributed.initialize(hosts=2)
    assert seen[0][0] == (None, 2, None) and seen[0][1]["local_device_ids"] == list(range(8))
    assert "cluster_detection_method" not in seen[0][1]
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS=2, but this process found itself as one of 1"):
        distributed.initialize()
    with pytest.raises(UserError, match="config.hosts=3, but there are 2 processes .SLURM_STEP_NUM_TASKS=2"):
        distributed.initialize(hosts=3)


def test_a_run_that_was_started_several_times_by_mistake_is_refused(monkeypatch):
    config = base_config()
    config.compilation_cache = False
    build.start_backend(config)
    config.hosts = 2
    with pytest.raises(UserError, match="config.hosts=2, but there is 1 process .config.distributed=False"):
        build.start_backend(config)
    config.distributed = True
    with pytest.raises(UserError, match="config.hosts=2, but there is 1 process .nothing in the environment"):
        build.start_backend(config)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    config.hosts, config.distributed = 0, False
    with pytest.raises(UserError, match="WORLD_SIZE=2, but config.distributed is False"):
        build.start_backend(config)
    config.hosts = 1  # two runs side by side, on purpose
    build.start_backend(config)


TORCHRUN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "0"}


def test_two_processes_under_the_names_of_torchrun():
    code = "show(distributed.allgather(me)); distributed.barrier('end')"
    for child, (out, err) in zip(children := two(code, "-", torchrun=True), finish(children), strict=True):
        assert child.returncode == 0 and out.endswith("[0, 1]\n"), err[-3000:]


GATHER_AND_SAVE = """
texts = ["", "x" * 5000][me]
assert distributed.allgather(texts) == ["", "x" * 5000]
assert distributed.allgather_bytes(bytes([me]) * (me + 1)) == [b"\\0", b"\\1\\1"]
assert distributed.broadcast({"from": me}) == {"from": 0}
assert distributed.is_main() == (me == 0)
from jaxrl.tasks.grader import Grader  # its processes are started by one that is part of a cluster
with Grader(workers=1, timeout=120) as grader:
    assert grader.grade([(r"\\boxed{x+1}", "1+x"), (r"\\boxed{x+1}", "2+x")]) == ["correct", "wrong"]
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
a = tree(mesh, P("x", "y"))
with Checkpointer(directory, keep_last=1) as saver:
    assert saver.restore(a) is None
    for step in (1, 2):
        saver.save(step, a, {"step": step})
    assert saver.wait() == 2
    distributed.barrier("saved")
    other = Mesh(np.array(jax.devices()).reshape(8), ("x",))
    found = saver.restore(tree(other, P(None, "x")))
    assert found.step == 2 and found.host == {"step": 2}
    assert found.arrays["w"].sharding.spec == P(None, "x")
    for shard in found.arrays["w"].addressable_shards:
        assert np.array_equal(shard.data, np.arange(128).reshape(16, 8)[shard.index])
    # A fault of process 1's storage: both warn, neither hangs, and the checkpoint before stays.
    from jaxrl.runtime import storage
    real = storage.write_chunks
    def full(*_, **__): raise OSError(28, "No space left on device")
    if me == 1:
        storage.write_chunks = full
    saver.save(3, a, {"step": 3})
    assert saver.wait() == 2
    storage.write_chunks = real
    # Damage that only one of them reads is known to both.
    saver.save(4, a, {"step": 4})
    saver.wait()
    distributed.barrier("saved 4")
    if me == 0:
        with open(f"{directory}/00000004/host.json", "a") as f: f.write(" ")
    distributed.barrier("damaged")
    try:
        saver.restore(a)
    except ValueError as e:
        assert "no usable checkpoint" in str(e)
    else:
        raise AssertionError("damage was not seen")
    with open(f"{directory}/00000004/host.json", "w") as f: f.write('{"step": 4}')
show("done")
"""


@pytest.mark.slow
def test_gather_save_and_restore_together(tmp_path):
    for child, (out, err) in zip(children := two(GATHER_AND_SAVE, tmp_path), finish(children), strict=True):
        assert child.returncode == 0 and out.endswith("done\n"), err[-3000:]
        assert "NOT saved" in err
    # What two processes saved, one can read, on its one device.
    [found] = manifest.list_checkpoints(tmp_path)
    meta = manifest.read_manifest(found.path)
    assert found.step == 4 and manifest.find_damage(found.path, meta) is None
    assert set(meta["files"]) == {"host.json", "arrays-00000-000.safetensors", "arrays-00001-000.safetensors"}
    w = np.arange(128, dtype=np.float32).reshape(16, 8)
    template = {"w": jnp.zeros((16, 8)), "b": jnp.zeros((16, 8), jnp.bfloat16), "n": np.zeros(3, int)}
    back = restore(tmp_path, template).arrays
    assert np.array_equal(back["w"], w) and np.array_equal(back["b"], w.astype(jnp.bfloat16))


OWN_ROWS = """
from jaxrl.learner.nonfinite import whole_batch
from jaxrl.learner.packing import PackSettings, fill, pack, plan, sizes
from jaxrl.learner.update import own_rows, place_batch
from jaxrl.rollouts import from_sequences
from jaxrl.runtime.mesh import make_mesh, num_batch_shards, own_shards
rng = np.random.default_rng(0)
r = from_sequences(*([rng.integers(1, 99, n) for n in rng.integers(1, 20, 60)] for _ in range(2)))
for sizes_of_mesh in ((2, 2, 2), (1, 8, 1), (1, 2, 4), (1, 1, 8)):  # in the last, both hold the same rows
    mesh = make_mesh(*sizes_of_mesh)
    how, own = PackSettings(48, 400, num_batch_shards(mesh)), own_shards(mesh)
    assert len(own) == max(1, num_batch_shards(mesh) // 2)
    whole, _ = pack(r, np.arange(60.0), how)
    packing = plan(sizes(r), how, own)
    mine = fill(packing, r.take(packing.responses), packing.responses, how)
    placed = place_batch(mine, mesh)
    assert placed.tokens.shape == whole.tokens.shape
    for name, value in vars(whole).items():
        if np.ndim(value) == 3:
            for shard in getattr(placed, name).addressable_shards:
                assert np.array_equal(shard.data, value[shard.index]), name
    assert np.array_equal(own_rows(placed.advantages), mine.advantages)
    assert np.array_equal(whole_batch(mine, mesh).tokens, whole.tokens)
[a, b] = distributed.allgather_arrays({"x": np.arange(me + 2), "y": np.zeros((0, 3))})
assert a["x"].tolist() == [0, 1] and b["x"].tolist() == [0, 1, 2] and a["y"].shape == (0, 3)
distributed.barrier("end")
show("done")
"""


@pytest.mark.slow
def test_each_process_packs_and_places_the_rows_of_its_own_devices():
    for child, (out, err) in zip(children := two(OWN_ROWS, "-"), finish(children, 400), strict=True):
        assert child.returncode == 0 and out.endswith("done\n"), err[-3000:]


STOP = """
with StopRequest() as stop:
    show("ready")
    step = 0
    while not stop.agreed(step):
        step += 1
    show(f"{step} {stop.requested}")
sys.exit(stop.exit_code)
"""


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step(tmp_path):
    children = two(STOP, tmp_path)
    try:
        for c in children:
            wait_until_ready(c)
        children[1].send_signal(signal.SIGTERM)
    finally:
        (out0, err0), (out1, err1) = finish(children)
    assert [c.returncode for c in children] == [75, 75], err0[-2000:] + err1[-2000:]
    last0, last1 = out0.splitlines()[-1], out1.splitlines()[-1]
    assert last0 == last1 and last0.endswith(" SIGTERM")


DIE = """
sharding = NamedSharding(Mesh(np.array(jax.devices()), "x"), P("x"))
x = jax.make_array_from_callback((8,), sharding, lambda i: np.ones(1))
total = jax.jit(jnp.sum)
show("ready")
while True:
    total(x).block_until_ready()
"""


FAIL = """
import time
show("ready")
if me == int(sys.argv[1]):
    raise ValueError("a mistake of one process")
time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_fails_takes_the_other_along(victim):
    children = two(FAIL, victim)
    finish(children, 90)  # raises TimeoutExpired if the other one waits for ever
    assert children[victim].returncode not in (0, None) and children[1 - victim].returncode == -signal.SIGABRT


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other(tmp_path, victim):
    children = two(DIE, tmp_path)
    try:
        for c in children:
            wait_until_ready(c)
        children[victim].send_signal(signal.SIGKILL)
    finally:
        finish(children)  # raises TimeoutExpired if the other one hangs
    assert children[1 - victim].returncode not in (0, -signal.SIGKILL)
