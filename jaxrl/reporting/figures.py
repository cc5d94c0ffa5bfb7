"""The figures of a report. Each takes an axes and settings (or one run) and returns False if it has nothing.

Lines are means over the seeds of a setting with a band of the 95 % t interval; single seeds of a noisy
metric are drawn thin behind their running mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxrl.reporting.runs import Run, Setting
from jaxrl.reporting.style import MUTED, PAPER, SERIES, label_ends, smooth


def lines(
    ax, settings: Sequence[Setting], series: Sequence[tuple[str, str]], percent=False, zero=False
) -> bool:
    """Metrics over steps. One setting: all series, labelled. Several: the first series only, by setting."""
    scale = 100 if percent else 1
    series = [(key, label) for key, label in series if any(len(s.band(key)[0]) for s in settings)]
    series = series[:1] if len(settings) > 1 else series
    jobs = [(setting, key, label) for setting in settings for key, label in series]
    ends = []
    for i, (setting, key, label) in enumerate(jobs):
        colour = SERIES[i % len(SERIES)]
        steps, mean, half = setting.band(key)
        if not len(steps):
            continue
        window = max(1, len(steps) // 12)
        if window > 2:
            ax.plot(steps, scale * mean, color=colour, alpha=0.25, linewidth=0.8)
        middle = smooth(mean, window) if window > 2 else mean
        marker = dict(marker="o", markersize=3) if len(steps) < 12 else {}
        ax.plot(steps, scale * middle, color=colour, **marker)
        if half.any():
            half = smooth(half, window)
            ax.fill_between(
                steps, scale * (middle - half), scale * (middle + half), color=colour, alpha=0.16, linewidth=0
            )
        ends.append((steps[-1], scale * middle[-1], setting.label if settings[1:] else label, colour))
    if not ends:
        return False
    _finish(ax, zero)
    if len(ends) > 1:
        label_ends(ax, ends)
    return True


def _finish(ax, zero: bool = False, integer: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=integer, steps=[1, 2, 5, 10]))
    ax.margins(x=0.01)
    if zero:
        ax.set_ylim(0, 1.04 * ax.get_ylim()[1])
    elif np.ptp(ax.get_ylim()) < 1e-9:  # a constant
        ax.set_ylim(ax.get_ylim()[0] - 1, ax.get_ylim()[1] + 1)


def accuracy(ax, settings: Sequence[Setting]) -> bool:
    """Held-out accuracy with its interval over problems (one run) or over seeds; training accuracy behind."""
    if len(settings) == 1 and len(settings[0].runs) == 1:
        run = settings[0].runs[0]
        steps, middle = run.series("eval/accuracy")
        low, high = run.series("eval/accuracy_low")[1], run.series("eval/accuracy_high")[1]
        if len(low) == len(steps) == len(high) and len(steps):
            ax.fill_between(steps, 100 * low, 100 * high, color=SERIES[0], alpha=0.16, linewidth=0)
        found = lines(ax, settings, [("eval/accuracy", "held-out"), ("accuracy", "training")], percent=True)
    else:
        found = lines(ax, settings, [("eval/accuracy", "held-out"), ("accuracy", "training")], percent=True)
    ax.set_ylabel("percent")
    return found


def against_tokens(ax, settings: Sequence[Setting]) -> bool:
    """Held-out accuracy over the tokens generated so far, discarded ones included."""
    ends = []
    for i, setting in enumerate(settings):
        curves = [_tokens_and_accuracy(run) for run in setting.runs]
        curves = [c for c in curves if len(c[0]) > 1]
        if not curves:
            continue
        colour = SERIES[i % len(SERIES)]
        for x, y in curves:
            ax.plot(x, y, color=colour, **(dict(alpha=0.3, linewidth=0.9) if len(curves) > 1 else {}))
        if len(curves) > 1:
            grid = np.linspace(max(c[0][0] for c in curves), min(c[0][-1] for c in curves), 40)
            mean = np.mean([np.interp(grid, *c) for c in curves], axis=0)
            ax.plot(grid, mean, color=colour)
            ends.append((grid[-1], mean[-1], setting.label, colour))
        else:
            ends.append((curves[0][0][-1], curves[0][1][-1], setting.label, colour))
    if not ends:
        return False
    _finish(ax, integer=False)
    ax.set_xlabel("million generated tokens")
    ax.set_ylabel("percent")
    if len(settings) > 1:
        label_ends(ax, ends)
    return True


def _tokens_and_accuracy(run: Run) -> tuple[np.ndarray, np.ndarray]:
    total, out = 0.0, []
    for record in run.records:
        total += record.get("generated_tokens") or 0
        if record.get("eval/accuracy") is not None:
            out.append((total / 1e6, 100 * record["eval/accuracy"]))
    x, y = np.array(out, np.float64).reshape(-1, 2).T
    return x, y


def lengths(ax, settings: Sequence[Setting]) -> bool:
    """Mean length; for one setting with the 10 to 90 % range of its first seed."""
    if len(settings) == 1:
        run = settings[0].runs[0]
        (steps, low), (_, high) = run.series("response_length/p10"), run.series("response_length/p90")
        if len(low) == len(high) and len(low):
            ax.fill_between(steps, low, high, color=SERIES[0], alpha=0.14, linewidth=0)
        series = [
            (f"response_length/{k}", n) for k, n in (("mean", "mean"), ("p50", "median"), ("p90", "90 %"))
        ]
    else:
        series = [("response_length/mean", "")]
    found = lines(ax, settings, series, zero=True)
    ax.set_ylabel("tokens")
    return found


def ridges(ax, run: Run) -> bool:
    """Distribution of response lengths, one ridge per moment of training, first at the back."""
    rows = [(r["step"], r["hist/length"]) for r in run.records if r.get("hist/length")]
    if len(rows) < 2:
        return False
    chosen = [rows[i] for i in sorted(set(np.linspace(0, len(rows) - 1, 13).round().astype(int)))]
    longest = max(edge for _, bins in chosen for edge, _ in bins)
    grid = np.linspace(0, longest * 1.04, 220)
    width = longest / 45
    curves = []
    for _, bins in chosen:
        edges, counts = np.array(bins, np.float64).T
        kernel = np.exp(-0.5 * ((grid[:, None] - edges[None]) / width) ** 2)
        curves.append(kernel @ counts / counts.sum())
    tallest = max(c.max() for c in curves)
    for i, ((step, _), curve) in enumerate(zip(chosen, curves, strict=True)):
        base = len(chosen) - 1 - i
        y = base + 3.4 * curve / tallest
        ax.fill_between(grid, base, y, color=PAPER, linewidth=0, zorder=2 * i)
        shade = 0.10 + 0.35 * i / len(chosen)
        ax.fill_between(grid, base, y, color=SERIES[0], alpha=shade, linewidth=0, zorder=2 * i)
        ax.plot(grid, y, color=SERIES[0], linewidth=1.0, zorder=2 * i + 1)
        ax.text(-0.012 * longest, base, f"step {step:g}", ha="right", va="center", color=MUTED, fontsize=7.5)
    ax.set_yticks([])
    ax.grid(False)
    ax.set_xlim(0, longest * 1.04)
    ax.set_xlabel("response length, tokens")
    return True


def selection_scatter(ax, run: Run) -> bool:
    """Every sampled prompt at its mean response length: kept or dropped."""
    points: dict[str, list] = {"dropped": [], "kept": []}
    for record in run.records:
        for kind, where in points.items():
            lengths = record.get(f"selection/{kind}_lengths") or []
            where += [(record["step"], v) for v in lengths if v is not None]
    if not points["kept"] or not points["dropped"]:
        return False
    rng = np.random.default_rng(0)
    for kind, colour, size in (("dropped", MUTED, 3), ("kept", SERIES[0], 5)):
        x, y = np.array(points[kind]).T
        shown = rng.choice(len(x), min(len(x), 1200), replace=False)
        x = x[shown] + rng.uniform(-0.35, 0.35, len(shown))
        ax.scatter(x, y[shown], s=size, color=colour, linewidth=0, alpha=0.5)
    _finish(ax, zero=True)
    ax.set_ylabel("mean length of a prompt's responses")
    middle = {kind: (points[kind][-1][0] + 0.4, np.median([v for _, v in points[kind][-200:]])) for kind in points}
    label_ends(ax, [(*middle["dropped"], "dropped", MUTED), (*middle["kept"], "kept", SERIES[0])])
    return True


def selection_reasons(ax, run: Run) -> bool:
    """Share of sampled prompts by what became of them."""
    keys = sorted({k for r in run.records for k in r if k.startswith("selection/dropped/")})
    reasons = list(dict.fromkeys(k.rpartition("/")[2] for k in keys))  # whichever rule of a chain gave it
    rows = [r for r in run.records if r.get("selection/kept_lengths") is not None]
    if not reasons or len(rows) < 2:
        return False
    steps = [r["step"] for r in rows]
    counts = [[len(r["selection/kept_lengths"]) for r in rows]]
    for reason in reasons:
        same = [k for k in keys if k.endswith(f"/{reason}")]
        counts.append([sum(r.get(k) or 0 for k in same) for r in rows])
    return _stack(ax, steps, counts, ["kept", *(reason.replace("_", " ") for reason in reasons)])


def time_split(ax, run: Run) -> bool:
    """Where the seconds of a step go."""
    parts = [("time/rollout", "rollout"), ("time/grade", "grading"), ("time/update", "update")]
    rows = [r for r in run.records if r.get("time/step")]
    parts = [(key, name) for key, name in parts if any(r.get(key) for r in rows)]
    if len(rows) < 2 or not parts:
        return False
    counts = [[r.get(key) or 0 for r in rows] for key, _ in parts]
    rest = [max(r["time/step"] - sum(r.get(key) or 0 for key, _ in parts), 0) for r in rows]
    return _stack(ax, [r["step"] for r in rows], [*counts, rest], [*(name for _, name in parts), "other"])


def _stack(ax, steps, counts, names) -> bool:
    """Stacked shares in percent, named at the right end. Running medians: a compilation is not a trend."""
    counts = np.array(counts, np.float64)
    window = max(1, len(steps) // 12)
    share = np.array([smooth(row, window, np.median) for row in counts])
    share = 100 * share / np.maximum(share.sum(axis=0), 1e-12)
    colours = [SERIES[i % len(SERIES)] for i in range(len(names))]
    ax.stackplot(steps, share, colors=colours, alpha=0.72, linewidth=0.8, edgecolor=PAPER)
    ax.set_ylim(0, 100)
    _finish(ax)
    ax.set_ylabel("percent")
    tops = np.cumsum(share[:, -1])
    ends = [
        (steps[-1], top - part / 2, name, colour)
        for top, part, name, colour in zip(tops, share[:, -1], names, colours, strict=True)
        if part >= 1
    ]
    label_ends(ax, ends)
    return True


def _sweeps(settings: Sequence[Setting]) -> list[tuple[str, list[dict]]]:
    """(label, results by budget) of every data set that was swept, of the first seed's newest checkpoint."""
    out = []
    for setting in settings:
        found: dict[str, dict[int, dict]] = {}
        for row in sorted(setting.runs[0].budgets, key=lambda r: r.get("step") or 0):
            found.setdefault(row.get("data", ""), {})[row["budget"]] = row
        for data, rows in found.items():
            parts = [setting.label] if len(settings) > 1 else []
            parts += [data] if len(found) > 1 else []
            out.append((" ".join(parts), [rows[b] for b in sorted(rows)]))
    return out


def budgets(ax, settings: Sequence[Setting]) -> bool:
    """Length obeyed: mean tokens against the budget asked for; the dotted line is perfect obedience."""
    sweeps = _sweeps(settings)
    if not sweeps:
        return False
    top = max(r["budget"] for _, rows in sweeps for r in rows)
    ax.plot([0, top], [0, top], color=MUTED, linestyle=(0, (1, 2)), linewidth=1)
    ends = []
    for i, (label, rows) in enumerate(sweeps):
        x, y = [r["budget"] for r in rows], [r["mean_tokens"] for r in rows]
        ax.plot(x, y, color=SERIES[i % len(SERIES)], marker="o", markersize=4)
        ends.append((x[-1], y[-1], label, SERIES[i % len(SERIES)]))
    _finish(ax, zero=True)
    ax.set_xlabel("budget, tokens")
    ax.set_ylabel("mean tokens")
    if len(ends) > 1:
        label_ends(ax, ends)
    return True


def accuracy_by_tokens(ax, settings: Sequence[Setting]) -> bool:
    """Accuracy against the tokens really spent, one point per budget, with 95 % intervals."""
    ends = []
    for i, (label, rows) in enumerate(_sweeps(settings)):
        rows = sorted(rows, key=lambda r: r["mean_tokens"])
        colour = SERIES[i % len(SERIES)]
        x = np.array([r["mean_tokens"] for r in rows])
        keys = ("accuracy", "accuracy_low", "accuracy_high")
        y, low, high = (100 * np.array([r[k] for r in rows]) for k in keys)
        ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        ax.plot(x, y, color=colour, marker="o", markersize=4)
        ends.append((x[-1], y[-1], label, colour))
    if not ends:
        return False
    _finish(ax)
    ax.set_xlabel("mean tokens")
    ax.set_ylabel("percent")
    if len(ends) > 1:
        label_ends(ax, ends)
    return True


def metric(*series: tuple[str, str], unit: str = "", **options) -> Callable:
    def draw(ax, settings):
        found = lines(ax, settings, series, **options)
        ax.set_ylabel(unit)
        return found

    return draw
