"""A run that hangs burns money: end it, and say where it hung."""

from __future__ import annotations

import faulthandler
import json
import os
import pathlib
import threading
import time
from collections.abc import Mapping

from jaxrl.runtime.storage import atomic_write
from jaxrl.runtime.signals import EXIT_WATCHDOG


class Watchdog:
    """Ends the process with exit code 76 if `beat` is not called for `timeout_seconds`.

    Before that, the stacks of all threads and the last metrics go to stderr and to run_dir/watchdog.txt. Use
    as a context manager around the training loop; beat wherever something was done that cannot repeat for ever
    (a step, a call of the decoder). If the interpreter itself is stuck (native code that never gives the GIL
    back), no Python code can run; faulthandler's own thread then dumps the stacks to stderr after 1.5 times the
    limit and ends the process with 1.
    """

    def __init__(self, run_dir: str | os.PathLike, timeout_seconds: float):
        self._path = pathlib.Path(run_dir) / "watchdog.txt"
        self._timeout = timeout_seconds
        self._stop = threading.Event()
        self._last = (time.monotonic(), 0, {})

    def __enter__(self) -> Watchdog:
        self.beat()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int | None = None, metrics: Mapping | None = None) -> None:
        """Progress was made. step, metrics: the last finished step and its record, shown if this was the last
        beat (None keeps what was given before)."""
        _, last_step, last_metrics = self._last
        self._last = (time.monotonic(), last_step if step is None else step,
                      last_metrics if metrics is None else dict(metrics))
        faulthandler.dump_traceback_later(1.5 * self._timeout, exit=True, file=2)

    def remaining(self) -> float:
        """Seconds until it bites, unless there is a beat before."""
        return self._last[0] + self._timeout - time.monotonic()

    def _watch(self) -> None:
        while True:
            if self.remaining() <= 0:
                self._bite()
            if self._stop.wait(self.remaining()):
                return

    def _bite(self) -> None:
        _, step, metrics = self._last
        text = (f"watchdog: no progress for {self._timeout:g} s after step {step}; exit code "
                f"{EXIT_WATCHDOG}\n"
                f"last metrics: {json.dumps(metrics, default=str)}\n")
        try:
            atomic_write(self._path, text)
            with open(self._path, "a") as f:
                faulthandler.dump_traceback(f)
            text += self._path.read_text()[len(text):]
        except OSError as e:
            text += f"({self._path}: {e})\n"
            faulthandler.dump_traceback(2)
        finally:
            os.write(2, text.encode())
            os._exit(EXIT_WATCHDOG)
