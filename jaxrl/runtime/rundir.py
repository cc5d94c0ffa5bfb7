"""One directory holds one run: its layout, its lock, and the only ways in which files are put there.

    config.json          the resolved configuration
    metrics.jsonl        one record a step (metrics.py)
    samples/             a few rollouts a step, step_00000012.jsonl
    tensorboard/         event files
    checkpoints/         checkpoint.py
    .lock                held by the process that writes here

Everything but the lock works on any POSIX-like shared file system. The lock is `flock`: the kernel releases
it when its owner dies, also by kill -9. On NFS it excludes other hosts only where the mount supports locks
(NFSv4, or v3 with lockd and without `nolock`); on GCS FUSE it excludes processes of the same host only.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterable, Mapping

from jaxrl.errors import UserError


def fsync_dir(path: str | os.PathLike) -> None:
    """Makes the names inside a directory (files made, renamed or removed there) survive a power failure."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: str | os.PathLike, data: str | bytes) -> None:
    """Writes a file so that a reader sees the old content or the new one, whenever the writer dies.

    Raises OSError (disk full, no permission) with the old file untouched and no temporary file left.
    """
    path = pathlib.Path(path)
    tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(tmp, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError:
        tmp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


class Lock:
    """An exclusive, advisory lock on a directory. Held from construction until `release` or the end of the
    process.

    Raises UserError naming the owner (pid, host, start time, command) if another process, or another Lock of
    this one, holds it. Children made by a bare fork share the lock; those started by exec (subprocess, spawn)
    do not.
    """

    def __init__(self, directory: str | os.PathLike):
        self.path = pathlib.Path(directory) / ".lock"
        # The file is never removed: a second process could lock a new file of the same name meanwhile.
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            owner = self._owner()
            os.close(self._fd)
            if not isinstance(e, BlockingIOError):
                raise UserError(f"{self.path}: cannot lock: {e.strerror}; config.run_dir must be on a file "
                                "system with flock") from e
            raise UserError(f"config.run_dir: {directory} is in use by {owner}; stop that process or choose "
                            "another directory") from None
        owner = {"pid": os.getpid(), "host": socket.gethostname(),
                 "started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "command": " ".join(sys.argv)[:500]}
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(owner).encode(), 0)

    def _owner(self) -> str:
        try:
            o = json.loads(os.pread(self._fd, 4096, 0))
            return f"pid {o['pid']} on {o['host']} since {o['started']} ({o['command']})"
        except (ValueError, KeyError, TypeError):  # the owner has the lock but has not written its name yet
            return "another process"

    def release(self) -> None:
        """Gives the lock up; more than once is harmless."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The paths of a run. `open_run_dir` makes one for writing; `RunDir(path)` is enough for reading."""

    root: pathlib.Path
    lock: Lock | None = None

    @property
    def config(self) -> pathlib.Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> pathlib.Path:
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> pathlib.Path:
        return self.root / "samples"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.root / "checkpoints"

    def write_config(self, config: Mapping) -> dict[str, tuple]:
        """Stores the resolved configuration (nested mapping, JSON-able).

        Returns {dotted key: (before, now)} for every key that differs from the one stored by an earlier start.
        """
        now = _flat(json.loads(json.dumps(config, default=str)))
        before = _flat(json.loads(self.config.read_text())) if self.config.exists() else now
        atomic_write(self.config, json.dumps(config, indent=2, default=str) + "\n")
        keys = sorted(before.keys() | now.keys())
        return {k: (before.get(k), now.get(k)) for k in keys if before.get(k) != now.get(k)}

    def write_samples(self, step: int, rows: Iterable[Mapping]) -> None:
        """Stores the rollout sample of a step as jsonl, whole or not at all; the same step again replaces
        it."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(self.samples / f"step_{step:08d}.jsonl", text)

    def drop_samples_after(self, step: int) -> None:
        """On resume at `step`: removes samples of later steps, which will be made again."""
        for path in self.samples.glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()


def _flat(tree: Mapping, prefix: str = "") -> dict:
    out = {}
    for k, v in tree.items():
        out.update(_flat(v, f"{prefix}{k}.") if isinstance(v, Mapping) and v else {f"{prefix}{k}": v})
    return out


def open_run_dir(root: str | os.PathLike, resume: bool) -> RunDir:
    """Makes the layout if needed and locks it for this process (call it in process 0 only).

    resume=False on a directory that already holds a run raises UserError: an old run is never overwritten.
    resume=True on an empty or new directory is fine, so that one command serves first start and every
    restart. Raises UserError also if the directory cannot be made or is in use.
    """
    root = pathlib.Path(root)
    run = RunDir(root)
    try:
        for path in (root, run.samples, run.checkpoints):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"config.run_dir: cannot make {e.filename}: {e.strerror}") from e
    lock = Lock(root)
    started = run.metrics.exists() and run.metrics.stat().st_size > 0
    if not resume and (started or any(run.checkpoints.iterdir())):
        lock.release()
        raise UserError(f"config.run_dir: {root} already holds a run; set config.resume=True to continue it, "
                        "or choose another directory")
    for depth in (".*.tmp-*", "*/.*.tmp-*"):  # what a kill leaves of an atomic write
        for leftover in root.glob(depth):
            leftover.unlink()
    return dataclasses.replace(run, lock=lock)
