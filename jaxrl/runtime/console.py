"""What a person sees of a run: a live display on a terminal, one plain line a step everywhere else."""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

TIMES = ("rollout", "grade", "update")  # the parts of a step that are shown, as time/<name>


class Console:
    """Progress of a run of `total_steps`. Use as a context manager.

    stream: where to write, default stdout. live: None decides by itself (a terminal, NO_COLOR unset, TERM not
    "dumb" and rich importable). enabled: False in every process but 0.
    """

    def __init__(self, total_steps: int, start_step: int = 0, *, stream: TextIO | None = None,
                 live: bool | None = None, enabled: bool = True):
        self._total, self._start = total_steps, start_step
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._history: list[Mapping[str, Any]] = []
        self._live = None
        if enabled and (can_be_live(self._stream) if live is None else live):
            from rich.console import Console as RichConsole
            from rich.live import Live

            self._rich = RichConsole(file=self._stream)
            self._live = Live(console=self._rich, auto_refresh=False, transient=False)

    def __enter__(self) -> Console:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, record: Mapping[str, Any]) -> None:
        """Shows the record of a finished step (names of metrics.jsonl; whatever is missing is left out)."""
        if not self._enabled:
            return
        self._history = [*self._history[-199:], record]
        eta = eta_seconds(self._history, self._total)
        if self._live is None:
            print(step_line(record, self._total, eta), file=self._stream, flush=True)
        else:
            self._live.update(_panel(self._history, self._start, self._total, eta), refresh=True)

    def note(self, text: str) -> None:
        """Prints a line that stays, above the live display; nothing for ""."""
        if self._enabled and text:
            if self._live is not None:
                self._rich.print(text, markup=False, highlight=False)
            else:
                print(text, file=self._stream, flush=True)


def can_be_live(stream: TextIO) -> bool:
    """Whether a moving display makes sense on this stream."""
    if not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def eta_seconds(history: Sequence[Mapping[str, Any]], total_steps: int) -> float | None:
    """Seconds to the end: median of the last 20 time/step times the steps that are left; None if unknown."""
    times = [r["time/step"] for r in history[-20:] if r.get("time/step") is not None]
    return statistics.median(times) * max(0, total_steps - history[-1]["step"]) if times else None


def time_split(record: Mapping[str, Any]) -> dict[str, float]:
    """Share of rollout, grade and update in time/step (their sum if that is missing), those known and not
    negligible."""
    parts = {k: record[f"time/{k}"] for k in TIMES if record.get(f"time/{k}") is not None}
    whole = record.get("time/step") or sum(parts.values())
    return {k: v / whole for k, v in parts.items()} if whole else {}


def step_line(record: Mapping[str, Any], total_steps: int, eta: float | None) -> str:
    """One plain line: `step  12/100  reward 0.531  accuracy 0.612  length 9.8  31.2k tok/s  rollout 61%
    ...`."""
    parts = [f"step {record['step']:>{len(str(total_steps))}}/{total_steps}", *_numbers(record)]
    if split := time_split(record):
        parts.append(" ".join(f"{k} {v:.0%}" for k, v in split.items()))
    if record.get("time/step") is not None:
        parts.append(f"{record['time/step']:.2f} s/step")
    if eta is not None:
        parts.append(f"ETA {duration(eta)}")
    return "  ".join(parts)


def _numbers(record: Mapping[str, Any]) -> list[str]:
    shown = [("reward", "reward/mean", "{:.3f}"), ("accuracy", "accuracy", "{:.3f}"),
             ("length", "response_length/mean", "{:.1f}"), ("eval", "eval/accuracy", "{:.3f}")]
    out = [f"{name} {fmt.format(record[key])}" for name, key, fmt in shown if record.get(key) is not None]
    if record.get("tokens_per_second") is not None:
        out.append(f"{_short(record['tokens_per_second'])} tok/s")
    return out


def _short(x: float) -> str:
    return next((f"{x / n:.1f}{unit}" for n, unit in ((1e6, "M"), (1e3, "k")) if x >= n), f"{x:.0f}")


def duration(seconds: float) -> str:
    """`42s`, `6m10s`, `3h05m`."""
    s = int(seconds + 0.5)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last `width` finite values as eight heights of block, from their least to their greatest."""
    values = [v for v in values if v is not None and math.isfinite(v)][-width:]
    low, high = min(values, default=0.0), max(values, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (v - low) / (high - low) + 0.5) if high > low else 0] for v in values)


def _panel(history, start, total, eta):
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    record = history[-1]
    top = Table.grid(padding=(0, 2), expand=True)
    top.add_column(no_wrap=True)
    top.add_column(ratio=1)
    top.add_column(no_wrap=True)
    top.add_row(Text(f"step {record['step']}/{total}", style="bold"),
                ProgressBar(total=max(1, total - start), completed=record["step"] - start),
                Text(f"ETA {duration(eta)}" if eta is not None else ""))
    split = time_split(record)
    colours = dict(zip(TIMES, ("cyan", "yellow", "magenta"), strict=True))
    bar = Text.assemble(*[("━" * round(30 * v), colours[k]) for k, v in split.items()], "  ",
                        *[(f"{k} {v:.0%}  ", colours[k]) for k, v in split.items()],
                        f"{record['time/step']:.2f} s/step" if record.get("time/step") else "")
    rows = [top, Text("  ".join(_numbers(record))), bar]
    trends = (("reward", "reward/mean"), ("accuracy", "accuracy"), ("length", "response_length/mean"))
    for name, key in trends:
        if line := sparkline([r.get(key) for r in history]):
            rows.append(Text.assemble((f"{name:<9}", "dim"), (line, "green")))
    return Group(*rows)


def before_after(rows: Sequence[tuple[str, float | None, float | None]],
                 stream: TextIO | None = None) -> None:
    """Prints the closing table, one row a quantity: (name, before, after). None is shown as a dash."""
    def cell(x):
        return "-" if x is None else f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"

    stream = stream or sys.stdout
    table = [("", "before", "after", "change")]
    for name, a, b in rows:
        change = "" if a is None or b is None else f"{'+' if b >= a else '-'}{cell(abs(b - a))}"
        table.append((name, cell(a), cell(b), change))
    widths = [max(len(r[i]) for r in table) for i in range(4)]
    for i, row in enumerate(table):
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip(), file=stream)
        if i == 0:
            print("  ".join("-" * w for w in widths), file=stream)
