"""The report page: what it says, that it is self-contained, and that it shows the numbers of the run."""

import dataclasses
import html
import json
import pathlib
import re

import numpy as np
import pytest

from jaxrl import report
from jaxrl.errors import UserError
from jaxrl.reporting import figures
from jaxrl.reporting.page import Figure, _grid
from jaxrl.reporting.panels import PANELS
from jaxrl.reporting.runs import Run, group_runs, read_run, t_half_width
from jaxrl.reporting.style import COLOURS, SERIES, drawing, line_style, smooth, to_svg
from tests.reporting.page_parser import Page
from tests.reporting.toy import write_run


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    paths = [
        write_run(root / f"{loss}{seed}", seed, loss, steps=20)
        for loss in ("grpo", "maspo")
        for seed in (0, 1)
    ]
    (paths[0] / "eval").mkdir()
    rows = [
        dict(budget=b, mean_tokens=b * 1.1, accuracy=0.5, accuracy_low=0.4, accuracy_high=0.6)
        for b in (8, 16)
    ]
    plain = {"name": "dial:n_max=9", "budget": None, "accuracy": 0.625, "accuracy_low": 0.5, "accuracy_high": 0.75}
    plain |= {"samples": 4, "maj@2": 0.63, "maj@4": 0.6875, "tokens_correct": 7.25, "tokens_wrong": None}
    plain |= {"by_length": [dict(up_to=n, accuracy=a, samples=9) for n, a in ((4, 0.75), (9, 0.5))]}
    (paths[0] / "eval" / "result.json").write_text(json.dumps({"results": [*rows, plain]}))
    report.main(["report", str(paths[0])])
    report.main(["report", *map(str, paths), f"--out={root}/both.html"])
    return root, paths, (paths[0] / "report.html").read_text(), (root / "both.html").read_text()


def test_pages_are_well_formed_and_need_no_network(pages):
    for text in pages[2:]:
        page = Page(text)
        for tag, attributes in page.tags:
            assert tag not in ("link", "iframe", "img")
            assert "src" not in attributes
            for key in ("href", "xlink:href"):
                assert attributes.get(key, "#")[0] == "#"
        assert set(page.scripts) >= {"", "r0", "r0-0", "r0-1"}  # the browser's script and the samples of two steps
        assert not re.search(r"url\((?!#)|@import", text)


def test_no_clip_path_of_one_figure_is_taken_for_another(pages):
    defined = re.findall(r'<(?:clipPath|path) id="((?:p|m)[0-9a-f]{6,})"', pages[3])
    assert len(defined) > 20 and len(defined) == len(set(defined))
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", pages[3]))
    assert used <= set(Page(pages[3]).ids)


def test_every_panel_is_drawn_as_svg_and_png(pages):
    _, paths, single, _ = pages
    names = {png.stem for png in (paths[0] / "report_png").glob("*.png")}
    assert names == {panel.name for panel in PANELS} - {"deviation"}  # the toy run has no budgets in training
    assert single.count("<svg") == len(names) + 2  # the two wide ones have a drawing for narrow screens
    for panel in PANELS:
        assert (f"{panel.caption} {panel.unseen}".strip() in html.unescape(single)) == (panel.name in names)
        assert not panel.unseen or panel.unseen not in html.unescape(pages[3])


def test_colours_follow_the_theme(pages):
    style, _, figures = pages[2].partition("</style>")
    for name, (light, dark) in COLOURS.items():
        assert f"--{name}:{light}" in style and f"--{name}:{dark}" in style
        assert light not in figures


def test_the_numbers_are_the_runs(pages):
    _, paths, single, both = pages
    records = read_run(paths[0]).records
    assert f"{100 * records[-1]['eval/accuracy']:.1f} %" in single
    final = np.array([[read_run(p).records[-1]["eval/accuracy"] for p in paths[i : i + 2]] for i in (0, 2)])
    for mean, half in zip(final.mean(1), 12.706 * final.std(1, ddof=1) / np.sqrt(2), strict=True):
        assert f"{100 * mean:.1f} ± {100 * half:.1f} %" in both


def test_completions_can_be_browsed(pages):
    for text, runs in zip(pages[2:], (1, 2), strict=True):
        scripts = Page(text).scripts
        assert set(scripts) == {"", *(f"r{i}{part}" for i in range(runs) for part in ("", "-0", "-1"))}
        assert "fetch(" not in scripts[""] and "XMLHttpRequest" not in scripts[""] and "import(" not in scripts[""]
    assert "<b>no</b>" not in pages[2]


def test_a_page_is_as_large_as_is_asked_at_most(pages, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PANELS", PANELS[:1])
    run = write_run(tmp_path / "run", steps=2)
    row = json.loads((run / "samples" / "step_00000001.jsonl").read_text().splitlines()[0])
    noise = np.random.default_rng(0)
    for step in range(1, 41):
        rows = [row | {"logprobs": (-noise.exponential(1, 900)).tolist(), "tokens": ["x"] * 900} for _ in range(64)]
        (run / "samples" / f"step_{step:08d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sizes = [len(open(report.write_report([str(run)], str(tmp_path / "x.html"), mb), "rb").read()) for mb in (1, 50)]
    assert 0.8e6 < sizes[0] <= 1e6 and sizes[1] > 2e6
    with pytest.raises(UserError, match="--max_mb='0': must be an integer"):
        report.main(["report", str(run), "--max_mb=0"])


def test_seeds_are_grouped_and_settings_named_by_what_differs(pages):
    settings = group_runs([read_run(p) for p in pages[1]])
    assert [(s.label, [r.seed for r in s.runs]) for s in settings] == [("grpo", [0, 1]), ("maspo", [0, 1])]
    steps, mean, half = settings[0].band("eval/accuracy")
    values = np.array(
        [[r["eval/accuracy"] for r in run.records if "eval/accuracy" in r] for run in settings[0].runs]
    )
    assert steps.tolist() == [0, 10, 20] and np.allclose(mean, values.mean(0))
    assert np.allclose(half, 12.706 * np.abs(values[0] - values[1]) / 2, rtol=1e-3)


def test_one_seed_claims_no_interval(pages, monkeypatch):
    monkeypatch.setattr(report, "PANELS", PANELS[:1])
    root, paths, *_ = pages
    out = report.write_report([str(paths[0]), str(paths[2])], str(root / "two.html"))
    assert "±" not in open(out, encoding="utf-8").read()


def test_labels_say_what_tells_settings_apart(pages):
    run = read_run(pages[1][0])

    def labels(*changes):
        runs = [dataclasses.replace(run, config=run.config | change) for change in changes]
        return [setting.label for setting in group_runs(runs)]

    chosen = {"algorithm.selection": "none", "steps": 9}
    assert labels({"length.reward": "none"}, chosen | {"length.reward": "arora"}) == [
        "accuracy+lspo",
        "arora",
    ]
    assert labels(chosen, {"algorithm.selection": "lspo"}) == ["none", "lspo"]
    assert labels({}, {"batch.updates": 4}) == ["updates 1", "updates 4"]  # an older run, before the key
    assert labels({"a.hyper.x": 1, "run_dir": "u"}, {"a.hyper.x": 2, "eval.every": 3}) == ["x 1", "x 2"]
    assert labels({}, {"seed": 5}) == ["grpo0"]


def test_sweeps_of_several_data_sets_are_lines_of_their_own(pages):
    run = read_run(pages[1][0])
    rows = [
        dict(data=d, budget=b, step=s, mean_tokens=b + s)
        for s in (9, 3)
        for d in ("x", "y")
        for b in (20, 10)
    ]
    settings = group_runs([dataclasses.replace(run, evaluations=rows)])
    sweeps = figures._sweeps(settings)
    assert [label for label, _ in sweeps] == ["x", "y"]
    assert all([r["mean_tokens"] for r in rows] == [19, 29] for _, rows in sweeps)  # the newest checkpoint
    ungraded = [row | {"accuracy": None if row["budget"] == 20 else 0.5} for row in rows]
    settings = group_runs([dataclasses.replace(run, evaluations=ungraded)])
    assert all([r["budget"] for r in found] == [10] for _, found in figures._sweeps(settings))
    forced = [row | {"data": "x", "mode": mode} for row in rows for mode in ("exact", "forced")]
    settings = group_runs([dataclasses.replace(run, evaluations=forced)])
    assert [label for label, _ in figures._sweeps(settings)] == ["exact", "forced"]


def test_evaluations_found_in_a_run_are_a_table(pages, tmp_path):
    single = pages[2]
    assert "<td>dial:n_max=9</td>" in single and "<td>62.5</td><td>50.0 – 75.0</td><td>68.8</td>" in single
    assert "<td>7.2</td><td>-</td>" in single  # tokens of correct answers; no wrong ones
    (write_run(tmp_path / "run") / "eval").mkdir()
    (tmp_path / "run" / "eval" / "result.json").write_text("[]")
    with pytest.raises(UserError, match="not a result file"):
        read_run(tmp_path / "run")


def test_accuracy_by_length_is_that_of_the_newest_checkpoint_without_a_budget(pages):
    parts = lambda *right: [dict(up_to=5 * (i + 1), accuracy=a, samples=3) for i, a in enumerate(right)]  # noqa: E731
    rows = [dict(data="x", step=s, budget=b, by_length=parts(*right)) for s, b, right in
            ((3, None, (0.1, 0.2)), (9, None, (0.75, 0.5)), (9, 8, (0.3, 0.4)), (9, None, (0.6,)))]  # fmt: skip
    settings = group_runs([dataclasses.replace(read_run(pages[1][0]), evaluations=rows)])
    with drawing() as (_, ax):
        assert figures.accuracy_by_length(ax, settings)
        assert [line.get_xydata().tolist() for line in ax.lines] == [[[5, 75], [10, 50]]]
    settings = group_runs([dataclasses.replace(read_run(pages[1][0]), evaluations=rows[2:3])])
    with drawing() as (_, ax):
        assert figures.accuracy_by_length(ax, settings)
        assert ax.lines[0].get_ydata().tolist() == [30, 40]


def test_the_majority_stands_beside_the_mean(pages):
    rows = [dict(budget=b, mean_tokens=b, accuracy=0.5, accuracy_low=0.4, accuracy_high=0.6) for b in (8, 16, 32)]
    rows[1] |= {"samples": 4, "maj@2": 0.55, "maj@4": 0.7}
    with drawing() as (_, ax):
        found = dataclasses.replace(read_run(pages[1][0]), evaluations=rows)
        assert figures.accuracy_by_tokens(ax, group_runs([found]))
        assert ax.lines[1].get_xydata().tolist() == [[16, 70]]


def test_rewards_by_name_are_lines_where_there_is_more_than_one(pages):
    run = read_run(pages[1][0])
    with drawing() as (_, ax):
        assert figures.named_rewards(ax, run)
        assert [text.get_text() for text in ax.texts] == ["length", "correct"]  # by height
    with drawing() as (_, ax):
        only = [{k: v for k, v in r.items() if k != "reward/length/mean"} for r in run.records]
        assert not figures.named_rewards(ax, dataclasses.replace(run, records=only))


def test_many_settings_have_line_styles_of_their_own_and_a_key(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PANELS", PANELS[:1])
    paths = [write_run(tmp_path / f"{i}", 0, f"loss{i}", steps=4) for i in range(14)]
    text = pathlib.Path(report.write_report(list(map(str, paths)), str(tmp_path / "many.html"))).read_text()
    for i in range(14):
        assert f"color:var(--c{i % 6});border-top-style:{('solid', 'dashed', 'dotted')[i // 6]}" in text
    assert len({tuple(sorted((k, str(v)) for k, v in line_style(i).items())) for i in range(18)}) == 18
    accuracy = text.partition("<h3>Accuracy</h3>")[2].partition("</figure>")[0]
    assert "loss3" not in accuracy  # too many names to stand beside the lines


@pytest.mark.parametrize("count", range(1, 6))
def test_no_figure_stands_beside_a_hole(count):
    for wide in range(-1, count):
        panels = [Figure(str(i), "", [("", "<svg/>")], i == wide) for i in range(count)]
        kinds = re.findall(r"<figure( class=\w+)?>", _grid(panels))
        left = True  # the column that is next, as CSS fills two
        for kind in kinds:
            assert left or not kind
            left = True if kind else not left
        assert left and kinds.count(" class=wide") == (wide >= 0)


def test_wide_bands_do_not_flatten_the_lines(pages):
    low, high = (read_run(pages[1][0]), read_run(pages[1][1]))
    apart = [dataclasses.replace(r, records=[{"step": i, "x": 0.1 * i + k} for i in range(9)]) for k, r in
             enumerate((low, high))]  # fmt: skip
    with drawing() as (_, ax):
        assert figures.lines(ax, group_runs(apart), [("x", "")])
        assert group_runs(apart)[0].band("x")[2].max() > 6  # two seeds: t = 12.7
        assert -1 < ax.get_ylim()[0] < 0.5 and 1.3 < ax.get_ylim()[1] < 2.5


def test_fates_have_one_colour_whatever_else_there_is():
    assert figures._tint("middle", figures.FATES) == SERIES[4]
    assert figures._tint("mine", figures.FATES) == figures._tint("mine", figures.FATES)


def test_reasons_that_count_completions_are_not_stacked_on_prompts():
    record = {"selection/kept_lengths": [1, 2], "selection/dropped/gfpo/unselected_completions": 50}
    record |= {"selection/dropped/lspo/middle": 2}
    run = Run(pathlib.Path(), {}, [record | {"step": i} for i in range(3)], [], {})
    with drawing() as (figure, ax):
        assert figures.selection_reasons(ax, run)
        names = to_svg(figure, "x")
    assert "middle" in names and "unselected" not in names


def test_a_run_in_its_first_step_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.25}\n{"step": 1, "loss": nu')
    out = report.write_report([str(tmp_path)], str(tmp_path / "report.html"))
    assert "25.0 %" in Page(open(out, encoding="utf-8").read()).text


def test_not_a_run(tmp_path):
    with pytest.raises(UserError, match="no metrics.jsonl; need a run directory"):
        report.write_report([str(tmp_path)], str(tmp_path / "x.html"))
    with pytest.raises(UserError, match="name at least one run"):
        report.main(["report"])


def test_smooth_and_t_interval():
    values = np.array([0.0, 3.0, 0.0, 3.0, 0.0])
    assert smooth(values, 3).tolist() == [0.0, 1.0, 2.0, 1.0, 1.5]  # a steep start is not flattened
    assert t_half_width(np.ones((1, 4))).tolist() == [0, 0, 0, 0]
    assert t_half_width(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(2.7764451 * np.sqrt(2.5 / 5), rel=1e-6)
