"""Length control against the definitions written out by hand."""

import math

import numpy as np
import pytest

from jaxrl.evaluation.lengths import generation_cap, length_metrics, log_linear_slope, sweep_metrics


def records(*rows):
    return [{"budget": b, "samples": [{"tokens": n} for n in lengths]} for b, lengths in rows]


def test_length_metrics_by_hand():
    out = length_metrics(records((10, [10, 12]), (20, [10]), (None, [999])), tolerance=1)
    deviations = [0.0, 0.2, -0.5]
    assert out["mean_error"] == pytest.approx(-0.1)
    assert out["mean_deviation"] == pytest.approx(0.7 / 3)
    assert out["rmse"] == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 3))
    assert out["hard_violation"] == pytest.approx(1 / 3)
    assert out["soft_violation"] == pytest.approx(1 / 3)
    assert length_metrics(records((10, [12])), tolerance=2)["soft_violation"] == 0
    assert length_metrics(records((None, [3]))) == {}


def test_caps_are_l1s():
    assert [generation_cap(512, "exact"), generation_cap(512, "max"), generation_cap(512, "max", 9)] == [
        1024,
        8192,
        9,
    ]


def test_log_linear_slope_recovers_a_line():
    tokens = np.array([512, 1024, 2048, 3600])
    assert log_linear_slope(tokens, 0.1 + 0.24 * np.log(tokens)) == pytest.approx(0.24)
    noisy = [0.2, 0.35, 0.3, 0.5]
    assert log_linear_slope(tokens, noisy) == pytest.approx(np.polyfit(np.log(tokens), noisy, 1)[0])
    assert math.isnan(log_linear_slope([5, 5], [0.1, 0.2])) and math.isnan(log_linear_slope([5], [0.1]))


def test_sweep_metrics_are_s1s_three_and_l1s_error():
    rows = [
        dict(budget=100, mean_tokens=90, accuracy=0.2, mean_error=-0.1),
        dict(budget=200, mean_tokens=220, accuracy=0.5, mean_error=0.1),
        dict(budget=400, mean_tokens=400, accuracy=0.4, mean_error=0.0),
    ]
    out = sweep_metrics(rows)
    slopes = [0.3 / 130, 0.2 / 310, -0.1 / 180]
    assert out["scaling"] == pytest.approx(1000 * np.mean(slopes))
    assert out["control"] == pytest.approx(2 / 3)
    assert (out["performance"], out["mean_error"]) == (0.5, pytest.approx(0.2 / 3))
