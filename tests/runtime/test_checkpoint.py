"""Checkpoints: bitwise round trips, damage, full disks, and what a later `restore` does about them."""

import json
import os
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from jaxrl.errors import UserError
from jaxrl.runtime import arrays, manifest, storage
from jaxrl.runtime.checkpoint import Checkpointer, restore
from tests.stores import Store


def raw(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert isinstance(x, np.ndarray) == isinstance(y, np.ndarray), name
        assert raw(x).tobytes() == raw(y).tobytes(), name


def state(seed=0):
    r = np.random.default_rng(seed)
    params = {"layers": {"q": jnp.asarray(r.normal(size=(3, 4, 8)), jnp.float32)},
              "scale": jnp.asarray(r.normal(size=7), jnp.bfloat16)}
    return {"params": params, "opt": optax.adamw(1e-3).init(params), "step": jnp.int32(seed),
            "key": jax.random.key(seed)}


def save(directory, *steps, **kwargs):
    with Checkpointer(directory, **kwargs) as saver:
        for s in steps:
            saver.save(s, state(s), {"seed": s})
    return directory


def test_round_trip_is_bitwise(tmp_path):
    # A NaN with a payload, -inf, -0 and a denormal.
    odd = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32)
    tree = {**state(3), "float32": jnp.asarray(odd), "bf16": jnp.asarray(odd, jnp.bfloat16),
            "int8": jnp.arange(-3, 3, dtype=jnp.int8), "bool": jnp.array([True, False]),
            "empty": jnp.zeros((0, 3)), "numpy64": np.array([np.pi, np.nan]), "numpy_int64": np.array(2**62),
            "uint32": jnp.uint32(2**32 - 1), "keys": jax.random.split(jax.random.key(7, impl="rbg"), (2, 3)),
            "none": None, "list": [jnp.zeros(2), ()], "fp8": jnp.arange(4, dtype=jnp.float8_e4m3fn)}
    host = {"generator": np.random.default_rng(1).bit_generator.state, "nan": float("nan"), "tiny": 5e-324,
            "text": "ü\n", "none": None, "list": [1, [True, "x"]], "empty": {}}
    zeros = lambda x: (np if isinstance(x, np.ndarray) else jnp).zeros_like(x)  # noqa: E731
    template = jax.tree.map(zeros, tree)
    with Checkpointer(tmp_path) as saver:
        metrics = {"eval/accuracy": np.float32(0.5), "note": "text", "bad": np.nan}
        saver.save(12, tree, host, metrics)
        saver.wait()
        found = saver.restore(template)
    assert found.step == 12
    assert_same_tree(tree, found.arrays)
    assert json.dumps(found.host) == json.dumps(host)  # as text: NaN is not equal to itself
    assert manifest.list_checkpoints(tmp_path)[0].metrics == {"eval/accuracy": 0.5}
    draw = jax.random.normal(found.arrays["keys"][1, 2], (4,))
    assert raw(draw).tobytes() == raw(jax.random.normal(tree["keys"][1, 2], (4,))).tobytes()


def test_restored_arrays_are_as_committed_as_the_template(tmp_path):
    """Otherwise the first step after a resume compiles anew, or mixes devices."""
    device = jax.devices()[0]
    tree = {"free": jnp.ones(3), "key": jax.random.key(1), "bound": jax.device_put(jnp.ones(3), device)}
    with Checkpointer(tmp_path) as saver:
        saver.save(1, tree, {})
        saver.wait()
        found = saver.restore(tree).arrays
    assert {k: v.committed for k, v in found.items()} == {k: v.committed for k, v in tree.items()}
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tree.items()}
    assert_same_tree(restore(tmp_path, abstract).arrays, tree)


def test_state_may_be_donated_and_changed_while_it_is_saved(tmp_path):
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, n = jnp.zeros((512, 512)), np.zeros(1000)
    with Checkpointer(tmp_path, keep_last=9) as saver:
        for step in range(4):
            saver.save(step, {"x": x, "n": n}, {})
            x = bump(x)
            n += 1
    for step in range(4):
        found = restore(tmp_path, {"x": x, "n": n}, step=step).arrays
        assert np.unique(found["x"]).tolist() == [step] and np.unique(found["n"]).tolist() == [step]


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    order, gate = [], threading.Event()
    commit = manifest.commit

    def slow_commit(path, meta):
        gate.wait(0.5)  # runs out if the second save waits, as it must; set if it does not
        order.append(f"commit {meta['step']}")
        commit(path, meta)

    monkeypatch.setattr(manifest, "commit", slow_commit)
    with Checkpointer(tmp_path) as saver:
        start = arrays.to_host

        def noted(*args):
            order.append("arrays")
            if len(order) > 1:
                gate.set()
            return start(*args)

        monkeypatch.setattr(arrays, "to_host", noted)
        saver.save(1, state(1), {})
        saver.save(2, state(2), {})
        assert saver.wait() == 2
    assert order == ["arrays", "commit 1", "arrays", "commit 2"]


def test_keep_last_and_best_by_metric(tmp_path):
    with Checkpointer(tmp_path, keep_last=2, keep_best="eval/accuracy") as saver:
        for step, accuracy in enumerate([0.1, 0.9, 0.3, np.nan, 0.2], 1):
            saver.save(step, state(step), {}, metrics={"eval/accuracy": accuracy})
    assert sorted(os.listdir(tmp_path)) == ["00000002", "00000004", "00000005"]
    assert set(saver.timings) == {f"perf/checkpoint_{x}" for x in ("blocking_seconds", "seconds", "bytes")}
    assert saver.timings["perf/checkpoint_bytes"] > 3 * 4 * 8 * 4


def test_nothing_to_restore(tmp_path):
    with Checkpointer(tmp_path / "none") as saver:
        assert saver.restore(state()) is None
    with pytest.raises(UserError, match="no checkpoint of step 3; there are: none"):
        restore(tmp_path, state(), step=3)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def data_file(path):
    """The file with the arrays' values."""
    return path / "arrays-00000-000.safetensors"


@pytest.mark.parametrize("damage, reason", [
    (lambda p: flip(data_file(p)), "changed content"),
    (lambda p: os.truncate(data_file(p), 100), "has 100 bytes instead of"),
    (lambda p: data_file(p).unlink(), "is missing"),
    (lambda p: flip(p / "host.json"), "host.json has changed content"),
    (lambda p: (p / "COMMITTED").unlink(), "half-written, COMMITTED is missing"),
    (lambda p: flip(p / "manifest.json"), "manifest.json does not match COMMITTED"),
], ids=["flip", "truncate", "delete", "host", "marker", "manifest"])
def test_damaged_newest_is_named_and_the_one_before_used(tmp_path, caplog, damage, reason):
    with Checkpointer(tmp_path, keep_last=3) as saver:
        for step in (1, 2, 3):
            saver.save(step, state(step), {"seed": step})
        saver.wait()
        damage(tmp_path / "00000003")
        found = saver.restore(state())
        assert found.step == 2 and found.host == {"seed": 2}
        assert_same_tree(found.arrays, state(2))
        text = caplog.text
        assert "00000003 is damaged" in text and reason in text and "using the one before" in text
        # It does not count among those kept any more, and its step can be saved again, also by this process.
        assert [c.step for c in manifest.list_checkpoints(tmp_path)] == [1, 2]
        saver.save(3, state(3), {})
        saver.wait()
        assert sorted(os.listdir(tmp_path)) == ["00000001", "00000002", "00000003"]
        assert_same_tree(saver.restore(state()).arrays, state(3))


def test_reading_changes_nothing(tmp_path):
    save(tmp_path, 1, 2)
    flip(data_file(tmp_path / "00000002"))
    (tmp_path / "00000003").mkdir()
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    assert restore(tmp_path, state()).step == 1
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_all_damaged_is_an_error_but_only_half_written_is_a_fresh_start(tmp_path, caplog):
    save(tmp_path / "a", 1, 2)
    for step in (1, 2):
        flip(data_file(tmp_path / "a" / f"0000000{step}"))
    with pytest.raises(UserError, match="no usable checkpoint .*00000002.*00000001.*run_dir"):
        restore(tmp_path / "a", state())
    with pytest.raises(UserError, match="no usable checkpoint"):
        restore(tmp_path / "a", state(), step=2)
    save(tmp_path / "b", 1)
    (tmp_path / "b/00000001/COMMITTED").unlink()
    (tmp_path / "b/00000002").mkdir()
    with pytest.raises(UserError, match="no usable checkpoint .*half-written"):
        restore(tmp_path / "b", state(), step=1)
    with Checkpointer(tmp_path / "b") as saver:
        assert saver.restore(state()) is None
        assert "00000002 is damaged (half-written" in caplog.text
        saver.save(1, state(1), {})
    assert os.listdir(tmp_path / "b") == ["00000001"]


def test_another_architecture_is_one_line(tmp_path):
    save(tmp_path, 1)
    good = state()

    def message(change, **kwargs):
        tree = state()
        change(tree)
        with pytest.raises(UserError) as e:
            restore(tmp_path, tree, **kwargs)
        assert "\n" not in str(e.value)
        return str(e.value).split("optimizer: ")[1]

    def shape(t):
        t["params"]["layers"]["q"] = jnp.zeros((3, 4, 16))

    assert message(shape) == "params/layers/q has shape [3, 4, 8] there, [3, 4, 16] here"
    assert message(lambda t: t["params"].update(scale=jnp.zeros(7))) == \
        "params/scale has dtype bfloat16 there, float32 here"
    assert message(lambda t: t["params"].update(bias=jnp.zeros(2))) == "it has no params/bias [2]"
    assert message(lambda t: t["params"].pop("scale")) == "it also has params/scale [7]"
    assert message(lambda t: t.update(key=jax.random.key(0, impl="rbg"))) == \
        "key has dtype key<fry> there, key<rbg> here"
    part = {"params": good["params"], "key": good["key"]}
    assert_same_tree(restore(tmp_path, part, partial=True).arrays, {k: state(1)[k] for k in part})


@pytest.mark.parametrize("host, message", [
    ({"a": (1, 2)}, r"host\['a'\] is a tuple"), ({"a": [{1: 2}]}, r"host\['a'\]\[0\] has the key 1"),
    ({"a": np.int64(3)}, r"host\['a'\] is a int64"), ({"a": np.float64(3)}, r"host\['a'\] is a float64")])
def test_host_state_that_would_come_back_changed(tmp_path, host, message):
    with Checkpointer(tmp_path) as saver, pytest.raises(TypeError, match=message):
        saver.save(1, state(), host)
    assert os.listdir(tmp_path) == []


def test_arrays_of_the_host_state_come_back_bitwise_and_are_covered_by_digests(tmp_path, caplog):
    blobs = {"tokens": np.arange(5, dtype=np.int32), "logp": np.array([-0.0, np.nan, 1e-40], np.float32),
             "sampled": np.array([True, False]), "none": np.zeros((0, 3), np.int64),
             "group/finish": np.array(["eos", "ü"])}
    with Checkpointer(tmp_path) as saver:
        saver.save(1, state(1), {"seed": 1}, blobs=blobs)
        blobs["tokens"][:] = 7  # the caller goes on with its arrays at once
        saver.save(2, state(2), {"seed": 2})
        saver.wait()
        assert restore(tmp_path, state()).blobs == {}
        found = restore(tmp_path, state(), step=1).blobs
        assert found["tokens"].tolist() == [0, 1, 2, 3, 4] and found.keys() == blobs.keys()
        for name in ("logp", "sampled", "none", "group/finish"):
            want, have = blobs[name], found[name]
            assert (have.dtype, have.shape, have.tobytes()) == (want.dtype, want.shape, want.tobytes()), name
        saver.save(3, state(3), {"seed": 3}, blobs=blobs)
        saver.wait()
        flip(tmp_path / "00000003/host.npz")
        assert saver.restore(state()).step == 2 and "host.npz has changed content" in caplog.text


@pytest.mark.parametrize("bad", [[1], np.array([{}]), np.zeros(2, jnp.bfloat16)])
def test_arrays_of_the_host_state_that_would_come_back_changed(tmp_path, bad):
    with Checkpointer(tmp_path) as saver, pytest.raises(TypeError, match="blobs\\['x'\\]"):
        saver.save(1, state(), {}, blobs={"x": bad})
    assert os.listdir(tmp_path) == []


def test_python_scalars_are_no_arrays(tmp_path):
    with Checkpointer(tmp_path) as saver, pytest.raises(TypeError, match="lr is a float"):
        saver.save(1, {"lr": 0.1}, {})


def full(*_, **__):
    raise OSError(28, "No space left on device")


def gone(*_, **__):
    raise OSError(107, "Transport endpoint is not connected")


@pytest.mark.parametrize("where", ["directory", "arrays", "host", "manifest", "marker"])
def test_full_disk_leaves_the_run_alive(tmp_path, monkeypatch, caplog, where):
    with Checkpointer(tmp_path, keep_last=2) as saver:
        saver.save(1, state(1), {})
        saver.wait()
        with monkeypatch.context() as m:
            module, name, file = {
                "directory": (epath.Path("x").__class__, "mkdir", ""), "arrays": (storage, "write_chunks", "arrays-"),
                "host": (storage, "write_chunks", "host.json"), "manifest": (manifest, "atomic_write", "manifest.json"),
                "marker": (manifest, "atomic_write", "COMMITTED")}[where]
            real = getattr(module, name)
            m.setattr(module, name, lambda p, *a, **k: full() if file in str(p) else real(p, *a, **k))
            saver.save(2, state(2), {})
            assert saver.wait() == 1
        assert "checkpoint of step 2 was NOT saved" in caplog.text
        assert "No space left on device" in caplog.text
        assert "a restart would begin at step 1" in caplog.text
        assert os.listdir(tmp_path) == ["00000001"]
        assert_same_tree(restore(tmp_path, state()).arrays, state(1))
        saver.save(3, state(3), {})  # there is room again
    assert_same_tree(restore(tmp_path, state()).arrays, state(3))


def test_really_full_disk(tmp_path, caplog):
    """The same on a file system of 3 MB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        values = np.random.default_rng(0).normal(size=(3, 400, 800)).astype(np.float32)  # does not compress
        random = [{"x": jnp.asarray(v)} for v in values]
        with Checkpointer(tmp_path / "c", keep_last=2) as saver:
            for i, newest in enumerate((0, 1, 1)):
                saver.save(i, random[i], {})
                assert saver.wait() == newest
            assert "checkpoint of step 2 was NOT saved" in caplog.text and "No space left" in caplog.text
            assert sorted(os.listdir(tmp_path / "c")) == ["00000000", "00000001"]
            assert_same_tree(saver.restore(random[0]).arrays, random[1])
            small = {"x": random[0]["x"][:10]}
            saver.save(9, small, {})
            assert saver.wait() == 9
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_storage_that_goes_away(tmp_path, monkeypatch, caplog):
    with Checkpointer(tmp_path) as saver:
        monkeypatch.setattr(manifest, "atomic_write", gone)
        saver.save(1, state(1), {})
        assert saver.wait() is None
    assert "Transport endpoint" in caplog.text and "a restart would begin at step 0" in caplog.text


def test_other_failures_are_not_swallowed(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as saver:
        monkeypatch.setattr(manifest, "commit", lambda *_: 1 / 0)
        saver.save(1, state(), {})
        with pytest.raises(ZeroDivisionError):
            saver.wait()
        assert saver.wait() is None




RESHARD = """
import sys, numpy as np, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxrl.runtime.checkpoint import Checkpointer, restore
from tests.stores import Store
devices = np.array(jax.devices())
def tree(mesh, spec):
    w = jnp.arange(64 * 6, dtype=jnp.float32).reshape(64, 6)
    specs = {"w": spec, "b": P("x"), "key": P()}
    return jax.device_put({"w": w, "b": w.astype(jnp.bfloat16)[:, 0], "key": jax.random.key(5)},
                          {k: NamedSharding(mesh, s) for k, s in specs.items()})
a = tree(jax.sharding.Mesh(devices.reshape(4, 2), ("x", "y")), P("x", "y"))
saver = Checkpointer(sys.argv[1])
saver.save(1, a, {})
saver.wait()
for part, spec in ((devices.reshape(2, 4)[:, :2], P("y")), (devices[:1].reshape(1, 1), P())):
    there = tree(jax.sharding.Mesh(part, ("x", "y")), spec)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), there)
    b = restore(sys.argv[1], template).arrays
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y.sharding, b, template))), b
    assert np.array_equal(a["w"], b["w"]) and np.array_equal(a["b"], b["b"]), b
    assert int(jax.random.bits(a["key"])) == int(jax.random.bits(b["key"]))
saver.save(2, a, {})  # and no close: the program's end waits for the save
"""


def test_other_mesh_and_exit_without_close(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, "-c", RESHARD, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(os.listdir(tmp_path)) == ["00000001", "00000002"]
    meta = manifest.read_manifest(tmp_path / "00000002")
    assert manifest.find_damage(tmp_path / "00000002", meta) is None


# One process imports everything and forks a victim per place in the save, before a backend or thread exists.
KILLED = """
import os, sys
import jax.numpy as jnp, numpy as np
from jaxrl.runtime.checkpoint import Checkpointer
from tests.chaos import die_at_write

def victim(directory, n):
    os.setsid()
    with Checkpointer(directory, keep_last=1) as saver:
        saver.save(2, {"x": jnp.full((50, 50), 2)}, {"step": 2})
        saver.wait()
        die_at_write(n)
        saver.save(3, {"x": jnp.full((50, 50), 3)}, {"step": 3})

n, killed = 0, True
while killed and n < 200:
    n += 1
    pid = os.fork()
    if pid == 0:
        try:
            victim(f"{sys.argv[1]}/{n}", n)
        finally:
            os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
print(n)
"""


def test_kill_9_at_every_write_of_a_save(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, tmp_path], env=env,
                          capture_output=True, text=True)
    places = int(done.stdout.split()[-1])
    assert 8 < places < 200, done.stderr[-2000:]
    seen = set()
    for n in range(1, places + 1):
        with Checkpointer(tmp_path / str(n)) as saver:
            found = saver.restore({"x": jnp.zeros((50, 50), jnp.int32)})
            assert np.unique(found.arrays["x"]).tolist() == [found.step] == [found.host["step"]]
            seen.add(found.step)
            saver.save(4, {"x": jnp.full((50, 50), 4)}, {"step": 4})
        assert all((tmp_path / str(n) / f / "COMMITTED").exists() for f in os.listdir(tmp_path / str(n)))
        assert manifest.list_checkpoints(tmp_path / str(n))[-1].step == 4
        shutil.rmtree(tmp_path / str(n))
    assert seen == {2, 3}


@pytest.fixture(scope="module", params=["gs", "s3"])
def store(request):
    pytest.importorskip({"gs": "gcp_storage_emulator", "s3": "moto"}[request.param])
    with Store(request.param) as store, store.found():
        yield store


def test_on_a_store_the_marker_is_the_last_request_and_damage_is_named(store, caplog, tmp_path):
    run = f"{store.url}/ck"
    with Checkpointer(run, keep_last=2, before_commit=lambda: storage.atomic_write(f"{run}-metrics", "x")) as saver:
        saver.save(1, state(1), {"seed": 1}, blobs={"tokens": np.arange(3)})
        saver.wait()
        store.requests()
        saver.save(2, state(2), {"seed": 2})
        assert saver.wait() == 2
        changes = [r for r in store.requests() if not r.startswith(("GET", "HEAD"))]
        assert len(changes) < 10
        assert_same_tree(saver.restore(state()).arrays, state(2))
        saver.save(3, state(3), {"seed": 3})
        saver.wait()
    assert [c.step for c in manifest.list_checkpoints(run)] == [2, 3]
    assert {n.split("/")[1] for n in store.names("ck/")} == {"00000002", "00000003"}
    data = bytearray(store.read("ck/00000003/arrays-00000-000.safetensors"))
    data[-3] ^= 1
    storage.atomic_write(f"{run}/00000003/arrays-00000-000.safetensors", bytes(data))
    with Checkpointer(run) as saver:
        assert saver.restore(state()).host == {"seed": 2}
    assert "ck/00000003 is damaged (arrays-00000-000.safetensors has changed content" in caplog.text
    store.download("ck", tmp_path)  # and a copy on a disk is the same checkpoint
    assert_same_tree(restore(tmp_path, state()).arrays, state(2))


def test_an_account_that_may_not_delete_saves(store, caplog):
    run = f"{store.url}/nodelete"
    store.faults({"match": "^DELETE", "status": 403, "times": -1})
    with Checkpointer(run, keep_last=1) as saver:
        for step in (1, 2):
            saver.save(step, state(step), {})
            assert saver.wait() == step
        assert "could not remove old checkpoint" in caplog.text
    store.faults()
    assert restore(run, state()).step == 2


def test_a_run_whose_first_checkpoint_is_refused_ends_in_one_line(store):
    store.faults({"match": "^(POST|PUT)", "status": 403, "times": -1})
    with pytest.raises(UserError, match="refused: the first checkpoint could not be saved: .*no permission"):
        with Checkpointer(f"{store.url}/refused") as saver:
            saver.save(0, state(), {})
            saver.wait()
    store.faults()


@pytest.mark.parametrize("skip", range(0, 9))
def test_a_store_that_goes_away_leaves_the_older_checkpoint(store, caplog, monkeypatch, skip):
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    run = f"{store.url}/away{skip}"
    with Checkpointer(run, keep_last=1) as saver:
        saver.save(1, state(1), {})
        saver.wait()
        store.faults({"match": "^(POST|PUT|DELETE)", "skip": skip, "status": 403, "times": -1})
        saver.save(2, state(2), {})
        newest = saver.wait()
        hit = store.counts().get("faults", 0)
        store.faults()
        assert newest == (1 if "was NOT saved" in caplog.text else 2) and (hit or newest == 2)
        assert restore(run, state()).step == newest
        saver.save(3, state(3), {})
        assert saver.wait() == 3
    assert [c.step for c in manifest.list_checkpoints(run)] == [3]
