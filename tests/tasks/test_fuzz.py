"""Whatever the text or the file: no exception but the documented ones."""

import gzip
import json
import pathlib
import random
import tempfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxrl.errors import UserError
from jaxrl.tasks import dial
from jaxrl.tasks.answers import Answer, extract, reference
from jaxrl.tasks.choices import choice_letter
from jaxrl.tasks.data import load_problems
from jaxrl.tasks.equality import clean, decide, plain_number, too_costly
from jaxrl.tasks.grader import OUTCOMES, Grader
from jaxrl.types import Problem

PIECES = [
    *["\\boxed{", "\\fbox{", "\\boxed", "{", "}", "(", ")", "[", "]", "$", "$$", "\\[", "\\]", "\\(", "\\)"],
    *[
        "\\frac{",
        "\\frac",
        "\\sqrt(",
        "\\sqrt{",
        "\\text{",
        "\\overline{",
        "\\pm",
        "\\circ",
        "^",
        "_",
        "_{8}",
    ],
    *[
        "^{",
        "!",
        "=",
        "\\approx",
        "<",
        ",",
        ";",
        ":",
        ".",
        "\\,",
        "\\!",
        " ",
        "\n",
        "%",
        "\\%",
        "\\",
        "\\\\",
        "&",
    ],
    *[
        "0",
        "1",
        "12",
        "007",
        "1,000",
        "3.5",
        "1e3",
        "e",
        "x",
        "y",
        "xy",
        "-",
        "+",
        "/",
        "*",
        "**",
        "\\cdot",
        "\\times",
    ],
    *[
        "Clara",
        "and",
        "or",
        " cm",
        "percent",
        "answer is ",
        "final answer: ",
        "####",
        "<think>",
        "</think>",
        "(C)",
    ],
    *["\\begin{pmatrix}", "\\end{pmatrix}", "\\infty", "\\ldots", "f(x)", "\u0663", "½", "\ud800", "，"],
]
LATEX = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
TEXT = st.one_of(LATEX, st.text(max_size=200))
QUICK = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(text=TEXT, gold=TEXT)
@example(text="\\boxed{\u0661/\u0660}", gold="1")
def test_extraction_and_decisions_never_raise(text, gold):
    answer, ref = extract(text), reference(gold)
    choice_letter(text)
    if answer is not None:
        assert answer.latex and decide(ref, answer) in (True, False, None)
        assert too_costly(answer.latex) in ("", "long", "deep", "digits", "magnitude")


@QUICK
@given(latex=LATEX, bare=st.booleans())
def test_everything_equals_itself(latex, bare):
    answer = Answer(latex, bare)
    assert decide(answer, answer) is not False


@QUICK
@given(
    number=st.fractions(max_denominator=10**6),
    layout=st.sampled_from(["{}", "\\boxed{{{}}}", "${}$", "The answer is {}.", "#### {}", "{} cm"]),
)
def test_numbers_are_read_as_written(number, layout):
    text = str(number) if number.denominator > 1 else f"{number.numerator:,}"
    answer = extract(layout.format(text))
    assert plain_number(clean(answer.latex), answer.bare).value == number


@QUICK
@given(text=TEXT)
def test_dial_never_raises(text):
    assert dial.grade(Problem("d", "dial 1: a+1 ?", "2", "dial"), text) in ("correct", "wrong", "unparsed")


FIELD = st.sampled_from(
    ["problem", "answer", "id", "choices", "prompt", "reward_model", "ground_truth", "content"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD, inner, max_size=4),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(FIELD, JSON, max_size=6) | JSON, max_size=5)


def load(data: bytes, name: str, skip: bool):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / name
        path.write_bytes(data)
        try:
            loaded = load_problems(str(path), skip_bad_rows=skip, duplicates="drop")
        except UserError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            return
    assert loaded.problems and all(
        isinstance(p.prompt, str) and p.prompt.strip() and isinstance(p.answer, str) and p.answer.strip()
        for p in loaded.problems
    )


@settings(QUICK, max_examples=120)
@given(rows=ROWS, skip=st.booleans())
def test_any_json_rows(rows, skip):
    load("\n".join(json.dumps(r) for r in rows).encode(), "x.jsonl", skip)
    load(json.dumps(rows).encode(), "x.json", skip)


@QUICK
@given(data=st.binary(max_size=300), name=st.sampled_from(["x.jsonl", "x.jsonl.gz", "x.json", "x.parquet"]))
def test_any_bytes(data, name):
    load(data, name, True)


@QUICK
@given(cut=st.integers(0, 200), flip=st.integers(0, 200), bit=st.integers(0, 7))
def test_damaged_gzip(cut, flip, bit):
    data = bytearray(gzip.compress(b'{"problem": "x", "answer": "1"}\n' * 3, mtime=0))
    if flip < len(data):
        data[flip] ^= 1 << bit
    load(bytes(data[: len(data) - cut]), "x.jsonl.gz", False)


def algebra(seed: int, count: int) -> None:
    rng = random.Random(seed)
    pairs = []
    while len(pairs) < count:
        latex = "".join(rng.choices(PIECES, k=rng.randint(2, 12))).replace("\ud800", "")
        pairs.append(("\\boxed{" + latex + "}", rng.choice(["x+1", "5", latex[::-1]])))
    with Grader(workers=1, timeout=20.0) as grader:
        assert set(grader.grade(pairs)) <= set(OUTCOMES)


def test_algebra_on_scrambled_formulas():
    algebra(0, 150)


@pytest.mark.slow
def test_algebra_on_many_scrambled_formulas():
    algebra(1, 2000)
