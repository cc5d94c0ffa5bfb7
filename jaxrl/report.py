"""One self-contained HTML page about a run, or comparing several, and its figures as PNG.

    python -m jaxrl.report RUN [RUN ...] [--out=FILE.html] [--max_mb=50]

Runs that differ only by seed are drawn as one line with a band over the seeds. The page needs no network and
follows the light or dark theme of its reader; it is written to RUN/report.html, or for several runs to
./report.html, the PNGs beside it in report_png/. At its end is a browser of the completions that training stored
(config.log.samples says how many per step), by problem, step, outcome, length and fate (kept or dropped). --max_mb:
largest size of the page; if not all completions fit, those of some steps are left out.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence

from jaxrl.algorithms.hyper import Integer
from jaxrl.errors import UserError
from jaxrl.reporting.page import Figure, beside, render
from jaxrl.reporting.panels import PANELS
from jaxrl.reporting.runs import Setting, group_runs, read_run
from jaxrl.reporting.style import SERIES, drawing, save_png, to_svg
from jaxrl.runtime import cli, storage
from jaxrl.runtime.storage import atomic_write

FLAGS = dict(out="", max_mb=Integer(50, 1))
WIDE = (10.6, 4.0)  # inches, across the page
SMALL = (3.9, 2.6)  # three beside each other


def main(argv: list[str]) -> None:
    """The command line above; writes the page and its pictures. Raises UserError for a path that is no run."""
    flags = cli.parse_flags(argv, FLAGS, __doc__)
    paths = flags["positional"]
    if not paths:
        raise UserError("name at least one run directory: python -m jaxrl.report RUN [RUN ...]")
    out = flags["out"] or (f"{paths[0]}/report.html" if len(paths) == 1 else "report.html")
    print(write_report(paths, out, flags["max_mb"]))


def write_report(paths: Sequence[str], out: str, max_mb: int = 50) -> str:
    """Writes the page, of at most about max_mb megabytes, and its PNGs; returns the page's path. Raises UserError for
    what is not a run."""
    settings = group_runs([read_run(path, samples=True) for path in paths])
    folder, name = os.path.split(out)
    where = storage.Mirror(storage.as_path(folder or ".", "--out"), kind=f"results-{os.getpid()}")
    pngs = where.local / f"{pathlib.Path(name).stem}_png"
    pngs.mkdir(parents=True, exist_ok=True)
    atomic_write(where.local / name, render(settings, draw_all(settings, pngs), max_mb * 10**6))
    with storage.user_errors("--out"):
        where.close()
    return out


def draw_all(settings: Sequence[Setting], pngs: pathlib.Path) -> dict[str, list[Figure]]:
    """{section: figures} of every panel that has data; the PNGs go to `pngs`.

    Panels about a single run are drawn for the first seed of every setting.
    """
    sections: dict[str, list[Figure]] = {}
    alone, columns = len(settings) == 1, beside(len(settings))
    for panel in PANELS:
        drawn = []
        for i, setting in enumerate(settings if panel.single else [None]):
            name = panel.name + (f"_{i}" if panel.single and not alone else "")
            what = (setting.runs[0], SERIES[i % len(SERIES)]) if panel.single else (settings,)
            label = setting.label if panel.single and not alone else ""
            size = SMALL if panel.single and columns == 3 else WIDE if panel.wide and alone else ()
            svg = _draw(panel.draw, what, name, pngs, size)
            if svg and panel.wide and alone:  # a second drawing for narrow screens
                svg = f"<div class=broad>{svg}</div><div class=narrow>{_draw(panel.draw, what, name)}</div>"
            drawn += [(label, svg)] if svg else []
        if drawn:
            caption = f"{panel.caption} {panel.unseen if alone else ''}".strip()
            wide = panel.wide and alone or len(drawn) > 1
            sections.setdefault(panel.section, []).append(Figure(panel.title, caption, drawn, wide))
    return sections


def _draw(draw: Callable, what: tuple, name: str, pngs: pathlib.Path | None = None, size: tuple = ()) -> str:
    """The SVG of a panel, "" if it has nothing to show; its PNG too, with a folder for it."""
    with drawing(*size) as (figure, ax):
        if not draw(ax, *what):
            return ""
        if pngs:
            save_png(figure, pngs / f"{name}.png")
        return to_svg(figure, name if pngs else f"{name}_narrow")


if __name__ == "__main__":
    cli.run(main)
