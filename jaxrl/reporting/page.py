"""The HTML page around the figures: self-contained, light and dark; only the completions need a script (embedded)."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

from jaxrl.evaluation.tables import percent
from jaxrl.reporting import browser
from jaxrl.reporting.runs import Run, Setting, majority
from jaxrl.reporting.style import SERIES, css_variables

_STYLE = """
:root{color-scheme:light dark;%LIGHT%--page:#f6f4ef;--rule:#dedad2;--hot:#d97a2b;--good:#2a66b1;--bad:#c4561b}
@media (prefers-color-scheme:dark){:root{%DARK%--page:#131518;--rule:#2c3036;--hot:#c46a1e;--good:#83b4ef;
--bad:#f2a272}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 Inter,system-ui,-apple-system,"Segoe UI",
"Helvetica Neue",Arial,sans-serif;-webkit-font-smoothing:antialiased}
main{max-width:1180px;margin:0 auto;padding:56px 28px 96px}
.narrow{display:none}
h1,h2,h3{font-family:"Iowan Old Style","Palatino Linotype",Palatino,"Source Serif 4",Charter,Georgia,serif;
font-weight:600;letter-spacing:-.012em;margin:0;text-wrap:balance}
h1{font-size:44px;line-height:1.12}
h2{font-size:27px;margin:72px 0 18px;padding-top:22px;border-top:1px solid var(--rule)}
h3{font-size:18.5px;line-height:1.3}
.kicker{font-size:12.5px;letter-spacing:.09em;text-transform:uppercase;color:var(--muted);margin-bottom:12px}
.lead{color:var(--muted);max-width:68ch;margin:14px 0 0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;margin:36px 0 0;
background:var(--rule);border:1px solid var(--rule);border-radius:10px;overflow:hidden}
.tile{background:var(--paper);padding:16px 18px}
.tile b{display:block;font:600 29px/1.15 "Iowan Old Style",Palatino,Charter,Georgia,serif;
font-variant-numeric:lining-nums tabular-nums;white-space:nowrap}
.tile span{font-size:13px;color:var(--muted)}
.key{display:flex;flex-wrap:wrap;gap:4px 26px;margin:26px 0 0;padding:10px 0;list-style:none;font-size:14.5px;
position:sticky;top:0;z-index:2;background:var(--page)}
.key i{display:inline-block;width:26px;height:0;border-top:3px solid;vertical-align:middle;margin-right:9px}
.grid{display:grid;grid-template-columns:1fr 1fr;gap:22px}
figure{margin:0;background:var(--paper);border:1px solid var(--rule);border-radius:10px;min-width:0;
padding:20px 22px 16px;display:flex;flex-direction:column}
figure svg{width:100%;height:auto;margin:10px 0 6px;display:block}
.drawn{display:grid;grid-template-columns:repeat(var(--n),minmax(0,1fr));gap:6px 26px}
h4{margin:12px 0 0;font-size:14px;font-weight:600}
.lone{grid-column:1/-1;display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);grid-template-rows:auto 1fr;
column-gap:44px}
.lone .drawn{grid-row:1/3}
.lone h3{grid-column:2;grid-row:1}.lone figcaption{grid-column:2;margin-top:10px}
figure svg text{font-family:Inter,system-ui,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}
.wide{grid-column:1/-1}
figcaption{font-size:13.5px;line-height:1.5;color:var(--muted);margin-top:auto}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th,td{padding:8px 12px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal}
th{font-weight:500;color:var(--muted);font-size:13px}
.scroll{overflow-x:auto;background:var(--paper);border:1px solid var(--rule);border-radius:10px;
padding:6px 10px}
.scroll tr:last-child td{border-bottom:0}
details{margin-top:18px}summary{cursor:pointer;color:var(--muted);font-size:14.5px}
pre{font:13px/1.6 ui-monospace,Menlo,Consolas,monospace;overflow-x:auto}
footer{margin-top:72px;font-size:13px;color:var(--muted)}
@media (max-width:860px){main{padding:32px 14px 64px}h1{font-size:34px}h2{margin-top:52px}
.grid{grid-template-columns:minmax(0,1fr);gap:14px}figure{padding:16px 12px 14px}.lone{display:flex}
.drawn{grid-template-columns:minmax(0,1fr)}.broad{display:none}.narrow{display:block}
.tile b{font-size:24px}.tiles{grid-template-columns:1fr 1fr}
th,td{padding:7px 8px}}
@media print{body{background:#fff}.grid{grid-template-columns:1fr 1fr}figure,.answer{break-inside:avoid}}
"""

class Figure(NamedTuple):
    """A drawn panel. drawn: (label, SVG) of each of its drawings. wide: takes the whole width of the page."""

    title: str
    caption: str
    drawn: list[tuple[str, str]]
    wide: bool


def render(settings: Sequence[Setting], figures: dict[str, list[Figure]], most: int) -> str:
    """The page. figures: by section, in order. most: bytes of the page; completions that do not fit are left out."""
    runs = [run for s in settings for run in s.runs]
    title = runs[0].path.resolve().name if len(runs) == 1 else f"{len(settings)} settings, {len(runs)} runs"
    style = _STYLE.replace("%LIGHT%", css_variables(False)).replace("%DARK%", css_variables(True)) + browser.style()
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>{_text(title)}</title><style>{style}</style></head><body><main>",
        f"<header><div class=kicker>jaxrl report</div><h1>{_text(title)}</h1>",
        _lead(runs),
        _tiles(runs[0]) if len(runs) == 1 else "",
        "</header>",
        _key(settings) if len(settings) > 1 else "",
    ]
    if len(runs) > 1:
        parts.append(f"<h2>Summary</h2>{_summary(settings)}")
    for section, panels in figures.items():
        parts.append(f"<h2>{_text(section)}</h2>{_grid(panels)}")
    parts.append(_evaluations(settings))
    rest = [*map(_config, settings), "<footer>Made by python -m jaxrl.report from metrics.jsonl and samples/.</footer>"]
    rest.append("</main></body></html>\n")
    room = most - sum(len(part.encode()) for part in [*parts, *rest])
    return "".join([*parts, browser.section([(s.label, s.runs[0]) for s in settings], room), *rest])


def _text(value: object) -> str:
    return html.escape(str(value))


def _grid(panels: Sequence[Figure]) -> str:
    """Two figures per row; wide figures, and a figure without a neighbour, have a row to themselves."""
    parts, left = [], True
    for i, figure in enumerate(panels):
        last = i + 1 == len(panels) or panels[i + 1].wide
        kind = " class=wide" if figure.wide else " class=lone" if left and last else ""
        left = figure.wide or not left or bool(kind)
        drawn = "".join(f"<div>{_label(label)}{svg}</div>" for label, svg in figure.drawn)
        parts.append(f"<figure{kind}><h3>{_text(figure.title)}</h3>")
        parts.append(f"<div class=drawn style='--n:{beside(len(figure.drawn))}'>{drawn}</div>")
        parts.append(f"<figcaption>{_text(figure.caption)}</figcaption></figure>")
    return f"<div class=grid>{''.join(parts)}</div>"


def beside(count: int) -> int:
    """How many of `count` drawings stand in one row, so that the last row has few holes."""
    return {1: 1, 2: 2, 4: 2}.get(count, 3)


def _label(text: str) -> str:
    return f"<h4>{_text(text)}</h4>" if text else ""


def _lead(runs: Sequence[Run]) -> str:
    """The settings that all runs share."""
    config = {k: v for k, v in runs[0].config.items() if all(run.config.get(k) == v for run in runs)}
    names = {"algorithm.loss": "loss", "algorithm.advantage": "advantage", "algorithm.selection": "selection"}
    names |= {"length.reward": "length reward", "task.name": "task", "model.path": "model", "seed": "seed"}
    said = [
        f"{label} {config[key]}" for key, label in names.items() if config.get(key) not in (None, "", "none")
    ]
    return f"<p class=lead>{_text(' · '.join(said))}</p>"


def _key(settings: Sequence[Setting]) -> str:
    styles = ("solid", "dashed", "dotted")
    items = [
        f"<li><i style='color:var(--c{i % len(SERIES)});border-top-style:{styles[i // len(SERIES) % 3]}'></i>"
        f"{_text(s.label)} ({_seeds(s)})</li>"
        for i, s in enumerate(settings)
    ]
    return f"<ul class=key>{''.join(items)}</ul>"


def _seeds(setting: Setting) -> str:
    n = len(setting.runs)
    return f"{n} seeds" if n > 1 else f"seed {setting.runs[0].seed}"


def _number(value: float) -> str:
    """Three significant digits, thousands as k and M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {suffix}"
    return f"{value:.3g}"


def _tiles(run: Run) -> str:
    tiles = []
    steps, accuracy = run.series("eval/accuracy")
    if len(accuracy):
        ends = [100 * run.series(f"eval/accuracy_{end}")[1][-1:] for end in ("low", "high")]
        spread = " ({:.1f} – {:.1f})".format(*(float(e[0]) for e in ends)) if all(map(len, ends)) else ""
        tiles.append((f"{100 * accuracy[-1]:.1f} %", f"held-out accuracy at step {steps[-1]:.0f}{spread}"))
    if len(accuracy) > 1:
        tiles.append((f"{100 * (accuracy[-1] - accuracy[0]):+.1f}", f"points since step {steps[0]:.0f}"))
    length = run.series("response_length/mean")[1]
    if len(length):
        tiles.append((f"{length[0]:.3g}\u2009→\u2009{length[-1]:.3g}", "mean response length, tokens"))
    seconds, tokens = run.series("time/step")[1], run.series("generated_tokens")[1]
    tiles.append((str(int(max((r["step"] for r in run.records), default=0))), "steps"))
    if len(tokens):
        tiles.append((_number(tokens.sum()), "tokens generated"))
    if len(seconds):
        tiles.append((_duration(seconds.sum()), "in training steps"))
    cells = "".join(
        f"<div class=tile><b>{_text(value)}</b><span>{_text(label)}</span></div>" for value, label in tiles
    )
    return f"<div class=tiles>{cells}</div>"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
    )


def _summary(settings: Sequence[Setting]) -> str:
    """Last held-out accuracy, length and cost of every setting, mean over seeds with its 95 % interval."""
    head = ["setting", "seeds", "held-out accuracy", "mean tokens", "generated", "time"]
    rows = []
    for s in settings:
        _, mean, half = s.band("eval/accuracy")
        spread = f" ± {100 * half[-1]:.1f}" if len(s.runs) > 1 and len(half) else ""  # one seed has no interval
        said = f"{100 * mean[-1]:.1f}{spread} %" if len(mean) else "-"
        length = s.band("response_length/mean")[1]
        tokens = [run.series("generated_tokens")[1].sum() for run in s.runs]
        seconds = [run.series("time/step")[1].sum() for run in s.runs]
        row = [s.label, len(s.runs), said, f"{length[-1]:.4g}" if len(length) else "-"]
        rows.append([*row, _number(sum(tokens) / len(tokens)), _duration(sum(seconds) / len(seconds))])
    return _table(head, rows)


def _evaluations(settings: Sequence[Setting]) -> str:
    """Results of jaxrl.evaluate, if they are in the run directories."""
    head = ["evaluation", "problems", "samples each", "accuracy, %", "95 % interval", "majority, %", "mean tokens"]
    head += ["tokens, correct", "tokens, wrong", "mean error, %"]
    rows = []
    for setting in settings:
        for run in setting.runs:
            who = "" if sum(len(s.runs) for s in settings) == 1 else f"{setting.label}, seed {run.seed}: "
            for r in run.evaluations:
                shares = [r.get("accuracy"), r.get("accuracy_low"), r.get("accuracy_high"), majority(r)]
                at, low, high, voted = map(percent, shares)
                tokens = [r.get(k) for k in ("mean_tokens", "tokens_correct", "tokens_wrong")]
                cells = [who + str(r.get("name", r.get("data", ""))), r.get("problems", "-"), r.get("samples", "-")]
                cells += [at, f"{low} – {high}", voted, *("-" if n is None else f"{n:.1f}" for n in tokens)]
                rows.append([*cells, percent(r.get("mean_error"))])
    return f"<h2>Evaluations</h2>{_table(head, rows)}" if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>" for row in rows)
    header = "".join(f"<th>{_text(c)}</th>" for c in head)
    return f"<div class=scroll><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"


def _config(setting: Setting) -> str:
    lines = "\n".join(f"{k} = {v!r}" for k, v in sorted(setting.runs[0].config.items()))
    if not lines:
        return ""
    paths = ", ".join(str(run.path) for run in setting.runs)
    return f"<details><summary>Configuration of {_text(paths)}</summary><pre>{_text(lines)}</pre></details>"
