"""Kills a training command again and again until it is done at last, and compares it with an undisturbed run.

    python -m tests.chaos RUN_DIR REFERENCE_DIR KILLS SEED -- command that trains into RUN_DIR

Kinds of kill, all SIGKILL to the whole process group:
  start   at a random moment of the start-up, before the first new record
  step    a random moment after a random number of new records in metrics.jsonl
  save    as soon as a half-written checkpoint is seen, plus a random moment
  write   by the process itself, just before the N-th call that makes something durable (fsync, rename,
          rmtree): the start of every gap in the commit protocol. The command runs under `python -m
          tests.chaos --at N`.
"""

import dataclasses
import os
import pathlib
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from jaxrl.runtime.manifest import list_checkpoints
from jaxrl.runtime.metrics import deterministic_view, read_metrics

KINDS = ("step", "save", "write", "start")


@dataclasses.dataclass
class Outcome:
    """kills: how many of each kind hit a living process. starts: how often the command was started."""

    kills: dict[str, int]
    starts: int
    seconds: float


def run_until_done(command, run_dir, kills, seed, *, env=None, limit=600.0):
    """Starts `command` (a python command line without the interpreter) until it ends with 0; Outcome.

    kills: how many times to kill it. Raises AssertionError with the end of its output if it fails by itself,
    or if it ended before it could be killed so often (give it more steps).
    """
    run_dir, rng, begin = pathlib.Path(run_dir), random.Random(seed), time.monotonic()
    landed, starts, startup = dict.fromkeys(KINDS, 0), 0, 1.0
    log = run_dir.with_name(run_dir.name + ".log")
    while True:
        kind = rng.choice(KINDS) if sum(landed.values()) < kills else None
        prefix = ["-m", "tests.chaos", "--at", str(rng.randint(1, 12)), "--"] if kind == "write" else []
        records, started = _records(run_dir), time.monotonic()
        starts += 1
        with open(log, "wb") as out:
            child = subprocess.Popen([sys.executable, *prefix, *command], stdout=out, stderr=out, env=env,
                                     start_new_session=True)
        moment = rng.uniform(0, {"start": startup, "step": 0.05, "save": 0.03}.get(kind, 0))
        wanted = records + rng.randint(1, 3)
        while child.poll() is None:
            assert time.monotonic() - begin < limit, f"not done after {limit} s:\n{_tail(log)}"
            now = _records(run_dir)
            if now > records and startup == 1.0:
                startup = time.monotonic() - started
            if (kind == "start" and time.monotonic() - started >= moment) or (
                    kind == "step" and now >= wanted) or (kind == "save" and _saving(run_dir)):
                time.sleep(0 if kind == "start" else moment)
                _kill(child)
                break
            time.sleep(0.002)
        code = child.wait()
        if code == -signal.SIGKILL:
            landed[kind] += 1
        else:
            assert code == 0, f"exit code {code} after {landed}:\n{_tail(log)}"
            assert sum(landed.values()) >= kills, f"done after {landed} of {kills} kills: it needs more steps"
            return Outcome(landed, starts, time.monotonic() - begin)


def _tail(log):
    return log.read_text(errors="replace")[-4000:]


def _kill(child):
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _records(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _saving(run_dir):
    try:
        return any(n.endswith(".tmp") for n in os.listdir(run_dir / "checkpoints"))
    except FileNotFoundError:
        return False


def assert_same_run(run_dir, reference_dir):
    """Same records (all but timings) and the same final checkpoint, bit for bit; no step missing, none
    twice."""
    runs = [pathlib.Path(d) for d in (run_dir, reference_dir)]
    records = [read_metrics(d / "metrics.jsonl") for d in runs]
    steps = [[r["step"] for r in rs] for rs in records]
    assert steps[0] == steps[1], f"steps differ: {steps[0]} and {steps[1]}"
    assert len(set(steps[0])) == len(steps[0]), f"a step is there twice: {steps[0]}"
    for ours, theirs in zip(*records, strict=True):
        # As text, so that NaN equals NaN, and 0.0 does not equal -0.0.
        a, b = (sorted((k, repr(v)) for k, v in deterministic_view(r).items()) for r in (ours, theirs))
        assert a == b, f"step {ours['step']}: {[(x, y) for x, y in zip(a, b, strict=False) if x != y][:4]}"
    ours, theirs = (list_checkpoints(d / "checkpoints")[-1] for d in runs)
    assert ours.step == theirs.step
    a, b = (arrays_of(c.path) for c in (ours, theirs))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), f"{name} differs"
    for name in ("blobs.npz",):
        assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes(), f"{name} differs"


def arrays_of(path):
    """All arrays of a checkpoint by name, as NumPy, read with orbax alone."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        names = reader.metadata(path / "arrays").item_metadata.tree
        args = {k: ocp.RestoreArgs(restore_type=np.ndarray) for k in names}
        return reader.restore(path / "arrays", args=ocp.args.PyTreeRestore(restore_args=args))


def die_at_write(n):
    """From now on the n-th call of fsync, rename, replace or rmtree in this process is a kill -9 of its
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

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
        setattr(module, name, dying(getattr(module, name)))


def _child(argv):
    die_at_write(int(argv[0]))
    assert argv[1:3] == ["--", "-m"], "only `-m module args` can be run with --at"
    sys.argv = argv[3:]
    runpy.run_module(argv[3], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[1] == "--at":
        _child(sys.argv[2:])
    else:
        print(run_until_done(sys.argv[6:], sys.argv[1], int(sys.argv[3]), int(sys.argv[4])))
        assert_same_run(sys.argv[1], sys.argv[2])
        print("same as the undisturbed run, bit for bit")
