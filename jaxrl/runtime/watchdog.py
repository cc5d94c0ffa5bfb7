"""Ends a run that hangs, and says where it hung."""

from __future__ import annotations

import faulthandler
import json
import os
import tempfile
import threading
import time
from collections.abc import Mapping

from etils import epath

from jaxrl.runtime.signals import EXIT_WATCHDOG
from jaxrl.runtime.storage import atomic_write


class Watchdog:
    """Ends the process with exit code 76 if `beat` is not called for `timeout_seconds`.

    Before that, the stacks of all threads and the last metrics go to stderr and to run_dir/watchdog.txt. Use
    as a context manager around the training loop; beat wherever something was done that cannot repeat for ever
    (a step, a call of the decoder). If the interpreter itself is stuck (native code that never gives the GIL
    back), no Python code can run; faulthandler's own thread then dumps the stacks to stderr after 1.5 times the
    limit and ends the process with 1.
    """

    def __init__(self, run_dir: str | os.PathLike, timeout_seconds: float):
        self._path = epath.Path(run_dir) / "watchdog.txt"
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
        """Seconds until it ends the process, unless `beat` is called before."""
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
            with tempfile.TemporaryFile() as f:
                faulthandler.dump_traceback(f)
                f.seek(0)
                text += f.read().decode()
        except OSError:
            faulthandler.dump_traceback(2)
        os.write(2, text.encode())
        writer = threading.Thread(target=self._store, args=(text,), daemon=True)
        writer.start()
        writer.join(20)  # an object store that does not answer must not keep the process
        os._exit(EXIT_WATCHDOG)

    def _store(self, text: str) -> None:
        try:
            atomic_write(self._path, text)
        except OSError as e:
            os.write(2, f"({self._path}: {e})\n".encode())
