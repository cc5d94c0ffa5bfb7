"""Worker processes that can be killed: for grading code that may hang, crash or eat memory.

A pool member is a *supervisor* process, started with `python -m MODULE` (it never imports the caller's
__main__, nor jax), which loads the slow libraries once and then forks the *worker* that does the jobs. The
parent kills a worker that exceeds its time with SIGKILL; the supervisor forks the next one in milliseconds,
slower and slower if workers keep dying young. Messages are JSON, one line each, over the standard pipes:

    worker -> {"ready": pid}    parent -> {"id": 7, "limit": 5.0, "job": ...}    worker -> {"id": 7, "value": ...}

A "ready" where an answer was due means that the worker died. Workers end by themselves: on end of file if
they are idle, by an alarm that no library can mask if the parent is gone and the job never returns.
"""

from __future__ import annotations

import json
import os
import pathlib
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxrl.errors import UserError

START_TIMEOUT = 120.0  # seconds for a supervisor to import its libraries on a busy machine
_GRACE = 2  # seconds after the limit at which the worker's own alarm ends it
_MAX_DEATHS = 6  # workers in a row that live less than a second, before the supervisor gives up


class _Dead(Exception):
    """The worker ended before it answered."""


class _Worker:
    """The parent's side of one supervisor; used by one thread at a time."""

    def __init__(self, command: Sequence[str]):
        self.command = command
        self.process: subprocess.Popen | None = None
        self.pid = 0  # of the forked worker; 0 until it is ready
        self.count, self.failures, self.buffer = 0, 0, b""

    def run(self, job: Any, timeout: float) -> tuple[str, Any]:
        """("ok", value), ("error", message), ("timeout", None) or ("crashed", None). Takes at most `timeout`
        seconds once a worker is ready. Raises UserError if none can be started."""
        self._start()
        self.count += 1
        line = json.dumps({"id": self.count, "limit": timeout, "job": job}).encode() + b"\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            deadline = time.monotonic() + timeout
            while True:
                message = self._read(deadline)
                if message is None:
                    _kill(self.pid)
                    self.pid = 0
                    return "timeout", None
                if message.get("id") == self.count:
                    return ("error", message["error"]) if "error" in message else ("ok", message["value"])
                if "ready" in message:
                    self.pid = message["ready"]
                    return "crashed", None
        except (_Dead, OSError):
            self.close()
            return "crashed", None

    def _start(self) -> None:
        """Waits for a ready worker; starts the supervisor first if there is none."""
        while not self.pid:
            if self.process is None:
                time.sleep(min(2.0, 0.1 * 2**self.failures) if self.failures else 0)
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment()
                )
            try:
                message = self._read(time.monotonic() + START_TIMEOUT)
            except (_Dead, OSError):
                message = {}
            if message is None or "fatal" in message or self.failures >= 3:
                self.close()
                reason = (message or {}).get("fatal", "it does not start")
                raise UserError(f"worker {' '.join(self.command[2:])}: {reason}")
            if not message:
                self.failures += 1
                self.close()
            elif "ready" in message:  # anything else is the late answer of a worker that was killed
                self.pid, self.failures = message["ready"], 0

    def _read(self, deadline: float) -> dict | None:
        """The next message, or None when the time is over. Raises _Dead at end of file."""
        stdout = self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            data = os.read(stdout, 65536)
            if not data:
                raise _Dead
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        try:
            message = json.loads(line)
        except ValueError:
            return {}
        return message if isinstance(message, dict) else {}

    def close(self) -> None:
        """Ends the supervisor and its worker."""
        process, self.process, self.buffer = self.process, None, b""
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except OSError:
                pass
        _kill(process.pid)
        _kill(self.pid)
        process.wait()
        self.pid = 0


def _kill(pid: int) -> None:
    if pid:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _environment() -> dict[str, str]:
    """The worker's environment: this package importable, no accelerator, one thread."""
    root = str(pathlib.Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}


class Pool:
    """Some workers of one kind; `map` may be called from any thread. Processes start when first needed.

    module: run as `python -m module *args`; it calls `serve`. timeout: wall-clock seconds per job.
    """

    def __init__(self, module: str, args: Sequence[str], workers: int, timeout: float):
        if workers < 1 or timeout <= 0:
            raise UserError(f"workers {workers!r} and timeout {timeout!r} must be positive")
        self.timeout = timeout
        command = [sys.executable, "-m", module, *args]
        self._members = [_Worker(command) for _ in range(workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for member in reversed(self._members):
            self._idle.put(member)
        self._threads = ThreadPoolExecutor(workers, "grader")

    def map(self, jobs: Sequence[Any], within: float | None = None) -> list[tuple[str, Any]]:
        """One (status, value) per job (see _Worker.run), in order. Jobs are JSON values.

        within: seconds for all of them; jobs that have not started by then are ("timeout", None).
        """
        deadline = None if within is None else time.monotonic() + within

        def one(job: Any) -> tuple[str, Any]:
            left = self.timeout if deadline is None else min(self.timeout, deadline - time.monotonic())
            if left <= 0:
                return "timeout", None
            worker = self._idle.get()
            try:
                return worker.run(job, left)
            finally:
                self._idle.put(worker)

        return list(self._threads.map(one, jobs))

    def close(self) -> None:
        self._threads.shutdown()
        for member in self._members:
            member.close()


def serve(handle: Callable[[Any], Any], memory_mb: int, begin: Callable[[], None] | None = None) -> None:
    """A supervisor's main: forks workers that answer jobs with handle(job), until the parent closes the pipe.

    memory_mb: address-space limit of a worker, 0 for none. begin: run in each new worker before it says that it is
    ready. Exceptions of `handle` are answered as {"error": "Type: message"}; whatever it prints goes to standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    deaths = 0
    while True:
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _work(handle, memory_mb, begin)
        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            return
        deaths = deaths + 1 if time.monotonic() - started < 1.0 else 0
        if deaths == _MAX_DEATHS:
            sys.exit(1)
        time.sleep(min(2.0, 0.05 * 2**deaths) if deaths > 1 else 0)


def _work(handle: Callable[[Any], Any], memory_mb: int, begin: Callable[[], None] | None) -> None:
    """Answers jobs; never returns."""
    code = 1
    try:
        pipe, jobs = os.dup(1), os.fdopen(os.dup(0), "rb")
        os.dup2(2, 1)  # prints must not mix with answers
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nor may a program that is started read the jobs
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # default action: the kernel ends the process
        limit_memory(memory_mb)
        if begin:
            begin()
        _say(pipe, {"ready": os.getpid()})
        for line in jobs:
            try:
                message = json.loads(line)
            except ValueError:  # the rest of a line of which a killed worker had read the beginning
                continue
            signal.alarm(int(message["limit"]) + _GRACE)
            try:
                answer = {"value": handle(message["job"])}
            except BaseException as e:  # sys.exit() in a reward function, too
                answer = {"error": f"{type(e).__name__}: {e}"[:1000]}
            signal.alarm(0)
            _say(pipe, {"id": message["id"], **answer})
        code = 0
    except BaseException as e:
        _say(pipe, {"fatal": f"{type(e).__name__}: {e}"[:1000]})
    finally:
        os._exit(code)


def _say(pipe: int, message: dict) -> None:
    os.write(pipe, json.dumps(message).encode() + b"\n")  # below PIPE_BUF: whole or not at all


def limit_memory(memory_mb: int) -> None:
    """Caps this process's address space, where the system can; 0 leaves it as it is."""
    import resource

    if not memory_mb:
        return

    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    except (ValueError, OSError):
        pass
