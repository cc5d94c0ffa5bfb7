"""The rollout browser: a page embeds what was sampled, its script selects and escapes, and it keeps to a size."""

import base64
import gzip
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from jaxrl.errors import UserError
from jaxrl.reporting import browser
from jaxrl.reporting.runs import Run, read_run
from tests.reporting.page_parser import Page
from tests.reporting.toy import write_run

HOSTILE = '</script><img src=x onerror="alert(1)"> \'"&amp;\u2028<!-- \u0085\u000b'
SCRIPT = browser.HERE / "browser.js"
node = pytest.mark.skipif(not shutil.which("node"), reason="needs node")


def unpack(text):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def made_rows(step, groups=3, answers=4, tokens=30, seed=0):
    """Rows as train.py stores them; the last group is dropped, with tokens and ids that want to be HTML."""
    rng = np.random.default_rng([seed, step])
    rows = []
    for g in range(groups):
        for i in range(answers):
            n = int(rng.integers(1, tokens))
            words = [rng.choice([" two", "7", "\n", "é", HOSTILE]) for _ in range(n)]
            old = int(rng.integers(0, n))
            kept, right = g < groups - 1, bool(rng.integers(2))
            rows.append({
                "id": f"p/{(g + step) % 5}{HOSTILE if g == 0 else ''}", "prompt": f"what is {g + step}? {HOSTILE}",
                "answer": [HOSTILE, 3], "budget": 64 if g else None, "text": "".join(words), "tokens": words,
                "logprobs": [round(float(x), 4) for x in -rng.exponential(1.0, n)],
                "advantage": round(float(rng.normal()), 4) if kept else None, "reward": float(right),
                "rewards": {"correct": float(right), HOSTILE: math.nan}, "correct": float(right),
                "outcome": "correct" if right else "timeout" if i == 3 else "wrong", "length": n,
                "finish": "length" if n > tokens - 5 else "eos", "stale": old,
                "versions": [[step - 3, old], [step - 1, n - old]], "selected": kept,
                "reason": "" if kept else "lspo/middle",
            })  # fmt: skip
    return rows


def made_run(root, steps, **options) -> Run:
    root.mkdir(parents=True, exist_ok=True)
    for step in steps:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made_rows(step, **options))
        (root / f"step_{step:08d}.jsonl").write_text(text, encoding="utf-8")
    return Run(root, {}, [], [], sorted(root.glob("step_*.jsonl")))


def data_of(section):
    """{id: value} of what a section of HTML embeds."""
    return {key: unpack(text) for key, text in Page(section).scripts.items() if key}


@pytest.fixture
def one(tmp_path):
    run = made_run(tmp_path, (2, 7, 9))
    return run, browser.section([("a <b>", run)], 10**6)


def test_what_is_embedded_is_what_was_sampled(one):
    run, section = one
    data = data_of(section)
    index = data["r0"]
    assert index["label"] == "a <b>" and index["steps"] == [2, 7, 9] and index["stored"] == 3
    places = iter(index["groups"])
    for i, step in enumerate(index["steps"]):
        rows = made_rows(step)
        assert [len(g["answers"]) for g in data[f"r0-{i}"]] == [4, 4, 4]
        for g, group in enumerate(data[f"r0-{i}"]):
            at, problem, lengths, digits = next(places)
            assert at == i and index["problems"][problem] == [rows[4 * g]["id"], rows[4 * g]["prompt"][: browser.HEAD]]
            assert group["prompt"] == rows[4 * g]["prompt"] and group["budget"] == rows[4 * g]["budget"]
            for row, answer, length, digit in zip(rows[4 * g :], group["answers"], lengths, digits, strict=False):
                assert answer["text"] == row["tokens"] and length == answer["length"] == row["length"]
                np.testing.assert_allclose(np.array(answer["logp"]) / 100, row["logprobs"], atol=0.00501)
                assert (answer["advantage"] or 0) == pytest.approx(row["advantage"] or 0, rel=1e-3)
                versions = np.repeat(*np.array(row["versions"]).T)
                ages = np.repeat(*np.array(answer.get("old", [[0, length]])).T)
                assert (step - 1 - versions).tolist() == ages.tolist()
                assert answer["rewards"] == {"correct": row["correct"], HOSTILE: None}  # JSON has no NaN
                assert (answer["cut"], answer["dropped"]) == (row["finish"] == "length", row["reason"] or None)
                bits = (row["correct"], 2 * answer["cut"], 4 * (not row["selected"]), 8 * (row["outcome"] == "timeout"))
                assert int(digit, 16) == sum(bits)
    assert next(places, None) is None


def test_hostile_text_stays_text(one):
    page = Page(one[1])
    assert {tag for tag, _ in page.tags} == {"h2", "noscript", "p", "div", "script"}
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == ["text/plain"] * 4 + [None]
    assert page.scripts[""] == SCRIPT.read_text()  # not cut short by what is in it


def test_rows_of_older_runs_and_strange_values(tmp_path):
    rows = [{"id": 1, "tokens": ["a", "b"], "logprobs": [math.nan, -math.inf], "advantage": math.inf, "correct": 1.0},
            {"id": 1, "text": "no tokens"}]  # fmt: skip
    file = tmp_path / "step_00000003.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data_of(browser.section([("x", Run(tmp_path, {}, [], [], [file]))], 10**5))
    first, second = data["r0-0"][0]["answers"]
    assert first["logp"] == [None, None] and first["advantage"] is None and first["outcome"] == "correct"
    assert second["text"] == ["no tokens"] and second["outcome"] == "wrong" and second["dropped"] is None
    file.write_text('{"id": 1}\n[3')
    with pytest.raises(UserError, match="step_00000003.jsonl: not a samples file"):
        browser.section([("x", Run(tmp_path, {}, [], [], [file]))], 10**5)


def test_empty_steps_and_runs_without_samples_take_no_room(tmp_path):
    assert browser.section([("x", Run(tmp_path, {}, [], []))], 10**6) == ""
    run = made_run(tmp_path, (1, 2, 3))
    run.samples[1].write_text("")
    data = data_of(browser.section([("x", run)], 10**6))
    assert data["r0"]["steps"] == [1, 3] and set(data) == {"r0", "r0-0", "r0-1"}


@pytest.mark.parametrize("n", [*range(0, 12), 100, 129])
def test_steps_are_taken_in_an_order_that_is_spread_out(n):
    order = browser._spread(n)
    assert sorted(order) == list(range(n))
    for k in range(2, n):
        gaps = np.diff(sorted(order[:k]))
        assert order[0] == n - 1 and order[1] == 0 and gaps.max() <= 4 * (n - 1) / (k - 1)


def test_a_page_keeps_to_its_size_and_says_what_is_missing(tmp_path):
    run, other = made_run(tmp_path / "a", range(1, 41)), made_run(tmp_path / "b", (1, 2))
    whole = browser.section([("x", run)], 10**7)
    room = len(SCRIPT.read_text()) + (len(whole) - len(SCRIPT.read_text())) // 3
    part = browser.section([("x", run)], room)
    steps = data_of(part)["r0"]["steps"]
    assert room / 2 < len(part.encode()) <= room and {1, 40} < set(steps) and 8 < len(steps) < 20
    assert data_of(part)["r0"]["stored"] == 40 and np.diff(steps).max() <= 6
    both = data_of(browser.section([("x", run), ("y", other)], room))
    assert len(both["r0"]["steps"]) > 0.6 * len(steps) and both["r1"]["steps"] == [1, 2]  # what y leaves is x's
    none = data_of(browser.section([("x", run)], 100))
    assert none["r0"]["steps"] == [] and none["r0"]["stored"] == 40


def test_the_same_run_has_the_same_page(one):
    assert browser.section([("a <b>", one[0])], 10**6) == one[1]


def test_a_run_lists_its_samples_only_where_they_are_wanted(tmp_path):
    root = write_run(tmp_path / "run", steps=4)
    assert read_run(root).samples == []
    assert [browser.step_of(file) for file in read_run(root, samples=True).samples] == [1, 4]


# ---- the script, where there is a node to run it; everything but the wiring of the page's controls


RUNNER = """
const page = require(%s), chunks = [];
process.stdin.on("data", (chunk) => chunks.push(chunk)).on("end", async () => {
  const given = JSON.parse(Buffer.concat(chunks));
  process.stdout.write(JSON.stringify(await (async () => { %s })()));
});
"""


def run_script(program, value):
    """What a program of JavaScript, whose `page` is browser.js and whose `given` is value, returns."""
    text = RUNNER % (json.dumps(str(SCRIPT)), program)
    done = subprocess.run(["node", "-e", text], capture_output=True, input=json.dumps(value).encode(), check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


SELECT = "return given.states.map((s) => page.select(given.index, {...page.START, ...s}));"


@node
def test_the_script_decodes_what_is_embedded(one):
    texts = {key: text for key, text in Page(one[1]).scripts.items() if key}
    program = "const out = {}; for (const k in given) out[k] = await page.decode(given[k]); return out;"
    found = run_script(program, texts)
    assert found == data_of(one[1])


@node
def test_the_script_filters_as_its_controls_say(tmp_path):
    run = made_run(tmp_path, range(1, 9), groups=4, answers=6)
    index = data_of(browser.section([("x", run)], 10**6))["r0"]
    stored = {step: made_rows(step, groups=4, answers=6) for step in range(1, 9)}
    states = [{}, {"step": "3"}, {"problem": "p/2"}, {"problem": "WHAT IS 4?"}, {"outcome": "correct"}, {"step": "99"},
              {"outcome": "wrong", "fate": "kept"}, {"outcome": "cut"}, {"outcome": "ungraded", "fate": "dropped"},
              {"least": "10", "most": "20"}, {"most": "1"}, {"problem": f"p/1{HOSTILE}", "step": "1"}]  # fmt: skip

    def passes(row, step, state):
        wanted = state.get("problem", "").lower()
        exact = any(r["id"].lower() == wanted for rows in stored.values() for r in rows)
        text = f"{row['id']} {row['prompt']}".lower()
        graded = row["outcome"] != "timeout"
        outcomes = {"": True, "correct": row["correct"] and graded, "wrong": graded and not row["correct"],
                    "cut": row["finish"] == "length", "ungraded": not graded}  # fmt: skip
        return (
            state.get("step", str(step)) == str(step)
            and (row["id"].lower() == wanted if exact else wanted in text)
            and outcomes[state.get("outcome", "")]
            and {"": True, "kept": row["selected"], "dropped": not row["selected"]}[state.get("fate", "")]
            and int(state.get("least", 0)) <= row["length"] <= int(state.get("most", 10**9))
        )

    found = run_script(SELECT, {"index": index, "states": states})
    for state, groups in zip(states, found, strict=True):
        expected = [(step, g, i) for step, rows in stored.items() for g in range(4) for i in range(6)
                    if passes(rows[6 * g + i], step, state)]  # fmt: skip
        got = [(index["steps"][f["step"]], f["place"], i) for f in groups for i in f["rows"]]
        assert got == expected, state
        assert all(index["groups"][f["group"]][0] == f["step"] for f in groups)
    sizes = [sum(len(f["rows"]) for f in groups) for groups in found]
    assert sizes[0] == 8 * 24 and sizes[1] == 24 and 0 < sizes[4] < sizes[0] and min(sizes[6:9]) > 0 and sizes[5] == 0


GROUP = """
const found = page.select(given.index, page.START)[given.at], blob = given.blob;
return ["logp", "advantage", "version", "none"].map((colour) =>
  page.group(given.index, found, blob, {...page.START, colour, order: given.order}, given.all).text);
"""


@node
@pytest.mark.parametrize("order", ["", "shortest", "longest", "advantage"])
def test_the_script_shows_a_group_as_text_in_colours(one, order):
    data = data_of(one[1])
    drawn = run_script(GROUP, {"index": data["r0"], "blob": data["r0-1"], "at": 3, "order": order, "all": True})
    answers = made_rows(7)[:4]
    keys = {"": lambda r: 0, "shortest": lambda r: r["length"], "longest": lambda r: -r["length"],
            "advantage": lambda r: -r["advantage"]}  # fmt: skip
    answers.sort(key=keys[order])
    for colour, text in zip(("logp", "advantage", "version", "none"), drawn, strict=True):
        page = Page(text)
        assert {tag for tag, _ in page.tags} == {"section", "div", "button", "span", "p", "article", "b"}
        spans = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
        tokens = [t for row in answers for t in row["tokens"]]
        assert len(spans) == len(tokens)
        assert "".join(tokens[:9]) in "".join(page.text) and answers[0]["prompt"] in page.text
        per_token = {
            "logp": [70 * min(-round(100 * x) / 100, 4) / 4 for row in answers for x in row["logprobs"]],
            "advantage": [60 * min(abs(r["advantage"]), 2) / 2 for r in answers for _ in r["tokens"]],
            "version": [50 if v == 4 else 0 for r in answers for v in np.repeat(*np.array(r["versions"]).T)],
            "none": [0] * len(tokens),
        }[colour]
        for span, strength in zip(spans, per_token, strict=True):
            shown = int(span.get("style", "--s:0").rpartition(":")[2])
            assert abs(shown - strength) <= 1.001
        titles = [t for row in answers for t in np.exp(np.round(row["logprobs"], 2))]
        assert all(abs(float(s["title"].split()[1].rstrip(",")) / p - 1) < 0.011
                   for s, p in zip(spans, titles, strict=True))  # fmt: skip
    right = [row["outcome"] for row in answers].count("correct")
    mean = float(re.search(r">mean ([\d.]+) tokens<", drawn[0]).group(1))
    assert "2 steps older" in drawn[0] and f">{right} of 4 correct<" in drawn[0]
    assert mean == pytest.approx(np.mean([row["length"] for row in answers]), abs=0.051)


@node
def test_the_script_shows_a_few_answers_of_many_and_offers_the_rest(tmp_path):
    run = made_run(tmp_path, [5], groups=1, answers=16)
    data = data_of(browser.section([("x", run)], 10**6))
    given = {"index": data["r0"], "blob": data["r0-0"], "at": 0, "order": "", "all": False}
    text = run_script(GROUP, given)[0]
    assert text.count("<article") == 6 and ">10 more</button>" in text and "6 shown" in text
    text = run_script(GROUP, given | {"all": True})[0]
    assert text.count("<article") == 16 and "more</button>" not in text and "dropped: lspo/middle" in text


@node
def test_the_controls_are_escaped_and_offer_what_there_is(one):
    data = data_of(one[1])
    given = [data["r0"], data["r0"] | {"label": HOSTILE}]
    program = "return page.controls(given, {...page.START, problem: given[1].label, step: '7'}).text"
    page = Page(run_script(program, given))
    assert {tag for tag, _ in page.tags} == {"label", "select", "option", "span", "button", "input"}
    chosen = [attributes["value"] for tag, attributes in page.tags if tag == "option" and "value" in attributes]
    assert set(chosen) >= {"cut", "kept", "dropped", "logp", "advantage", "version", "ungraded"}
    assert [a.get("value") for t, a in page.tags if t == "input"][0] == HOSTILE
    assert "<option selected>7</option>" in run_script(program, given)
