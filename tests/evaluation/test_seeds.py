"""Means over seeds of budget sweeps, against figures made by hand."""

import json
import math

import pytest

from jaxrl.evaluation.seeds import average_sweeps, mean_and_half, plus_minus, sweep_tables

T2 = 4.303  # 97.5 % quantile of Student's t, 2 degrees of freedom


def result(accuracy, tokens, control, slope=0.1):
    rows = [
        dict(data="a", budget=b, accuracy=accuracy + i / 10, mean_tokens=tokens + b, mean_error=-0.1, rmse=0.2 + i / 10,
             mean_deviation=0.3, hard_violation=0.5, soft_violation=0.0)
        for i, b in enumerate((8, 16))
    ]  # fmt: skip
    rows.append(dict(rows[0], data="other", budget=None))
    sweep = dict(mean_error=0.05, log_linear_slope=slope, control=control, scaling=20.0, performance=accuracy + 0.1)
    return {"results": rows, "sweeps": {"a step 9": sweep}}  # as of a run directory


def test_average_over_three_seeds():
    out = average_sweeps([result(0.4, 1, 0.5), result(0.5, 2, 1.0), result(0.6, 3, 1.0)])["a"]
    half = T2 * 0.1 / math.sqrt(3)
    assert out["seeds"] == 3
    assert out["budgets"][16]["accuracy"] == pytest.approx([0.6, half], rel=1e-3)
    assert out["budgets"][8]["mean_tokens"] == pytest.approx([10.0, 10 * half], rel=1e-3)
    assert out["summary"]["control"][0] == pytest.approx(2.5 / 3)
    assert out["summary"]["rmse"] == pytest.approx([0.25, 0.0])  # not in a sweep's figures: the mean over budgets
    assert out["summary"]["performance"][0] == pytest.approx(0.6)
    json.dumps(out)


def test_tables_say_the_same():
    sweeps = {"mine": average_sweeps([result(0.4, 1, 0.5), result(0.6, 1, 0.5)]), "one seed": average_sweeps([result(0.4, 1, 0.5, None)])}  # noqa: E501
    text = sweep_tables(sweeps)
    half = 12.706 * math.sqrt(0.02) / math.sqrt(2)
    assert f"| {50.0} ± {100 * half:.1f} (9.0) | {60.0} ± {100 * half:.1f} (17.0) |" in text
    # accuracy per doubling is ln 2 x the slope; scaling is stored per 1000 tokens and said in percent per token
    assert "| mine | 2 | 5.0 ± 0.0 | 25.0 ± 0.0 | 50.0 ± 0.0 | 6.9 ± 0.0 | 50.0 ± 0.0 | 2.0 ± 0.0 |" in text
    assert "| one seed | 1 | 5.0 | 25.0 | 50.0 |  | 50.0 | 2.0 | 50.0 |" in text
    assert sweep_tables({}) == ""


def test_numbers_with_intervals():
    assert plus_minus([0.123, 0.01]) == "12.3 ± 1.0"
    assert plus_minus([0.123, 0.01], signed=True, star=True) == "+12.3 ± 1.0*"
    assert plus_minus([-0.005, 0.01], signed=True, star=True) == "-0.5 ± 1.0"
    assert plus_minus(mean_and_half([0.5])) == "50.0" and plus_minus(None) == ""
