"""A worker for the tests: each job says how it misbehaves."""

import os
import signal
import subprocess
import sys
import time

from jaxrl.tasks import workers


def handle(job):
    kind, value = job
    if kind == "echo":
        return value
    if kind == "pid":
        return os.getpid()
    if kind == "print":
        print(value)
        sys.stdout.flush()
        return value
    if kind == "program":
        return subprocess.run([sys.executable, "-c", "print(len(input()))"], capture_output=True).returncode
    if kind == "raise":
        raise ValueError(value)
    if kind == "leave":
        sys.exit(value)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(value)
    if kind == "deaf":  # what a C library that holds the interpreter does
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1e6)
    if kind == "touch and sleep":
        open(value, "w").close()
        time.sleep(1e6)
    if kind == "sleep":
        time.sleep(1e6)
    if kind == "memory":
        return len(bytes(value << 20)) >> 20
    if kind == "modules":
        return sorted(set(value) & set(sys.modules))
    raise AssertionError(kind)


def begin():
    if "broken" in sys.argv:
        raise ImportError("no such thing")
    if "dying" in sys.argv:
        os._exit(7)


if __name__ == "__main__":
    if "stillborn" in sys.argv:
        sys.exit(3)
    workers.serve(handle, memory_mb=400, begin=begin)
