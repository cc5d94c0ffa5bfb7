"""Stopping on request, and the watchdog: exit codes of real processes that get real signals."""

import faulthandler
import os
import signal
import subprocess
import sys

import pytest

from jaxrl.runtime import signals, watchdog

PRELUDE = """
import ctypes, os, sys, threading
from jaxrl.runtime.signals import StopRequest
from jaxrl.runtime.watchdog import Watchdog

def stuck_in_native_code():
    # A mutex that is locked twice: signals do not wake it, and the interpreter runs no handler meanwhile.
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_init(mutex, None)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
"""


def start(code, *args):
    child = subprocess.Popen([sys.executable, "-c", PRELUDE + code, *map(str, args)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert child.stdout.readline() == "ready\n", child.stderr.read()
    return child


def end(child):
    """(stdout, stderr) of a child that ends by itself; its standard input is closed."""
    try:
        return child.communicate(timeout=60)
    finally:
        child.kill()


LOOP = """
with StopRequest() as stop:
    print("ready", flush=True)
    step = 0
    while not stop.agreed(step):
        stop.received.wait(0.01)
        step += 1
    print(stop.requested)
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_first_signal_is_a_request(number, code):
    child = start(LOOP)
    child.send_signal(number)
    out, err = end(child)
    assert (out, child.returncode) == (f"{number.name}\n", code)
    assert f"{number.name}: saving after this step" in err


def test_second_interrupt_leaves_at_once_from_native_code():
    child = start("with StopRequest(): stuck_in_native_code()")
    child.send_signal(signal.SIGINT)
    assert child.stderr.readline().startswith("SIGINT: saving after this step (once more")
    child.send_signal(signal.SIGINT)
    assert "second SIGINT" in end(child)[1] and child.returncode == 130


def test_an_interrupt_after_a_termination_is_the_first_of_its_kind():
    child = start("""
with StopRequest() as stop:
    print("ready", flush=True)
    sys.stdin.readline()
    sys.exit(stop.exit_code)
""")
    child.send_signal(signal.SIGTERM)
    assert child.stderr.readline().startswith("SIGTERM: saving")
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=0.3)
    assert "second" not in end(child)[1] and child.returncode == 75


def test_a_step_that_never_ends_is_left_after_the_grace_time():
    child = start("with StopRequest(grace_seconds=0.05): stuck_in_native_code()")
    child.send_signal(signal.SIGTERM)
    assert "did not end within 0.05 s" in end(child)[1] and child.returncode == 75


def test_handlers_are_put_back():
    child = start("""
before = signal.getsignal(signal.SIGTERM)
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    stop.received.wait()
assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
""".replace("before", "import signal\nbefore", 1))
    assert end(child) and child.returncode == -signal.SIGTERM


def test_watchdog_shows_where_it_hung(tmp_path):
    child = start("""
def stuck_here():
    print("ready", flush=True)
    threading.Event().wait()

with Watchdog(sys.argv[1], 0.2) as dog:
    dog.beat(7, {"loss": 0.25})
    stuck_here()
""", tmp_path)
    err = end(child)[1]
    assert child.returncode == 76
    for text in (err, (tmp_path / "watchdog.txt").read_text()):
        assert "no progress for 0.2 s after step 7; exit code 76" in text
        assert '"loss": 0.25' in text and "in stuck_here" in text


def test_watchdog_without_a_writable_directory_still_bites(tmp_path):
    child = start("with Watchdog(sys.argv[1], 0.1): stuck_in_native_code()", tmp_path / "gone")
    err = end(child)[1]
    assert child.returncode == 76 and "stuck_in_native_code" in err


def test_native_code_that_keeps_the_interpreter_is_ended_too(tmp_path):
    child = start("""
with Watchdog(sys.argv[1], 0.2):
    print("ready", flush=True)
    ctypes.PyDLL(None).pause()  # PyDLL: does not give the GIL back
""", tmp_path)
    err = end(child)[1]
    assert child.returncode == 1 and "Timeout (" in err and "<string>" in err


def test_a_beat_winds_the_watchdog_up(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = watchdog.Watchdog(tmp_path, 100.0)
    now[0] = 70.0
    assert dog.remaining() == 30.0
    dog.beat(1)
    faulthandler.cancel_dump_traceback_later()
    now[0] = 80.0
    assert dog.remaining() == 90.0
    dog.beat(2, {"loss": 0.5})
    now[0] = 90.0
    dog.beat()
    faulthandler.cancel_dump_traceback_later()
    assert dog._last == (90.0, 2, {"loss": 0.5})  # what is shown stays


def test_a_preemption_notice_stops_all_processes_after_the_same_step(monkeypatch):
    seen = []
    monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.distributed, "allgather", lambda value: [value, value])
    monkeypatch.setattr(signals.multihost_utils, "reached_preemption_sync_point",
                        lambda step: seen.append(step) or step == 7)  # fmt: skip
    stop = signals.StopRequest()
    assert [stop.agreed(step) for step in (6, 7)] == [False, True] and seen == [6, 7]
    assert (stop.requested, stop.exit_code) == ("preemption notice", 75)


def test_no_preemption_service_is_no_reason_to_stop(monkeypatch):
    def off(step):
        raise RuntimeError("switched off")

    monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.distributed, "allgather", lambda value: [value, value])
    monkeypatch.setattr(signals.multihost_utils, "reached_preemption_sync_point", off)
    assert not signals.StopRequest().agreed(1)


def test_watchdog_leaves_a_run_alone_that_makes_progress(tmp_path):
    child = start("""
with Watchdog(sys.argv[1], 60) as dog:
    for step in range(1000):
        dog.beat(step, {})
    dog.beat(step)
print("ready", flush=True)
""", tmp_path)
    assert end(child) and child.returncode == 0 and os.listdir(tmp_path) == []
