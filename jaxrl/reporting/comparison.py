"""The figures of a study: means over seeds with 95 % intervals, as SVG files for a page."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from jaxrl.reporting.figures import against_tokens
from jaxrl.reporting.runs import Setting
from jaxrl.reporting.style import MUTED, PAPER, SERIES, drawing, label_ends, line_style


def save(figure, path: pathlib.Path) -> None:
    """An SVG in the light colours, the same bytes for the same figure."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw(result: dict, curves: Sequence[Setting], sweeps: dict[str, dict], stem: pathlib.Path) -> list[pathlib.Path]:
    """Writes the figures of a study as STEM.svg, STEM_curves.svg, STEM_budgets_I.svg; returns what it wrote.

    result: study.compare of one metric. curves: settings to draw over generated tokens. sweeps: study.read_sweeps.
    """
    out = []
    jobs = [("", forest, result, 0.9 + 0.21 * len(result["rows"]))] if result["rows"] else []
    jobs += [("_curves", against_tokens, curves, 3.4)] if curves else []
    for i, data in enumerate(dict.fromkeys(d for found in sweeps.values() for d in found)):
        chosen = {label: found[data]["budgets"] for label, found in sweeps.items() if data in found}
        jobs += [(f"_budgets_{i}", obedience, chosen, 3.4), (f"_accuracy_{i}", accuracy, chosen, 3.4)]
    for suffix, drawn, content, height in jobs:
        with drawing(6.4, height) as (figure, ax):
            drawn(ax, content)
            out.append(stem.with_name(f"{stem.name}{suffix}.svg"))
            save(figure, out[-1])
    return out


def forest(ax, result: dict) -> None:
    """One line per method: its difference to the baseline (the method without a difference), or its mean if there is no
    baseline; filled at equal updates, hollow at equal tokens. Differences are paired by seed, because seeds differ more
    than methods do. Methods whose labels end in the same word share a colour."""
    rows = [row for row in result["rows"] if row["difference_updates"]]
    prefix, base = ("difference_", next(r["method"] for r in result["rows"] if r not in rows)) if rows else ("", "")
    rows = rows or result["rows"]
    groups = list(dict.fromkeys(row["method"].split()[-1] for row in rows))
    for i, row in enumerate(rows):
        colour = SERIES[groups.index(row["method"].split()[-1]) % len(SERIES)]
        for shift, name, face in ((-0.14, "updates", colour), (0.14, "tokens", PAPER)):
            mean, half = (100 * np.nan_to_num(value) for value in row[prefix + name])
            ax.plot([mean - half, mean + half], [i + shift] * 2, color=colour, linewidth=1.1, alpha=0.75)
            ax.plot(mean, i + shift, marker="o", markersize=4.5, color=colour, markerfacecolor=face)
    ax.set_yticks(range(len(rows)), [row["method"] for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    what = result["metric"].removeprefix("eval/")
    if base:
        ax.axvline(0, color=MUTED, linewidth=1)
        what = f"{what} minus that of {base}"
    ax.set_xlabel(f"{what}, points:  ● equal updates   ○ equal generated tokens")


def obedience(ax, sweeps: dict[str, dict]) -> None:
    """Mean tokens against the budget; the dotted line is perfect obedience."""
    budgets = sorted({b for found in sweeps.values() for b in found})
    ax.plot(budgets, budgets, color=MUTED, linestyle=(0, (1, 2)), linewidth=1)
    _lines(ax, sweeps, lambda budget, at: (budget, at["mean_tokens"][0], at["mean_tokens"][1]))
    ax.set_xlabel("budget, tokens")
    ax.set_ylabel("mean tokens")


def accuracy(ax, sweeps: dict[str, dict]) -> None:
    """Accuracy against the tokens really spent, one point per budget."""
    _lines(ax, sweeps, lambda _, at: (at["mean_tokens"][0], 100 * at["accuracy"][0], 100 * at["accuracy"][1]))
    ax.set_xlabel("mean tokens")
    ax.set_ylabel("accuracy, percent")


def _lines(ax, sweeps, point) -> None:
    ends = []
    for i, (label, found) in enumerate(sweeps.items()):
        x, y, half = np.array([point(budget, found[budget]) for budget in sorted(found)]).T
        half, style = np.nan_to_num(half), line_style(i)
        ax.errorbar(x, y, yerr=half, marker="o", markersize=3.5, elinewidth=0.9, **style)
        last = int(np.argmax(x))
        ends.append((x[last], y[last], label, style["color"]))
    label_ends(ax, ends)
