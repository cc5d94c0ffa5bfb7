"""Stopping on request: the training loop asks between steps, saves and leaves with an exit code that says
why.

    75   SIGTERM or a preemption notice: the state was saved, start the same command again (EX_TEMPFAIL)
    130  SIGINT (Ctrl-C): the state was saved; a second SIGINT leaves at once, without saving
    74   the last save failed (a full disk, a store that stays away): make room, start the same command again
    76   the watchdog saw no progress (watchdog.py): start the same command again
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

from jaxrl.runtime import distributed

EXIT_UNSAVED = 74
EXIT_PREEMPTED = 75
EXIT_WATCHDOG = 76
EXIT_INTERRUPTED = 130


class StopRequest:
    """Context manager that turns SIGTERM and SIGINT into a flag. Enter it in the main thread.

    grace_seconds: the process leaves by itself this long after the first signal, saved or not, so that a step
        that never ends cannot keep the machine (the last checkpoint is whole in any case).
    requested: None, "SIGTERM", "SIGINT" or "preemption notice". received: set when a signal has arrived.

    Signals are received through a pipe by a thread of their own: Python runs its handlers only between two
    byte codes of the main thread, which may sit in compiled code for minutes.
    """

    def __init__(self, grace_seconds: float = 300.0):
        self.grace_seconds = grace_seconds
        self.requested: str | None = None
        self.received = threading.Event()
        self._timer: threading.Timer | None = None

    def __enter__(self) -> StopRequest:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
        self._thread = threading.Thread(target=self._listen, daemon=True, name="signals")
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        for s, handler in self._old.items():
            # None: the handler was not set from Python (jax.distributed sets one) and cannot be put back.
            signal.signal(s, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
        if self._timer is not None:
            self._timer.cancel()

    def _listen(self) -> None:
        interrupts = 0
        while data := os.read(self._read, 1):
            number = data[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            interrupts += number == signal.SIGINT
            if interrupts == 2:
                _leave(EXIT_INTERRUPTED, "second SIGINT: leaving at once, the current step is lost")
            if self.requested is None:
                self._first_request(signal.Signals(number).name)

    def _first_request(self, name: str) -> None:
        self.requested = name
        again = " (once more to leave at once)" if name == "SIGINT" else ""
        print(f"{name}: saving after this step{again}", file=sys.stderr, flush=True)
        late = f"{name}: the step did not end within {self.grace_seconds:g} s, leaving unsaved"
        self._timer = threading.Timer(self.grace_seconds, _leave, (self.exit_code, late))
        self._timer.daemon = True
        self._timer.start()
        self.received.set()

    @property
    def exit_code(self) -> int:
        """What to pass to sys.exit after the save; 0 if nothing was requested."""
        return {None: 0, "SIGINT": EXIT_INTERRUPTED}.get(self.requested, EXIT_PREEMPTED)

    def agreed(self, step: int) -> bool:
        """True on all processes, at the same step, once any of them was asked to stop. Call it after every
        step."""
        reasons = [r for r in distributed.allgather(self.requested) if r]
        notice = jax.process_count() > 1 and _preemption_notice(step)
        if (reasons or notice) and self.requested is None:
            self.requested = reasons[0] if reasons else "preemption notice"
        return bool(reasons or notice)


def _preemption_notice(step: int) -> bool:
    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:  # the service is switched off (jax_enable_preemption_service)
        return False


def _leave(code: int, why: str) -> None:
    print(why, file=sys.stderr, flush=True)
    os._exit(code)
