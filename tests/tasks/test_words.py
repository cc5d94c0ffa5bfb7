"""The data set that is made: right answers, no question in both halves, a fixed function of its settings."""

import re

import pytest

from jaxrl.errors import UserError
from jaxrl.tasks import words
from jaxrl.tasks.data import load_problems


@pytest.mark.parametrize("lengths", ["four", "many"])
@pytest.mark.parametrize("kind", words.KINDS)
def test_every_line_of_working_is_right_and_ends_in_the_answer(kind, lengths):
    for row in words.rows(f"words:kind={kind}:split=demos:count=300:lengths={lengths}"):
        for x, sign, y, z in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["solution"]):
            x, y, z = int(x), int(y), int(z)
            assert {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[sign] == z, row
        assert row["solution"].endswith(f"The answer is \\boxed{{{row['answer']}}}.") and int(row["answer"]) >= 0


def test_training_and_held_out_questions_are_apart_and_do_not_repeat():
    train, test, demos = (
        [r["problem"] for r in words.rows(f"words:split={s}:count=400")] for s in ("train", "test", "demos")
    )
    assert not set(test) & (set(train) | set(demos)) and len(set(train)) == len(set(test)) == 400
    assert [r["problem"] for r in words.rows("words:split=train:count=50")] == train[:50]
    assert [r["problem"] for r in words.rows("words:seed=1:count=50")] != train[:50]


def test_is_a_data_set_like_any_other():
    loaded = load_problems("words:split=test:count=3").problems
    assert [p.task for p in loaded] == ["math"] * 3 and loaded[0].id == "words/test/0/0"
    assert loaded[0].info["solution"]


@pytest.mark.parametrize(("spec", "said"), [
    ("words:split=dev", "choose one of train, test, demos"), ("words:size=3", "need one of split, kind"),
    ("words:count=x", "need one of"), ("words:most=3", "most within 10..500"),
])  # fmt: skip
def test_wrong_settings_are_one_line(spec, said):
    with pytest.raises(UserError, match=said):
        load_problems(spec)
