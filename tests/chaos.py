"""Kills a training command again and again until it is done at last, and compares it with an undisturbed run.

    python -m tests.chaos RUN_DIR REFERENCE_DIR KILLS[:KIND] SEED -- MODULE ARGS...

runs `python -m MODULE ARGS`, which must train into RUN_DIR and go on from there when it is started again.
If REFERENCE_DIR is empty, the command is first run there once, undisturbed, with RUN_DIR in its arguments replaced.
RUN_DIR may be gs://bucket/... on a store of tests/stores.py (found by the environment); then the proxy before it kills.

Kinds of kill, all SIGKILL to the whole process group:
  start   at a random moment of the start-up, before the first new record
  step    a random moment after a random number of new records in metrics.jsonl
  save    as soon as a half-written checkpoint is seen, plus a random moment
  write   by the process itself, just before the N-th call that makes something durable (fsync, replace, rmtree):
          the start of every gap in the commit protocol
On a store, `save` and `write` are a kill before the N-th request that changes something, or after it but before its
answer.

Each start is a fork of this process, which has imported MODULE but touched no device: a start then costs what comes
after the imports.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import random
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback

import numpy as np

from jaxrl.runtime import storage
from jaxrl.runtime.manifest import list_checkpoints
from jaxrl.runtime.metrics import read_metrics
from tests.stores import Client

KINDS = ("step", "save", "write", "start")


@dataclasses.dataclass
class Outcome:
    """kills: how many of each kind hit a living process. half_written: how many of them left a new half-written
    checkpoint behind. starts: how often the command was started."""

    kills: dict[str, int]
    half_written: int
    starts: int
    seconds: float


def run_until_done(module, args, run_dir, kills, seed, *, kinds=KINDS, limit=7200.0):
    """Starts `python -m module args` and kills it until `kills` have hit and it ends by itself with 0; Outcome.

    Raises AssertionError with the end of its output if it fails by itself, if it ends before it could be killed
    so often (give it more steps), or if all this takes longer than `limit` seconds.
    """
    importlib.import_module(module)
    rng, begin, store, log = random.Random(seed), time.monotonic(), store_of(run_dir), run_dir.rstrip("/") + ".log"
    if store:
        log, run_dir = f"{tempfile.mkdtemp()}/log", run_dir.removeprefix(store.url + "/")
    landed, half_written, starts, startup = dict.fromkeys(KINDS, 0), 0, 0, 1.0
    records_in = storage.scratch(f"{store.url}/{run_dir}", "runs") if store else pathlib.Path(run_dir)
    while True:
        kind = rng.choice(kinds) if sum(landed.values()) < kills else None
        write = rng.randint(1, 24) if kind == "write" else 0
        moment = rng.uniform(0, {"start": startup, "step": 0.05, "save": 0.03}.get(kind, 0))
        records, started, torn = _records(records_in), time.monotonic(), _half_written(run_dir, store)
        wanted = records + rng.randint(1, 3)
        pid, code = _fork(module, args, log, 0 if store else write), None
        if store:
            fault = {"match": "^(POST|PUT|DELETE)", "skip": rng.randint(0, 40), "kill": pid}
            store.faults(*[fault | {"after": rng.random() < 0.5}] * (kind in ("save", "write")))
        starts += 1
        try:
            while code is None:
                assert time.monotonic() - begin < limit, f"not done after {limit} s and {landed}:\n{_tail(log)}"
                now = _records(records_in)
                if now > records and startup == 1.0:
                    startup = time.monotonic() - started
                if (kind == "start" and time.monotonic() - started >= moment) or (
                        kind == "step" and now >= wanted) or (
                        kind == "save" and not store and _half_written(run_dir) - torn):
                    time.sleep(0 if kind == "start" else moment)
                    _kill(pid)
                time.sleep(0.002)
                done, status = os.waitpid(pid, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if done else None
        finally:
            if code is None:  # an error above, or Ctrl-C
                _kill(pid)
        if code == -signal.SIGKILL:
            landed[kind] += 1
            half_written += bool(_half_written(run_dir, store) - torn)
        else:
            assert code == 0, f"exit code {code} after {landed}:\n{_tail(log)}"
            assert sum(landed.values()) >= kills, f"done after {landed} of {kills} kills: it needs more steps"
            return Outcome(landed, half_written, starts, time.monotonic() - begin)


def run_once(module, args, log):
    """`python -m module args`, undisturbed. Raises AssertionError with the end of its output if it fails."""
    importlib.import_module(module)
    code = os.waitstatus_to_exitcode(os.waitpid(_fork(module, args, log, 0), 0)[1])
    assert code == 0, f"exit code {code}:\n{_tail(log)}"


def _fork(module, args, log, write):
    """Starts the command as the leader of a process group of its own; its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if write:
            die_at_write(write)
        sys.argv = [module, *args]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # what the interpreter does at its end, and os._exit does not
        sys.stdout.flush()
        os._exit(code)


def _tail(log):
    return pathlib.Path(log).read_text(errors="replace")[-4000:]


def store_of(run_dir):
    """The store of tests/stores.py that a run directory is on, found as its clients find it; None for a disk."""
    variable = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}.get(run_dir.partition("://")[0])
    return Client(run_dir[:2], os.environ[variable]) if variable else None


def _kill(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not reached setsid yet
        os.kill(pid, signal.SIGKILL)


def _records(run_dir):
    path = run_dir / "metrics.jsonl"
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:  # not there, or a new start has just cleared it away
        return 0


def deterministic_view(record):
    """The record without what depends on the clock: keys under time/ and perf/, and tokens_per_second."""
    return {k: v for k, v in record.items() if not k.startswith(("time/", "perf/")) and k != "tokens_per_second"}


def _half_written(run_dir, store=None):
    """(name, inode or any object) of every checkpoint that has no marker yet."""
    if store:
        found = [n.removeprefix(f"{run_dir}/checkpoints/").split("/") for n in store.names(f"{run_dir}/checkpoints/")]
        whole = {step for step, file in found if file == "COMMITTED"}
        return {(step, file) for step, file in found if step not in whole}
    try:
        with os.scandir(f"{run_dir}/checkpoints") as found:
            return {(e.name, e.inode()) for e in found if not os.path.exists(f"{e.path}/COMMITTED")}
    except FileNotFoundError:
        return set()


def assert_same_run(run_dir, reference_dir):
    """Same records (all but timings) and the same final checkpoint, bit for bit; no step missing, none
    twice."""
    if store := store_of(str(run_dir)):
        name, run_dir = run_dir.removeprefix(store.url + "/"), tempfile.mkdtemp()
        store.download(name, pathlib.Path(run_dir))
    runs = [pathlib.Path(d) for d in (run_dir, reference_dir)]
    records = [read_metrics(d / "metrics.jsonl") for d in runs]
    steps = [[r["step"] for r in rs] for rs in records]
    assert steps[0] == steps[1], f"steps differ: {steps[0]} and {steps[1]}"
    assert len(set(steps[0])) == len(steps[0]), f"a step is there twice: {steps[0]}"
    for ours, theirs in zip(*records, strict=True):
        # As text, so that NaN equals NaN, and 0.0 does not equal -0.0.
        a, b = (sorted((k, repr(v)) for k, v in deterministic_view(r).items()) for r in (ours, theirs))
        assert a == b, f"step {ours['step']}: {[(x, y) for x, y in zip(a, b, strict=False) if x != y][:4]}"
    saved = [list_checkpoints(d / "checkpoints") for d in runs]
    assert [c.step for c in saved[0]] == [c.step for c in saved[1]]
    ours, theirs = (c[-1] for c in saved)
    a, b = (arrays_of(c.path) for c in (ours, theirs))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name], f"{name} differs"
    # All but the writer's, which counts bytes, and timings have different lengths.
    host = [json.loads((c.path / "host.json").read_text()) for c in (ours, theirs)]
    assert len({json.dumps({k: v for k, v in h.items() if k not in ("writer", "metrics")}) for h in host}) == 1
    blobs = [_blobs(c.path / "host.npz") for c in (ours, theirs)]
    assert blobs[0] == blobs[1], "the arrays of the host state differ"
    samples = [{p.name: p.read_bytes() for p in (d / "samples").glob("*")} for d in runs]
    assert samples[0].keys() == samples[1].keys(), f"samples: {sorted(samples[0].keys() ^ samples[1].keys())[:4]}"
    assert samples[0] == samples[1], "samples differ"


def _blobs(path):
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as found:
        return {k: (str(v.dtype), v.shape, v.tobytes()) for k, v in found.items()}


def arrays_of(path):
    """{name: dtype, shape, bytes} of all tensors of a checkpoint, read with the library of the file format alone."""
    from safetensors import deserialize

    found = [entry for file in sorted(path.glob("*.safetensors")) for entry in deserialize(file.read_bytes())]
    return {name: (e["dtype"], e["shape"], bytes(e["data"])) for name, e in found}


def die_at_write(n):
    """From now on the n-th call of fsync, remove, replace or rmtree in this process is a kill -9 of its
    group."""
    lock, left = threading.Lock(), [n]

    def dying(call):
        def wrapper(*args, **kwargs):
            with lock:
                left[0] -= 1
                if left[0] == 0:
                    os.killpg(os.getpgid(0), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapper

    for module, name in ((os, "fsync"), (os, "remove"), (os, "replace"), (shutil, "rmtree")):
        setattr(module, name, dying(getattr(module, name)))


def main(run_dir, reference_dir, kills, seed, separator, module, *args):
    assert separator == "--", __doc__
    reference = pathlib.Path(reference_dir)
    if not reference.exists():
        run_once(module, [a.replace(run_dir, reference_dir) for a in args], f"{reference_dir}.log")
    count, _, kind = kills.partition(":")
    print(run_until_done(module, args, run_dir, int(count), int(seed), kinds=[kind] if kind else KINDS))
    assert_same_run(run_dir, reference_dir)
    print("same as the undisturbed run, bit for bit")


if __name__ == "__main__":
    main(*sys.argv[1:])
