"""One writer for a run directory: `flock` on a disk, a lease with a heartbeat on an object store."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pathlib
import re
import socket
import sys
import threading
import time

from etils import epath

from jaxrl.errors import UserError
from jaxrl.runtime import storage

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0


def lock(directory: str | os.PathLike) -> Lock | Lease:
    """Makes this process the only writer of a directory. Raises UserError naming the owner if there is one."""
    return (Lease if storage.is_remote(directory) else Lock)(directory)


def _me() -> dict:
    """This process, as others see it: pid, host and command for people; machine and birth tell whether it still
    lives."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        machine = None
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": " ".join(sys.argv)[:500], "machine": machine, "born": _born(os.getpid())}


def _born(pid: int) -> str | None:
    """When a process of this machine began, in ticks since the boot; None if it is gone, also as a zombie."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _name(owner: dict) -> str:
    try:
        return f"pid {owner['pid']} on {owner['host']} since {owner['started']} ({owner['command']})"
    except KeyError:
        return "another process"


def _in_use(directory, owner: dict) -> UserError:
    return UserError(f"config.run_dir: {os.fspath(directory)} is in use by {_name(owner)}; stop that process or choose "
                     "another directory")


class Lock:
    """An exclusive, advisory lock on a local directory. Held from construction until `release` or the end of the
    process.

    Raises UserError naming the owner (pid, host, start time, command) if another process, or another Lock of
    this one, holds it. Children made by a bare fork share the lock; those started by exec (subprocess, spawn) do not.
    The kernel releases it when its owner dies, also by kill -9. On NFS it excludes other hosts only where the mount
    supports locks (NFSv4, or v3 with lockd and without `nolock`); on GCS FUSE it excludes processes of the same host
    only.
    """

    def __init__(self, directory: str | os.PathLike):
        path = pathlib.Path(directory) / ".lock"
        # The file is never removed: a second process could lock a new file of the same name meanwhile.
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise UserError(f"config.run_dir={directory}: cannot write {path}: {e.strerror}") from e
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            owner = self._owner()
            os.close(self._fd)
            if not isinstance(e, BlockingIOError):
                raise UserError(f"{path}: cannot lock: {e.strerror}; config.run_dir must be on a file "
                                "system with flock") from e
            raise _in_use(directory, owner) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(_me()).encode(), 0)

    def _owner(self) -> dict:
        try:
            return dict(json.loads(os.pread(self._fd, 4096, 0)))
        except (ValueError, TypeError):  # the owner has the lock but has not written its name yet
            return {}

    def confirm(self) -> None:
        """Does nothing: the kernel keeps a lock."""

    def release(self) -> None:
        """Gives the lock up; more than once is harmless."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Lease:
    """The same on an object store: the process that made the highest of the objects .lock/00000001, .lock/00000002, ...
    owns the directory.

    An object is made by a conditional write, in which only one of several processes succeeds. The owner renews
    .lock/NUMBER.beat four times in `seconds`. A later process waits that long, by its own clock, for the beat to
    change. If it changes, the directory is in use. If not, the owner is dead and the next number may be taken; there is
    no wait if the owner ran on this machine and its process is gone. An owner that finds a higher number has lost the
    directory (it was suspended, or cut off, for longer than its lease) and ends.
    """

    def __init__(self, directory: str | os.PathLike, seconds: float | None = None):
        self._directory, self._where = directory, epath.Path(directory) / ".lock"
        self._seconds = LEASE_SECONDS if seconds is None else seconds
        self._stop, self._beats, self._warned = threading.Event(), 0, False
        with storage.user_errors("config.run_dir"):
            term = self._highest()
            if term and self._lives(term):
                raise _in_use(directory, self._owner(term))
            self._term = term + 1
            if not storage.create(self._where / f"{self._term:08d}", json.dumps(self._claim()).encode()):
                raise _in_use(directory, self._owner(self._term))
            self.confirm()
            for old in storage.children(self._where):
                if re.match(r"\d{8}", old) and int(old[:8]) < self._term:
                    storage.remove_file(self._where / old)
        threading.Thread(target=self._keep, daemon=True, name="lease").start()

    def _claim(self) -> dict:
        return {**_me(), "seconds": self._seconds, "thread": threading.get_ident(), "claimed": time.time_ns()}

    def _highest(self) -> int:
        terms = [int(n) for n in storage.children(self._where) if re.fullmatch(r"\d{8}", n)]
        return max(terms, default=0)

    def _owner(self, term: int) -> dict:
        try:
            return dict(json.loads(storage.read(self._where / f"{term:08d}")))
        except (FileNotFoundError, ValueError, TypeError):
            return {}

    def _beat(self, term: int) -> bytes:
        try:
            return storage.read(self._where / f"{term:08d}.beat")
        except FileNotFoundError:
            return b""

    def _lives(self, term: int) -> bool:
        """Whether the owner of a number is still alive."""
        owner, beat, mine = self._owner(term), self._beat(term), _me()
        if beat == b"released":
            return False
        if owner.get("machine") and owner["machine"] == mine["machine"]:
            return _born(owner["pid"]) == owner["born"]
        seconds = float(owner.get("seconds", self._seconds))
        log.warning("%s belongs to %s; waiting up to %.0f s for a sign of life", os.fspath(self._directory),
                    _name(owner), seconds)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds / 20))
            now = self._beat(term)
            if now != beat:
                return now != b"released"
        return False

    def confirm(self) -> None:
        """Renews the lease. Ends the process if another one has taken it; raises StoreError if the store stays away."""
        if self._stop.is_set():
            return
        now = self._highest()
        if now > self._term:
            print(f"error: {_in_use(self._directory, self._owner(now))}", file=sys.stderr, flush=True)
            os._exit(2)
        self._beats += 1
        storage.atomic_write(self._where / f"{self._term:08d}.beat", str(self._beats).encode())

    def _keep(self) -> None:
        while not self._stop.wait(self._seconds / 4):
            try:
                self.confirm()
            except OSError as e:
                log.warning("the lease on %s cannot be renewed: %s", os.fspath(self._directory), e)

    def release(self) -> None:
        """Gives the directory up; more than once is harmless."""
        if not self._stop.is_set():
            self._stop.set()
            try:
                storage.atomic_write(self._where / f"{self._term:08d}.beat", b"released")
            except OSError as e:
                log.warning("the lease on %s ends by itself: %s", os.fspath(self._directory), e)
