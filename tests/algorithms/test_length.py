"""Length rewards against hand-computed values, prompt suffixes, budget samplers and length metrics."""

import numpy as np
import pytest

from jaxrl.algorithms.hyper import Method
from jaxrl.algorithms.length import (
    LENGTH_REWARDS,
    LengthInputs,
    laser_targets,
    length_rewards,
)
from jaxrl.algorithms.length_metrics import budget_metrics, control, performance, scaling
from jaxrl.tasks.budgets import sample_budgets


def _reward(
    name, correct, lengths, budgets=0, ids=0, truncated=False, max_length=1000, modes="none", **constants
):
    inputs = LengthInputs(correct, lengths, max_length, budgets, modes, ids, truncated)
    return length_rewards(name, inputs, constants)


@pytest.mark.parametrize("name", LENGTH_REWARDS)
def test_shape_dtype_and_purity(name):
    correct, lengths = np.array([1.0, 0.0, 1.0], np.float32), np.array([10, 20, 30], np.int32)
    before = correct.copy(), lengths.copy()
    found = _reward(name, correct, lengths, budgets=15, ids=[4, 4, -1])
    assert found.dtype == np.float64 and found.shape == (3,) and np.all(np.isfinite(found))
    assert np.array_equal(correct, before[0]) and np.array_equal(lengths, before[1])
    assert _reward(name, [], []).shape == (0,)


def test_a_reward_of_another_column_and_of_another_shape(monkeypatch):
    """What a method adds to the rollouts is there; a wrong shape is one line."""
    inputs = LengthInputs([1, 0], [3, 4], 10, columns={"waits": np.array([2, 0])})
    monkeypatch.setitem(LENGTH_REWARDS, "waits", Method(lambda inputs, hyper: inputs.columns["waits"]))
    assert length_rewards("waits", inputs).tolist() == [2.0, 0.0]
    monkeypatch.setitem(LENGTH_REWARDS, "wrong", Method(lambda inputs, hyper: 1.0))
    with pytest.raises(ValueError, match=r"length reward 'wrong' must return \[2\], not \[\]"):
        length_rewards("wrong", inputs)


@pytest.mark.parametrize(
    ("budget", "length", "right", "value"),
    [(1000, 1500, 1, 0.85), (1000, 1500, 0, -0.15), (4000, 0, 0, -1.2)],
)
def test_lcpo_exact_golden(budget, length, right, value):
    np.testing.assert_allclose(_reward("lcpo_exact", [right], [length], budget, modes="exact"), [value])


@pytest.mark.parametrize(("length", "value"), [(400, 1.0), (1000, 0.5), (1300, 0.2), (1600, 0.0)])
def test_lcpo_max_golden(length, value):
    np.testing.assert_allclose(
        _reward("lcpo_max", [1, 0], [length] * 2, 1000, modes="max"), [value, 0], atol=1e-12
    )


def test_lcpo_constants_and_mixed_prompts():
    """Released Exact slope 1/3000; one batch with exact, max and unbudgeted prompts; the code's additive
    variant.
    """
    np.testing.assert_allclose(_reward("lcpo_exact", [1], [1300], 1000, modes="exact", alpha=1 / 3000), [0.9])
    mixed = _reward(
        "lcpo_max", [1, 1, 1, 0], [1200] * 4, [1000, 1000, 0, 1000], modes=["exact", "max", "none", "exact"]
    )
    np.testing.assert_allclose(mixed, [1 - 0.06, 0.3, 1.0, -0.06])
    np.testing.assert_allclose(_reward("lcpo_exact", [1, 0], [900, 900], 0), [1, 0])
    np.testing.assert_allclose(_reward("lcpo_max", [1, 0], [1200] * 2, 1000, combine="add"), [1.3, 0.3])
    np.testing.assert_allclose(
        _reward("lcpo_max", [1, 0], [1200] * 2, 1000, form="sigmoid_paper"), [1 / (1 + np.exp(0.2)), 0]
    )
    # A correct slight overrun still beats any wrong answer (delta > 0); a budget of 1 is expressible here.
    assert _reward("lcpo_max", [1], [1400], 1000)[0] > 0
    assert _reward("lcpo_max", [1], [1], 1, modes="max")[0] == 0.5
    with pytest.raises(ValueError, match="lcpo_max scores both"):
        _reward("lcpo_exact", [1], [5], 10, modes="max")
    with pytest.raises(ValueError, match="combine='plus' must be one of multiply, add"):
        _reward("lcpo_max", [1], [5], 10, combine="plus")
    with pytest.raises(ValueError, match="form='cubic' must be one of linear, sigmoid, sigmoid_paper"):
        _reward("lcpo_max", [1], [5], 10, form="cubic")


def test_the_released_sigmoid_adds_a_tenth_within_the_budget():
    """L1's get_delta_score_sigmoid: + 0.1 at or below the budget, clipped to 1."""
    lengths = [0, 900, 1000, 1001, 5000]
    found = _reward("lcpo_max", [1] * 5, lengths, 1000, form="sigmoid", alpha=0.01)
    sigmoid = [1 / (1 + np.exp(-0.01 * (1000 - n))) for n in lengths]
    expected = [1.0, min(sigmoid[1] + 0.1, 1), 0.6, sigmoid[3], sigmoid[4]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    plain = _reward("lcpo_max", [1] * 5, lengths, 1000, form="sigmoid_paper", alpha=0.01)
    np.testing.assert_allclose(found - plain, np.array(expected) - sigmoid, atol=1e-12)
    assert _reward("lcpo_max", [0], [0], 1000, form="sigmoid")[0] == 0  # multiplied with correctness


def test_arora_and_kimi_work_group_by_group():
    correct, lengths, ids = [1, 1, 0, 1, 0, 0], [10, 30, 50, 7, 9, 20], [3, 3, 3, 8, 8, 8]
    z = np.array([-1.0, 1.0])
    expected = [*(1 - 0.4 / (1 + np.exp(-z))), 0, 1 - 0.4 / 2, 0, 0]
    np.testing.assert_allclose(_reward("arora", correct, lengths, ids=ids, alpha=0.4), expected, rtol=1e-6)
    cut = [False, True, False, False, False, False]
    np.testing.assert_allclose(_reward("arora", correct, lengths, ids=ids, truncated=cut)[:3], [0.95, 0, 0])
    np.testing.assert_allclose(
        _reward("kimi", correct, lengths, ids=ids),
        [1.5, 1.0, -0.5, 1.5, 0.0, -0.5],
        atol=1e-12,
    )
    np.testing.assert_allclose(_reward("kimi", correct, lengths, ids=ids, weight=0.1)[2], -0.05)
    np.testing.assert_allclose(_reward("kimi", [1, 0], [5, 5]), [1, 0])


def test_alp_shorter_better():
    correct, lengths, ids = [1, 0, 0, 0, 1, 1], [10, 20, 30, 40, 10, 20], [0, 0, 0, 0, 1, 1]
    found = _reward("alp", correct, lengths, ids=ids, beta=0.2, max_length=100)
    np.testing.assert_allclose(found, [1 - 0.005, -0.01, -0.015, -0.02, 0.98, 0.96])
    none = _reward("alp", [0, 0], [10, 20], beta=0.2, N=10)  # p_solved 0 counts as 1 / K
    np.testing.assert_allclose(none, [-0.1, -0.2])
    found = _reward("shorter_better", correct, lengths, ids=ids)
    np.testing.assert_allclose(found, [2, -0.01, -0.02, -0.03, 2, 1.99])
    np.testing.assert_allclose(
        _reward("shorter_better", [0, 0], [10, 20], alpha=1.0, beta=0.01), [-0.05, -0.05]
    )


def test_laser_and_laser_d():
    np.testing.assert_allclose(_reward("laser", [1, 1, 0], [40, 41, 5], target=40), [1.5, 1.0, 0.0])
    np.testing.assert_allclose(_reward("laser", [1, 1], [500, 501], max_length=1000), [1.5, 1.0])
    # G = 3: easy groups (3/3) expect int(3 * 2/3) = 2 correct, medium (1/3) 1, hard 1.
    correct = [1, 1, 1, 1, 0, 0, 0, 0, 0]
    lengths = [10, 30, 90, 50, 60, 70, 80, 80, 80]
    ids = np.repeat([0, 1, 2], 3)
    targets = laser_targets(LengthInputs(correct, lengths, 120, group=ids), [20, 40, 60, 80, 100], "correct")
    assert targets == {
        "easy": 40.0,
        "medium": 60.0,
        "hard": 120.0,
    }  # int(1/3 * 2) = 0 at 20, int(2/3 * 2) = 1 at 40
    found = _reward("laser_d", correct, lengths, ids=ids, max_length=100, candidates=5, coverage="correct")
    np.testing.assert_allclose(found, [1.5, 1.5, 1.0, 1.5, 0, 0, 0, 0, 0])
    fixed = _reward("laser_d", correct, lengths, ids=ids, target_easy=95, target_medium=49, target_hard=1)
    np.testing.assert_allclose(fixed, [1.5, 1.5, 1.5, 1.0, 0, 0, 0, 0, 0])


def released_targets(correct, lengths, thresholds):
    """LASER-D's released choice written out for groups of one size: bands by > 2/3 and > 1/3, coverage over all of
    their responses, the longest response where no threshold fits."""
    size, longest, targets = len(correct[0]), max(map(max, lengths)), {}
    for name, low, high, expected in (
        ("easy", 2 / 3, 2, int(size * 2 / 3)), ("medium", 1 / 3, 2 / 3, int(size / 3)), ("hard", -1, 1 / 3, 1),
    ):  # fmt: skip
        pool = [n for c, row in zip(correct, lengths, strict=True) if low < sum(c) / size <= high for n in row]
        targets[name] = float(longest)
        for threshold in thresholds:
            covered = sum(n <= threshold for n in pool) / len(pool) if pool else 0.0
            if int(covered * expected) >= 1 and threshold < targets[name]:
                targets[name] = float(threshold)
    return targets


def test_laser_d_takes_the_released_coverage_unless_told():
    """Wrong answers are long: counting them, too, raises the targets of medium and hard prompts."""
    thresholds = range(2048, 16385, 1024)
    correct = [[1] * 6 + [0] * 2, [1] * 4 + [0] * 4, [1] * 2 + [0] * 6]
    lengths = [
        [900, 1500, 2000, 5000, 7000, 8000, 9000, 9500],
        [3900, 4000, 5900, 6100, 8000, 9000, 12000, 15000],
        [5500, 6100, 9000, 10000, 12000, 14000, 16000, 16319],
    ]
    flat = LengthInputs(np.ravel(correct), np.ravel(lengths), 16384, group=np.repeat([0, 1, 2], 8))
    released = laser_targets(flat, thresholds)
    assert list(released.values()) == [2048, 6144, 16319] and released == released_targets(correct, lengths, thresholds)
    assert list(laser_targets(flat, thresholds, "correct").values()) == [2048, 4096, 6144]
    rng = np.random.default_rng(0)
    for _ in range(50):
        correct, lengths = rng.integers(0, 2, (6, 8)).tolist(), rng.integers(1, 16385, (6, 8)).tolist()
        flat = LengthInputs(np.ravel(correct), np.ravel(lengths), 16384, group=np.repeat(np.arange(6), 8))
        assert laser_targets(flat, thresholds) == released_targets(correct, lengths, thresholds)
    # exactly 2/3 correct: coverage counts the prompt as medium, the reward as easy
    edge = LengthInputs([1, 1, 0], [10, 20, 30], 40)
    assert laser_targets(edge, [10, 20, 40]) == {"easy": 30, "medium": 30, "hard": 30}
    assert _reward("laser_d", [1, 1, 0], [10, 20, 30], target_easy=15).tolist() == [1.5, 1, 0]


def test_overlong_and_dler():
    lengths = [800, 801, 900, 1000, 1100]
    found = _reward("overlong", [1] * 5, lengths, max_length=1000)  # cache: a fifth, 200
    np.testing.assert_allclose(found, [1, 0.995, 0.5, 0, 0])
    np.testing.assert_allclose(_reward("overlong", [0] * 5, lengths, floor=False)[-1], -1.5)
    np.testing.assert_allclose(_reward("overlong", [1], [900], cache=400, factor=0.5), [1 - 0.5 * 0.75])
    with pytest.raises(ValueError, match="overlong cache must be between 1 and max_length 1000, not 4096"):
        _reward("overlong", [1], [900], cache=4096)
    np.testing.assert_allclose(_reward("dler", [1, 1, 0], [999, 1001, 5], max_length=1000), [1, 0, 0])
    np.testing.assert_allclose(_reward("dler", [1, 1], [5, 6], limit=5), [1, 0])
    np.testing.assert_allclose(_reward("dler", [1, 1], [5, 6], truncated=[True, False]), [0, 1])


def test_budget_samplers():
    uniform = sample_budgets(np.random.default_rng(0), 20000, "uniform", 100, 400)
    assert uniform.min() == 100 and uniform.max() == 400 and abs(uniform.mean() - 250) < 2
    log = sample_budgets(np.random.default_rng(0), 20000, "log_uniform", 100, 3200)
    assert log.min() >= 100 and log.max() <= 3200 and log.dtype.kind == "i"
    for a in (100, 200, 400, 800, 1600):  # a fifth of the mass in each octave
        assert abs(np.mean((log >= a) & (log < 2 * a)) - 0.2) < 0.02
    assert set(sample_budgets(np.random.default_rng(0), 200, "log_uniform", 1, 3)) == {1, 2, 3}
    assert np.array_equal(sample_budgets(np.random.default_rng(1), 5, "uniform", 7, 7), [7] * 5)
    with pytest.raises(ValueError, match="unknown budget sampler 'log'; valid: uniform, log_uniform"):
        sample_budgets(np.random.default_rng(0), 1, "log", 1, 2)
    for low, high in ((0, 5), (6, 5)):
        with pytest.raises(ValueError, match="1 <= low <= high"):
            sample_budgets(np.random.default_rng(0), 1, "uniform", low, high)


def test_budget_metrics():
    found = budget_metrics([900, 1100, 1700, 500], [1000, 1000, 1000, 0])
    deviation = np.array([-0.1, 0.1, 0.7])
    assert found == pytest.approx(
        {
            "mean_error": deviation.mean(),
            "rmse": np.sqrt((deviation**2).mean()),
            "hard_violation": 2 / 3,
            "soft_violation": 1 / 3,
        }
    )
    assert budget_metrics([1500], [1000])["soft_violation"] == 0  # exactly 500 beyond is not more than 500
    assert budget_metrics([1000], [1000])["hard_violation"] == 0
    assert set(budget_metrics([5], [0]).values()) == {0.0}


def test_s1_metrics():
    assert control([400, 900, 2100], [500, 1000, 2000]) == pytest.approx(2 / 3)
    # slopes: .1/500, .2/1500, .1/1000
    assert scaling([500, 1000, 2000], [0.3, 0.4, 0.5]) == pytest.approx((2e-4 + 0.2 / 1500 + 1e-4) / 3)
    assert scaling([2000, 500, 1000], [0.5, 0.3, 0.4]) == pytest.approx((2e-4 + 0.2 / 1500 + 1e-4) / 3)
    assert scaling([500, 500], [0.1, 0.9]) == 0 == scaling([500], [0.1])
    assert performance([0.2, 0.5, 0.4]) == 0.5
