"""One self-contained HTML page about a run, or comparing several, and its figures as PNG.

    python -m jaxrl.report RUN [RUN ...] [--out=FILE.html]

Runs that differ only by seed are drawn as one line with a band over the seeds. The page needs no network and
follows the light or dark theme of its reader; it is written to RUN/report.html, or for several runs to
./report.html, the PNGs beside it in report_png/.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from jaxrl.errors import UserError
from jaxrl.reporting.page import Figure, render
from jaxrl.reporting.panels import PANELS
from jaxrl.reporting.runs import Setting, group_runs, read_run
from jaxrl.reporting.style import drawing, save_png, to_svg
from jaxrl.runtime import cli
from jaxrl.runtime.rundir import atomic_write


def main(argv: list[str]) -> None:
    flags = cli.parse_flags(argv, dict(out=""), __doc__)
    paths = flags["positional"]
    if not paths:
        raise UserError("name at least one run directory: python -m jaxrl.report RUN [RUN ...]")
    out = flags["out"] or (f"{paths[0]}/report.html" if len(paths) == 1 else "report.html")
    print(write_report(paths, out))


def write_report(paths: Sequence[str], out: str) -> str:
    """Writes the page and its PNGs; returns the page's path. Raises UserError for what is not a run."""
    settings = group_runs([read_run(path) for path in paths])
    target = pathlib.Path(out)
    pngs = target.with_name(f"{target.stem}_png")
    pngs.mkdir(parents=True, exist_ok=True)
    atomic_write(target, render(settings, draw_all(settings, pngs)))
    return str(target)


def draw_all(settings: Sequence[Setting], pngs: pathlib.Path) -> dict[str, list[Figure]]:
    """{section: figures} of every panel that has data; the PNGs go to `pngs`.

    Panels about a single run are drawn for the first seed of every setting.
    """
    sections: dict[str, list[Figure]] = {}
    for panel in PANELS:
        for i, setting in enumerate(settings if panel.single else [None]):
            name = panel.name + (f"_{i}" if panel.single and len(settings) > 1 else "")
            wide = panel.wide and len(settings) == 1
            with drawing(11.6, 4.4) if wide else drawing() as (figure, ax):
                if not panel.draw(ax, setting.runs[0] if panel.single else settings):
                    continue
                save_png(figure, pngs / f"{name}.png")
                svg = to_svg(figure, name)
            title = f"{panel.title} — {setting.label}" if panel.single and len(settings) > 1 else panel.title
            sections.setdefault(panel.section, []).append(Figure(title, panel.caption, svg, wide))
    return sections


if __name__ == "__main__":
    cli.run(main)
