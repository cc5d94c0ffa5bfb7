"""Run directory: layout, atomic writes, and a lock that only one process at a time can have."""

import json
import os
import signal
import subprocess
import sys

import pytest

from jaxrl.errors import UserError
from jaxrl.runtime import storage
from jaxrl.runtime.lock import Lock
from jaxrl.runtime.rundir import open_run_dir
from jaxrl.runtime.storage import atomic_write


def test_layout_and_config_changes(tmp_path):
    run = open_run_dir(tmp_path / "a" / "run", resume=False)
    assert run.write_config({"seed": 1, "algorithm": {"loss": "grpo", "hyper": {}}}) == {}
    assert json.loads(run.config.read_text())["algorithm"] == {"loss": "grpo", "hyper": {}}
    changed = run.write_config({"seed": 1, "algorithm": {"loss": "dapo", "hyper": {"eps": 0.2}}})
    assert changed == {"algorithm.loss": ("grpo", "dapo"), "algorithm.hyper": ({}, None),
                       "algorithm.hyper.eps": (None, 0.2)}
    assert run.samples.is_dir() and run.checkpoints.is_dir()


def test_old_run_is_not_overwritten(tmp_path):
    run = open_run_dir(tmp_path, resume=False)
    run.lock.release()
    open_run_dir(tmp_path, resume=False).lock.release()  # still empty
    run.metrics.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="already holds a run; set config.resume=True"):
        open_run_dir(tmp_path, resume=False)
    open_run_dir(tmp_path, resume=True).lock.release()  # and the refusal above has released the lock
    run.metrics.unlink()
    (run.checkpoints / "00000001").mkdir()
    with pytest.raises(UserError, match="already holds a run"):
        open_run_dir(tmp_path, resume=False)


def test_leftovers_of_killed_writes_are_removed(tmp_path):
    run = open_run_dir(tmp_path, resume=False)
    run.write_samples(1, [])
    run.lock.release()
    for name in (".config.json.tmp-17", "samples/.step_00000001.jsonl.tmp-17"):
        (tmp_path / name).write_text("half")
    open_run_dir(tmp_path, resume=True).lock.release()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoints", "samples"]
    assert [p.name for p in run.samples.iterdir()] == ["step_00000001.jsonl"]


def test_run_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="config.run_dir: cannot make .*file"):
        open_run_dir(tmp_path / "file" / "run", resume=True)


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match="config.run_dir=.*: cannot write .*lock: Is a directory"):
        open_run_dir(tmp_path, resume=True)


def test_samples_are_replaced_and_dropped(tmp_path):
    run = open_run_dir(tmp_path, resume=False)
    for step in (1, 2, 3):
        run.write_samples(step, [{"text": "old"}])
    (run.samples / "step_00000003.jsonl.gz").touch()  # somebody's
    run.write_samples(2, [{"text": "ü"}, {"text": "b"}])
    run.drop_samples_after(2)
    assert sorted(p.name for p in run.samples.glob("*.jsonl")) == ["step_00000001.jsonl", "step_00000002.jsonl"]
    lines = (run.samples / "step_00000002.jsonl").read_text().splitlines()
    assert [json.loads(x)["text"] for x in lines] == ["ü", "b"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "f"
    atomic_write(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, failing, full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


HOLDER = """
import sys
from jaxrl.runtime.rundir import open_run_dir
run = open_run_dir(sys.argv[1], resume=True)
print("held", flush=True)
sys.stdin.read()
"""


def hold(path):
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    return child


def test_lock_names_its_owner_and_dies_with_it(tmp_path):
    child = hold(tmp_path)
    try:
        with pytest.raises(UserError, match=rf"in use by pid {child.pid} on \S+ since 20\d\d-"):
            open_run_dir(tmp_path, resume=True)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    lock = open_run_dir(tmp_path, resume=True).lock  # free at once, without any cleaning up
    with pytest.raises(UserError, match=f"in use by pid {os.getpid()} "):
        Lock(tmp_path)  # also within one process
    lock.release()
    lock.release()
    Lock(tmp_path).release()


def test_lock_is_not_inherited_by_worker_processes(tmp_path):
    """A grading worker that outlives the trainer for a moment must not keep the directory."""
    run = open_run_dir(tmp_path, resume=True)
    worker = subprocess.Popen([sys.executable, "-c", "import sys; print(1, flush=True); sys.stdin.read()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
    worker.stdout.readline()
    run.lock.release()
    open_run_dir(tmp_path, resume=True).lock.release()
    worker.kill()
    worker.wait()
