"""Grades of every kind of task; reward functions that fail in every way."""

import datetime
import logging

import numpy as np
import pytest

from jaxrl.errors import UserError
from jaxrl.tasks import dial
from jaxrl.tasks.grader import Grader
from jaxrl.tasks.rewards import UserReward, grade_group
from jaxrl.tasks.task import Grade
from jaxrl.types import Problem

LONG = 120.0
MODULE = "tests.tasks.user_rewards"
CORRECT, WRONG, UNPARSED = (
    Grade(1.0, 1.0, True, "correct"),
    Grade(0.0, 0.0, True, "wrong"),
    Grade(0.0, 0.0, True, "unparsed"),
)


def problems(n, **kwargs):
    return [Problem(f"p{i}", "P", "A", **kwargs) for i in range(n)]


def test_dial_needs_no_grader():
    [p] = dial.problems("train", 0, 1)
    other = "1" if p.answer == "0" else "0"
    texts = [f" => {p.answer}.", f" => {other}.", " a=1"]
    assert grade_group([p] * 3, texts) == [CORRECT, WRONG, UNPARSED]


def test_choice():
    p = Problem("q", "?", "C", "choice")
    assert grade_group([p] * 3, [r"\boxed{\text{(C)}}", "Answer: B", "dunno"]) == [CORRECT, WRONG, UNPARSED]


def test_mixed_kinds_keep_their_order():
    [d] = dial.problems("train", 0, 1)
    c, m = Problem("c", "?", "C", "choice"), Problem("m", "?", "1+x", "math")
    default = Problem("m2", "?", "7")
    with Grader(workers=1, timeout=LONG) as grader:
        grades = grade_group(
            [m, d, default, c, m], [r"\boxed{x+1}", "no", "#### 7", "Answer: C", r"\boxed{x}"], grader
        )
    assert grades == [CORRECT, UNPARSED, CORRECT, CORRECT, WRONG]


@pytest.mark.parametrize(
    ("outcome", "grade"),
    [("timeout", Grade(0.0, 0.0, False, "timeout")), ("crashed", Grade(0.0, 0.0, False, "crashed"))],
)
def test_failures_of_the_grader_are_not_valid(outcome, grade):
    class Failing:
        reading = {}

        def grade(self, pairs):
            return [outcome] * len(pairs)

    assert grade_group([Problem("m", "?", "7", "math")], ["7"], Failing()) == [grade]


@pytest.mark.parametrize(
    ("task", "message"),
    [("math", "needs a grader"), ("user", "module:function"), ("poetry", "valid: dial, math, choice, user")],
)
def test_what_is_missing_is_a_user_error(task, message):
    with pytest.raises(UserError, match=message):
        grade_group([Problem("x", "?", "1", task)], ["1"])


def test_user_reward_gets_the_row():
    info = {"level": 3, "when": datetime.date(2026, 1, 2), "n": np.int64(5), "answer": "other"}
    p = problems(1, task="user", info=info)
    with UserReward(f"{MODULE}:everything", timeout=LONG) as reward:
        assert grade_group(p, ["text"], reward=reward) == [Grade(1.0, 3.2, True, "correct")]
        assert (reward.calls, reward.failures) == (1, 0)


def test_correctness_is_kept_beside_a_user_reward():
    p = [Problem("c", "?", "C", "choice")] * 2
    with UserReward(f"{MODULE}:length", timeout=LONG) as reward:
        grades = grade_group(p, ["Answer: C", "Answer: B!"], reward=reward)
    assert grades == [Grade(1.0, 9.0, True, "correct"), Grade(0.0, 10.0, True, "wrong")]


def test_rewards_below_one_are_not_correct():
    with UserReward(f"{MODULE}:by_text", timeout=LONG) as reward:
        grades = grade_group(problems(4, task="user"), ["0.5", "1", "-2", "true"], reward=reward)
    assert [(g.correct, g.reward) for g in grades] == [(0.0, 0.5), (1.0, 1.0), (0.0, -2.0), (1.0, 1.0)]


def test_a_reward_may_be_a_sum_of_named_ones(caplog):
    """Correct is what its own reward says, or the sum; bad names and numbers fail that completion only."""
    texts = ["brief=0.25 tone=0.5", "correct=1 tone=-3", "brief=1", "", "length=1", "2x=1", "a=nan", "a=3e38 b=3e38"]
    with UserReward(f"{MODULE}:named", timeout=LONG) as reward, caplog.at_level(logging.WARNING):
        grades = grade_group(problems(len(texts), task="user"), texts, reward=reward)
    assert [(g.correct, g.reward, g.named) for g in grades[:3]] == [
        (0.0, 0.75, {"brief": 0.25, "tone": 0.5}),
        (1.0, -2.0, {"correct": 1.0, "tone": -3.0}),
        (1.0, 1.0, {"brief": 1.0}),
    ]
    assert [(g.valid, g.named) for g in grades] == [(True, g.named) for g in grades[:3]] + [(False, {})] * 5
    assert "returned an empty dict" in caplog.text


def test_numbers_of_numpy_are_numbers():
    with UserReward(f"{MODULE}:by_text", timeout=LONG) as reward:
        found = reward.rewards(problems(3), ["numpy.true", "numpy.half", "numpy.one"])
    assert found == [(1.0, "ok"), (0.5, "ok"), (1.0, "ok")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("none", "TypeError: returned None, not a number"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("1e39", "returned 1e+39, infinite in float32"),
        ("list", "TypeError: returned list"),
        ("text", "TypeError: returned str"),
        ("raise", "KeyError: 'missing thing'"),
        ("leave", "SystemExit: 2"),
        ("exit", "ended its process"),
        ("abc", "ValueError"),
    ],
)
def test_failing_calls_are_masked_and_named(text, reason, caplog):
    with UserReward(f"{MODULE}:by_text", timeout=LONG) as reward, caplog.at_level(logging.WARNING):
        grades = grade_group(problems(3, task="user"), ["0.25", text, "1"], reward=reward)
    assert grades == [Grade(0.0, 0.25, True, "wrong"), Grade(0.0, 0.0, False, "crashed"), CORRECT]
    [record] = caplog.records
    message = record.getMessage()
    assert "problem 'p1'" in message and reason in message and "1 of 3" in message and "by_text" in message


def test_a_call_that_never_returns_is_masked():
    with UserReward(f"{MODULE}:by_text", timeout=LONG) as reward:
        assert grade_group(problems(1, task="user"), ["1"], reward=reward) == [CORRECT]
        reward._pool.timeout = 0.3
        assert grade_group(problems(1, task="user"), ["hang"], reward=reward) == [
            Grade(0.0, 0.0, False, "timeout")
        ]
        reward._pool.timeout = LONG
        assert grade_group(problems(1, task="user"), ["1"], reward=reward) == [CORRECT]


def test_a_failed_reward_masks_a_graded_answer_too():
    p = Problem("c", "?", "C", "choice")
    with UserReward(f"{MODULE}:by_text", timeout=LONG) as reward:
        assert grade_group([p], ["Answer: C"], reward=reward) == [Grade(0.0, 0.0, False, "crashed")]


def test_too_many_failures_stop_the_run():
    with UserReward(f"{MODULE}:by_text", timeout=LONG, max_failures=0.25) as reward:
        good = ["1"] * 12
        reward.rewards(problems(16), [*good, "none", "none", "none", "none"])  # exactly the share allowed
        with pytest.raises(UserError, match=r"failed 5 of 17 times, more than the share of 0.25.*'p0'.*None"):
            reward.rewards(problems(1), ["none"])


def test_few_calls_say_nothing_about_the_share():
    with UserReward(f"{MODULE}:by_text", timeout=LONG, max_failures=0.0) as reward:
        assert reward.rewards(problems(2), ["none", "1"]) == [(None, "crashed"), (1.0, "ok")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module_anywhere:f", "No module named"),
        (f"{MODULE}:absent", "has no function 'absent'"),
        (f"{MODULE}:NOT_A_FUNCTION", "has no function"),
    ],
)
def test_functions_that_cannot_be_found(spec, message):
    with UserReward(spec, timeout=LONG) as reward, pytest.raises(UserError, match=message):
        reward.rewards(problems(1), ["1"])


@pytest.mark.parametrize("spec", ["", "module", "module:", ":function"])
def test_specs_that_name_nothing(spec):
    with pytest.raises(UserError, match="module:function"):
        UserReward(spec)


def test_a_signature_without_info_fails_clearly(caplog):
    with UserReward(f"{MODULE}:needs_no_info", timeout=LONG) as reward, caplog.at_level(logging.WARNING):
        reward.rewards(problems(1), ["1"])
    assert "unexpected keyword argument 'id'" in caplog.text
