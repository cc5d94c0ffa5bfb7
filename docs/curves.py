"""Draws runs over the tokens they generated: accuracy of the sampled answers, and their mean length.

    python docs/curves.py docs/images/NAME "first label=RUN,RUN,RUN" "second label=RUN" ...

The runs of one label are seeds; each has a thin line, their mean a thick one. Values are running means over five steps,
because the problems of one step are few. Writes NAME_accuracy.svg and NAME_length.svg.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

from jaxrl.reporting.comparison import save
from jaxrl.reporting.runs import Run, Setting, read_run
from jaxrl.reporting.style import drawing, label_ends, line_style, smooth

FIGURES = {"accuracy": ("accuracy", 100, "sampled answers right, %"),
           "length": ("response_length/mean", 1, "mean tokens of an answer")}


def over_tokens(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(thousands of tokens generated so far, running mean of the metric), one value per training step."""
    steps = [r for r in run.records if key in r]
    return np.cumsum([r["generated_tokens"] for r in steps]) / 1e3, smooth(np.array([r[key] for r in steps]), 5)


def draw(ax, settings: list[Setting], key: str, factor: float) -> None:
    """One colour per setting. The mean is drawn as far as the shortest of its runs goes."""
    ends = []
    for i, setting in enumerate(settings):
        style, curves = line_style(i), [over_tokens(run, key) for run in setting.runs]
        grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 40)
        mean = factor * np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
        for x, y in curves:
            ax.plot(x, factor * y, color=style["color"], linewidth=0.6, alpha=0.4)
        ax.plot(grid, mean, **style)
        ends.append((grid[-1], mean[-1], setting.label, style["color"]))
    label_ends(ax, ends)


def main(argv: list[str]) -> None:
    """argv: the stem of the files, then label=run directories, each."""
    if len(argv) < 3 or not all("=" in a for a in argv[2:]):
        sys.exit(__doc__)
    named = [a.partition("=")[::2] for a in argv[2:]]
    settings = [Setting(label, [read_run(path) for path in runs.split(",")]) for label, runs in named]
    for name, (key, factor, title) in FIGURES.items():
        with drawing(6.4, 3.4) as (figure, ax):
            draw(ax, settings, key, factor)
            ax.set_xlabel("generated tokens, thousands")
            ax.set_ylabel(title)
            save(figure, pathlib.Path(f"{argv[1]}_{name}.svg"))


if __name__ == "__main__":
    main(sys.argv)
