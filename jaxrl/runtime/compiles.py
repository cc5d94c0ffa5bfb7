"""Counting what jax compiles: how many programs, how long, and which, as it happens."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable

from jax import monitoring

REPORTED = 0.5  # seconds: what compiles faster is counted, not reported

_program: contextvars.ContextVar[str] = contextvars.ContextVar("program", default="")


@contextlib.contextmanager
def program(name: str, *sizes):
    """Compiles inside are reported as this program of these sizes, others by the name of their function."""
    token = _program.set(f"{name} {' '.join(map(str, sizes))}".strip())
    try:
        yield
    finally:
        _program.reset(token)


class Compiles:
    """Counts from the moment it is made until `close`. Programs loaded from the cache are not compiled.

    report: called with one line for each compile that took a while, from the thread that compiled.
    """

    def __init__(self, report: Callable[[str], None] | None = None):
        self._report, self._lock, self._loaded = report, threading.Lock(), threading.local()
        self._count, self._seconds = 0, 0.0
        monitoring.register_event_listener(self._event)
        monitoring.register_event_duration_secs_listener(self._duration)

    def close(self) -> None:
        monitoring.unregister_event_listener(self._event)
        monitoring.unregister_event_duration_listener(self._duration)

    def take(self) -> dict[str, float]:
        """Since the last call: perf/compiles, programs; perf/compile_seconds, loading cached ones included."""
        with self._lock:
            out = {"perf/compiles": self._count, "perf/compile_seconds": round(self._seconds, 3)}
            self._count, self._seconds = 0, 0.0
        return out

    def _event(self, event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits":  # comes before the duration, on the same thread
            self._loaded.hit = True

    def _duration(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event != "/jax/core/compile/backend_compile_duration":
            return
        hit, self._loaded.hit = getattr(self._loaded, "hit", False), False
        with self._lock:
            self._count += not hit
            self._seconds += seconds
        if self._report and not hit and seconds >= REPORTED:
            self._report(f"compiled {_program.get() or fun_name} in {seconds:.1f} s")
