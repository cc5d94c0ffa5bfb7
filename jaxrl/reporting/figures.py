"""The figures of a report. Each takes an axes and settings (or one run) and returns False if there is nothing to draw.

Lines are means over the seeds of a setting with a band of the 95 % t interval; single seeds of a noisy
metric are drawn thin behind their running mean.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxrl.reporting.runs import Run, Setting, majority, t_half_width
from jaxrl.reporting.style import MUTED, PAPER, SERIES, label_ends, line_style, smooth

# A fate (kept, or why dropped) or a part of a step has the same colour in every figure and every run.
FATES = dict(kept=0, all_correct=1, all_wrong=5, all_equal=1, middle=4, longest=3, shortest=2)
FATES |= dict(middle_accuracy=4, top_accuracy=3)
PARTS = dict(rollout=0, grading=1, update=2, other=3)


def lines(
    ax, settings: Sequence[Setting], series: Sequence[tuple[str, str]], *, percent=False, zero=False, log=False
) -> bool:
    """Metrics over steps. One setting: all series, labelled. Several: the first series only, by setting."""
    if log:
        ax.set_yscale("log", nonpositive="mask")
    scale = 100 if percent else 1
    series = [(key, label) for key, label in series if any(len(s.band(key)[0]) for s in settings)]
    series = series[:1] if len(settings) > 1 else series
    jobs = [(setting, key, label) for setting in settings for key, label in series]
    ends = []
    for i, (setting, key, label) in enumerate(jobs):
        style = line_style(i)
        colour = style["color"]
        steps, mean, half = setting.band(key)
        if not len(steps) or (log and not (mean > 0).any()):
            continue
        window = max(1, len(steps) // 12)
        if window > 2:
            ax.plot(steps, scale * mean, color=colour, alpha=0.25, linewidth=0.8)
        middle = smooth(mean, window) if window > 2 else mean
        marker = dict(marker="o", markersize=3) if len(steps) < 12 else {}
        ax.plot(steps, scale * middle, **style, **marker)
        if half.any():
            half = smooth(half, window)
            ax.fill_between(
                steps, scale * (middle - half), scale * (middle + half), color=colour, alpha=0.16, linewidth=0
            )
        ends.append((steps[-1], scale * middle[-1], setting.label if settings[1:] else label, colour))
    if not ends:
        return False
    if not log:
        _keep_lines_in_view(ax, settings, percent)
    _finish(ax, zero)
    if len(ends) > 1:
        label_ends(ax, ends)
    return True


def _keep_lines_in_view(ax, settings: Sequence[Setting], percent: bool) -> None:
    """Limits the y axis by the lines: bands over two or three seeds may be many times as high, and are cut off."""
    if all(len(setting.runs) == 1 for setting in settings):
        return
    heights = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in ax.lines])
    low, high = heights.min(), heights.max()
    room = 0.4 * (high - low) or 1.0
    now = ax.get_ylim()
    most = 100.5 if percent and high <= 100 else high + room
    ax.set_ylim(max(now[0], low - room), min(now[1], high + room, most))


def _finish(ax, zero: bool = False, integer: bool = True) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=integer, steps=[1, 2, 5, 10]))
    ax.margins(x=0.01)
    if ax.get_yscale() == "log":
        ax.minorticks_off()
        return
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if zero:
        top = max((line.get_ydata().max(initial=0) for line in ax.lines), default=0)
        ax.set_ylim(0, 1.04 * high if top or high > 1 else 1)  # nothing but zeros: a line on the axis
    elif high - low < 1e-9:  # a constant
        ax.set_ylim(low - 1, high + 1)
    if ax.get_ylim()[1] >= 10_000:
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))


def accuracy(ax, settings: Sequence[Setting]) -> bool:
    """Held-out accuracy with its interval over problems (one run) or over seeds; training accuracy behind."""
    if len(settings) == 1 and len(settings[0].runs) == 1:
        run = settings[0].runs[0]
        steps, middle = run.series("eval/accuracy")
        low, high = run.series("eval/accuracy_low")[1], run.series("eval/accuracy_high")[1]
        if len(low) == len(steps) == len(high) and len(steps):
            ax.fill_between(steps, 100 * low, 100 * high, color=SERIES[0], alpha=0.16, linewidth=0)
    found = lines(ax, settings, [("eval/accuracy", "held-out"), ("accuracy", "training")], percent=True)
    ax.set_ylabel("correct, %")
    return found


def against_tokens(ax, settings: Sequence[Setting]) -> bool:
    """Held-out accuracy over the tokens generated so far, discarded ones included."""
    ends = []
    for i, setting in enumerate(settings):
        curves = [_tokens_and_accuracy(run) for run in setting.runs]
        curves = [c for c in curves if len(c[0]) > 1]
        if not curves:
            continue
        style = line_style(i)
        if len(curves) > 1:
            grid = np.linspace(max(c[0][0] for c in curves), min(c[0][-1] for c in curves), 40)
            values = np.array([np.interp(grid, *c) for c in curves])
            mean, half = values.mean(axis=0), t_half_width(values)
            ax.fill_between(grid, mean - half, mean + half, color=style["color"], alpha=0.16, linewidth=0)
        else:
            grid, mean = curves[0]
        few = dict(marker="o", markersize=3) if len(curves) == 1 and len(grid) < 12 else {}
        ax.plot(grid, mean, **style, **few)
        ends.append((grid[-1], mean[-1], setting.label, style["color"]))
    if not ends:
        return False
    _keep_lines_in_view(ax, settings, percent=True)
    _finish(ax, integer=False)
    ax.set_xlabel("generated tokens, millions")
    ax.set_ylabel("correct, %")
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
            (f"response_length/{k}", n) for k, n in (("mean", "mean"), ("p50", "median"), ("p90", "90th"))
        ]
    else:
        series = [("response_length/mean", "")]
    found = lines(ax, settings, series, zero=True)
    ax.set_ylabel("response length, tokens")
    return found


def ridges(ax, run: Run, colour: str = SERIES[0]) -> bool:
    """Distribution of response lengths, one ridge per moment of training, first at the back."""
    from matplotlib.ticker import MaxNLocator

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
    for i, curve in enumerate(curves):
        base = len(chosen) - 1 - i
        y = base + 3.4 * curve / tallest
        ax.fill_between(grid, base, y, color=PAPER, linewidth=0, zorder=2 * i)
        shade = 0.10 + 0.35 * i / len(chosen)
        ax.fill_between(grid, base, y, color=colour, alpha=shade, linewidth=0, zorder=2 * i)
        ax.plot(grid, y, color=colour, linewidth=1.0, zorder=2 * i + 1)
    ax.set_yticks([len(chosen) - 1 - i for i in range(len(chosen))], [f"{step:g}" for step, _ in chosen])
    ax.set_ylabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.grid(False)
    ax.set_xlim(0, longest * 1.04)
    ax.set_xlabel("response length, tokens")
    return True


def selection_scatter(ax, run: Run, colour: str = "") -> bool:
    """Sampled prompts at their mean response length, at some thirty steps: kept to the right of the step, dropped
    to its left, in the colour of the reason."""
    rows = [r for r in run.records if r.get("selection/kept_lengths") and r.get("selection/dropped_lengths")]
    if not rows:
        return False
    rows = [rows[i] for i in sorted(set(np.linspace(0, len(rows) - 1, 30).round().astype(int)))]
    lane = 0.36 * max(1.0, (rows[-1]["step"] - rows[0]["step"]) / max(len(rows) - 1, 1))
    points: dict[str, list] = {}
    for r in rows:
        dropped = r["selection/dropped_lengths"]
        reasons = r.get("selection/dropped_reasons") or ["dropped"] * len(dropped)
        for fate, side, lengths in (
            *((reason, -1, [n]) for reason, n in zip(reasons, dropped, strict=True)),
            ("kept", 1, r["selection/kept_lengths"]),
        ):
            points.setdefault(fate, []).extend((r["step"], side, n) for n in lengths if n is not None)
    rng = np.random.default_rng(0)
    for fate, shown in points.items():
        step, side, length = np.array(shown).T
        x = step + lane * side * rng.uniform(0.15, 1, len(step))
        y = length + rng.uniform(-0.15, 0.15, len(step))  # many prompts have the same length on a small task
        tint = MUTED if fate == "dropped" else _tint(fate, FATES)
        ax.scatter(x, y, s=5, color=tint, linewidth=0, alpha=0.65, label=fate.replace("_", " "))
    _finish(ax, zero=True)
    ax.set_ylabel("mean response length, tokens")
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=8.5, handletextpad=0, markerscale=2,
        columnspacing=0.8, borderaxespad=0, borderpad=0.2, labelcolor="linecolor",
    )  # fmt: skip
    return True


def selection_reasons(ax, run: Run, colour: str = "") -> bool:
    """Share of sampled prompts by what became of them."""
    keys = {k for r in run.records for k in r if k.startswith("selection/dropped/")}
    keys = sorted(k for k in keys if not k.endswith("completions"))  # these count completions, not prompts
    reasons = list(dict.fromkeys(k.rpartition("/")[2] for k in keys))  # whichever rule of a chain gave it
    rows = [r for r in run.records if r.get("selection/kept_lengths") is not None]
    if not reasons or len(rows) < 2:
        return False
    counts = [[len(r["selection/kept_lengths"]) for r in rows]]
    for reason in reasons:
        same = [k for k in keys if k.endswith(f"/{reason}")]
        counts.append([sum(r.get(k) or 0 for k in same) for r in rows])
    fates = ["kept", *reasons]
    colours = [_tint(fate, FATES) for fate in fates]
    found = _stack(ax, rows, counts, [fate.replace("_", " ") for fate in fates], colours)
    ax.set_ylabel("sampled prompts, %")
    return found


def acceptance(ax, settings: Sequence[Setting]) -> bool:
    """Share of the generated tokens that selection kept; nothing where it never dropped any."""
    if all((setting.band("acceptance_rate")[1] == 1).all() for setting in settings):
        return False
    found = lines(ax, settings, [("acceptance_rate", "")], percent=True, zero=True)
    ax.set_ylabel("generated tokens, %")
    return found


def time_split(ax, run: Run, colour: str = "") -> bool:
    """Where the seconds of a step go."""
    parts = [("time/rollout", "rollout"), ("time/grade", "grading"), ("time/update", "update")]
    rows = [r for r in run.records if r.get("time/step")]
    parts = [(key, name) for key, name in parts if any(r.get(key) for r in rows)]
    if len(rows) < 2 or not parts:
        return False
    counts = [[r.get(key) or 0 for r in rows] for key, _ in parts]
    rest = [max(r["time/step"] - sum(r.get(key) or 0 for key, _ in parts), 0) for r in rows]
    names = [*(name for _, name in parts), "other"]
    found = _stack(ax, rows, [*counts, rest], names, [_tint(name, PARTS) for name in names])
    ax.set_ylabel("time of a step, %")
    return found


def _tint(name: str, known: dict[str, int]) -> str:
    """The colour of a fate or a part; an unknown name gets a colour that depends on the name only."""
    return SERIES[known.get(name, zlib.crc32(name.encode())) % len(SERIES)]


def _stack(ax, rows, counts, names, colours) -> bool:
    """Stacked shares in percent, named at the right end. Running medians hide single slow steps (compilations)."""
    steps = [r["step"] for r in rows]
    counts = np.array(counts, np.float64)
    window = max(1, len(steps) // 12)
    share = np.array([smooth(row, window, np.median) for row in counts])
    share = 100 * share / np.maximum(share.sum(axis=0), 1e-12)
    ax.stackplot(steps, share, colors=colours, alpha=0.72, linewidth=0.8, edgecolor=PAPER)
    ax.set_ylim(0, 100)
    _finish(ax)
    tops = np.cumsum(share[:, -1])
    ends = [
        (steps[-1], top - part / 2, name, colour)
        for top, part, name, colour in zip(tops, share[:, -1], names, colours, strict=True)
        if part >= 1
    ]
    label_ends(ax, ends)
    return True


def _sweeps(settings: Sequence[Setting]) -> list[tuple[str, list[dict]]]:
    """(label, results by budget) of everything that was swept, of the first seed's newest checkpoint."""
    out = []
    for setting in settings:
        found: dict[tuple[str, str], dict[int, dict]] = {}
        for row in sorted(setting.runs[0].evaluations, key=lambda r: r.get("step") or 0):
            if row.get("budget") and row.get("accuracy", 0) is not None:
                found.setdefault((row.get("data", ""), row.get("mode", "")), {})[row["budget"]] = row
        several = [len({key[i] for key in found}) > 1 for i in range(2)]
        for key, rows in found.items():
            parts = [setting.label] if len(settings) > 1 else []
            parts += [part for part, differs in zip(key, several, strict=True) if differs and part]
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
        ax.plot(x, y, **line_style(i), marker="o", markersize=4)
        ends.append((x[-1], y[-1], label, SERIES[i % len(SERIES)]))
    _finish(ax, zero=True)
    ax.set_xlabel("budget, tokens")
    ax.set_ylabel("mean response length, tokens")
    if len(ends) > 1:
        label_ends(ax, ends)
    return True


def accuracy_by_tokens(ax, settings: Sequence[Setting]) -> bool:
    """Accuracy against the tokens really spent, one point per budget, with 95 % intervals; dotted and hollow, where
    every problem was answered several times, the accuracy of the majority."""
    ends = []
    for i, (label, rows) in enumerate(_sweeps(settings)):
        rows = sorted(rows, key=lambda r: r["mean_tokens"])
        colour = SERIES[i % len(SERIES)]
        x = np.array([r["mean_tokens"] for r in rows])
        keys = ("accuracy", "accuracy_low", "accuracy_high")
        y, low, high = (100 * np.array([r[k] for r in rows]) for k in keys)
        ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        ax.plot(x, y, **line_style(i), marker="o", markersize=4)
        voted = [(r["mean_tokens"], 100 * majority(r)) for r in rows if majority(r) is not None]
        if voted:
            hollow = dict(color=colour, linewidth=1, linestyle=(0, (1, 1.5)), markerfacecolor=PAPER)
            ax.plot(*zip(*voted, strict=True), marker="o", markersize=4, **hollow)
        ends.append((x[-1], y[-1], label, colour))
    return _correct_by_tokens(ax, ends, "mean response length, tokens")


def _correct_by_tokens(ax, ends: Sequence[tuple], label: str) -> bool:
    """Axes and, where there are several, the names of lines of accuracy over tokens; False without any line."""
    if not ends:
        return False
    _finish(ax)
    ax.set_xlabel(label)
    ax.set_ylabel("correct, %")
    if len(ends) > 1:
        label_ends(ax, ends)
    return True


def accuracy_by_length(ax, settings: Sequence[Setting]) -> bool:
    """Accuracy in each part of the answers, from the shortest to the longest quarter, of the newest checkpoint; the
    first seed's, and at budgets only where nothing else was evaluated."""
    found: dict[str, list[dict]] = {}
    for setting in settings:
        rows = [r for r in setting.runs[0].evaluations if len(r.get("by_length") or ()) > 1]
        rows = [r for r in rows if not r.get("budget")] or rows
        newest = max((r.get("step") or 0 for r in rows), default=0)
        several = len(rows) > 1
        for row in rows:
            if (row.get("step") or 0) == newest:
                what = [row.get("data", ""), f"{row['budget']} tokens" if row.get("budget") else ""] if several else []
                name = [setting.label] if len(settings) > 1 else []
                found[" ".join(part for part in (*name, *what) if part)] = row["by_length"]
    ends = []
    for i, (label, parts) in enumerate(found.items()):
        x, y = np.array([(part["up_to"], 100 * part["accuracy"]) for part in parts]).T
        ax.plot(x, y, **line_style(i), marker="o", markersize=4)
        ends.append((x[-1], y[-1], label, SERIES[i % len(SERIES)]))
    return _correct_by_tokens(ax, ends, "tokens of the longest answer of each quarter")


def named_rewards(ax, run: Run, colour: str = "") -> bool:
    """The mean of every named reward, without its weight; nothing where correctness is all there is."""
    names = sorted({k for r in run.records for k in r if re.fullmatch("reward/.+/mean", k)})
    series = [(name, name.removeprefix("reward/").removesuffix("/mean")) for name in names]
    if len([1 for name, _ in series if len(run.series(name)[0])]) < 2:
        return False
    found = lines(ax, [Setting("", [run])], series)
    ax.set_ylabel("reward")
    return found


def metric(*series: tuple[str, str], unit: str = "", **options) -> Callable:
    """A drawing of (metric, label) series over steps; unit: of the y axis; options: those of `lines`."""
    def draw(ax, settings):
        found = lines(ax, settings, series, **options)
        ax.set_ylabel(unit)
        return found

    return draw
