"""Means over seeds of budget sweeps, against figures made by hand."""

import json
import math

import pytest

from jaxrl.evaluation.seeds import average_sweeps, mean_and_half, plus_minus, sweep_tables

T2 = 4.303  # 97.5 % quantile of Student's t, 2 degrees of freedom


def result(accuracy, tokens, step=8):
    rows = [
        dict(data="a", budget=b, accuracy=accuracy + i / 10, mean_tokens=tokens + step * i, mean_error=0.1 - 0.3 * i,
             rmse=0.2 + i / 10, mean_deviation=0.3, hard_violation=0.5, soft_violation=0.0)
        for i, b in enumerate((8, 16))
    ]  # fmt: skip
    rows.append(dict(rows[0], data="other", budget=None))
    return {"results": rows, "sweeps": {"a step 9": {}}}


def test_average_over_three_seeds():
    out = average_sweeps([result(0.4, 7), result(0.5, 8), result(0.6, 9)])
    half = T2 * 0.1 / math.sqrt(3)
    assert list(out) == ["a"] and out["a"]["seeds"] == 3
    budgets, summary = out["a"]["budgets"], out["a"]["summary"]
    assert budgets[16]["accuracy"] == pytest.approx([0.6, half], rel=1e-3)
    assert budgets[8]["mean_tokens"] == pytest.approx([8.0, 10 * half], rel=1e-3)
    assert summary["control"][0] == pytest.approx(2 / 3)  # both, both and none of the budgets kept
    assert summary["rmse"] == pytest.approx([0.25, 0.0])
    assert summary["mean_error"] == pytest.approx([0.15, 0.0])  # mean of |0.1| and |-0.2|
    assert summary["performance"] == pytest.approx([0.6, half], rel=1e-3)
    slopes = [0.1 / math.log((n + 8) / n) for n in (7, 8, 9)]
    assert summary["log_linear_slope"][0] == pytest.approx(sum(slopes) / 3)
    json.dumps(out)


def test_tables_say_the_same():
    same = average_sweeps([result(0.4, 8, 0.01)])  # hardly another length: no slope
    text = sweep_tables({"mine": average_sweeps([result(0.4, 8), result(0.6, 8)]), "same length": same})
    half = 12.706 * math.sqrt(0.02) / math.sqrt(2)
    assert f"| 50.0 ± {100 * half:.1f} (8.0) | 60.0 ± {100 * half:.1f} (16.0) |" in text
    # accuracy per doubling is 0.1: one doubling apart; and 0.1 in 8 tokens is 1.25 percent per token
    assert "| mine | 2 | 15.0 ± 0.0 | 25.0 ± 0.0 | 50.0 ± 0.0 | 10.0 ± 0.0 | 100.0 ± 0.0 | 1.2 ± 0.0 |" in text
    assert "| same length | 1 | 15.0 | 25.0 | 50.0 |  | 100.0 |  | 50.0 |" in text
    assert sweep_tables({}) == ""


def test_numbers_with_intervals():
    assert plus_minus([0.123, 0.01]) == "12.3 ± 1.0"
    assert plus_minus([0.123, 0.01], signed=True, star=True) == "+12.3 ± 1.0*"
    assert plus_minus([-0.005, 0.01], signed=True, star=True) == "-0.5 ± 1.0"
    assert plus_minus(mean_and_half([0.5])) == "50.0" and plus_minus(None) == ""
