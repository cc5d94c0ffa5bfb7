"""How figures look, and how one drawing becomes a PNG for papers and an SVG that follows the page's theme."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
from collections.abc import Callable

import numpy as np

# Every colour of a figure is one of these; in the SVG each becomes a CSS variable, so that the page can
# switch between light and dark without a second drawing.
COLOURS = {
    "c0": ("#2a66b1", "#83b4ef"),
    "c1": ("#c4561b", "#f2a272"),
    "c2": ("#1f8062", "#74cfae"),
    "c3": ("#8a46a6", "#cda0e6"),
    "c4": ("#a87911", "#e0bf62"),
    "c5": ("#b8385a", "#f08ca6"),
    "ink": ("#23262b", "#e4e6ea"),
    "muted": ("#70757e", "#9aa1ab"),
    "grid": ("#e4e2dd", "#343941"),
    "paper": ("#fffefc", "#1b1e23"),
}
LIGHT = {name: pair[0] for name, pair in COLOURS.items()}
SERIES = [LIGHT[f"c{i}"] for i in range(6)]
INK, MUTED, GRID, PAPER = (LIGHT[name] for name in ("ink", "muted", "grid", "paper"))
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)))
MOST_LABELS = 8
FONTS = ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"]


def css_variables(dark: bool) -> str:
    """The palette as CSS declarations."""
    return "".join(f"--{name}:{pair[dark]};" for name, pair in COLOURS.items())


@contextlib.contextmanager
def drawing(width: float = 5.0, height: float = 2.9):
    """A figure with one bare axes: (figure, axes). Closed afterwards. No display is needed."""
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = {font.name for font in font_manager.fontManager.ttflist}
    rc = {
        "font.family": [name for name in FONTS if name in known] or ["sans-serif"],
        "font.size": 9.0,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.facecolor": PAPER,
        "figure.facecolor": PAPER,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "lines.linewidth": 1.7,
        "lines.solid_capstyle": "round",
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(rc):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


def to_svg(figure, name: str) -> str:
    """The figure as inline SVG that scales with its column and takes its colours from CSS variables."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids must differ between figures of one page
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", svg)
    for key, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{key})")
    return svg.strip()


def save_png(figure, path: pathlib.Path) -> None:
    """The figure as a PNG at 200 dpi, in the light colours."""
    figure.savefig(path, format="png", dpi=200)


def line_style(i: int) -> dict:
    """Colour and dashes of the i-th line: every colour solid, then dashed, then dotted."""
    return dict(color=SERIES[i % len(SERIES)], linestyle=DASHES[i // len(SERIES) % len(DASHES)])


def label_ends(ax, ends: list[tuple[float, float, str, str]]) -> None:
    """Names lines at their right ends, (x, y, text, colour) each, moved apart where they would overlap.

    If there are too many to fit, none is named here; the key of the page names them.
    """
    ends = sorted((e for e in ends if np.isfinite(e[1])), key=lambda e: e[1])
    if not ends or len(ends) > MOST_LABELS:
        return
    gap = 0.085
    ax.get_ylim()  # settles the limits that the transform needs
    heights = ax.transData.transform([(0, e[1]) for e in ends])
    places = ax.transAxes.inverted().transform(heights)[:, 1].clip(0, 1).tolist()  # also right for a log scale
    for _ in range(200):  # neighbours push each other apart
        for i in range(len(places) - 1):
            overlap = gap - (places[i + 1] - places[i])
            if overlap > 1e-12:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
    for i in range(len(places)):  # not into the labels of the axis below, nor out of the figure
        places[i] = max(places[i], places[i - 1] + gap if i else 0)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else 1.02)
    right = max(e[0] for e in ends)
    for (_, _, text, colour), y in zip(ends, places, strict=True):
        ax.annotate(
            text if len(text) < 26 else text[:24] + "…",
            (right, y),
            xycoords=("data", "axes fraction"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8.5,
            annotation_clip=False,
            parse_math=False,  # a label may hold a $ of somebody's prompt
        )


def smooth(values: np.ndarray, window: int, average: Callable = np.mean) -> np.ndarray:
    """Centred running mean (or another average). The window is narrow at the start, which is often steep, and cut off
    at the end."""
    out = np.empty(len(values))
    for i in range(len(values)):
        half = min(window // 2, i)
        out[i] = average(values[i - half : i + half + 1])
    return out
