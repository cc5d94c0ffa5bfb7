"""pass@k, maj@k and intervals against enumeration and known values."""

import itertools

import numpy as np
import pytest

from jaxrl.algorithms.metrics import bootstrap_interval, maj_at_k, pass_at_k, wilson_interval


def test_pass_at_k_equals_enumeration():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c > n or k > n:
            continue
        outcomes = [1] * c + [0] * (n - c)
        hits = [any(s) for s in itertools.combinations(outcomes, k)]
        assert pass_at_k(n, c, k) == pytest.approx(np.mean(hits), abs=1e-12)
    assert pass_at_k(32, 0, 32) == 0 and pass_at_k(32, 1, 32) == 1
    for n, c, k in ((4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(n, c, k)


def test_maj_at_k():
    answers, correct = ["7", "7", "3", "5", None], [1, 1, 0, 0, 0]
    assert maj_at_k(answers, correct, 5) == 1
    assert maj_at_k(answers, correct, 1) == pytest.approx(2 / 5)
    # k = 2: {7,7} 1; {7,3} {7,5} x2 each 1/2; {7,None} x2 1; {3,5}, {3,None}, {5,None} 0.
    assert maj_at_k(answers, correct, 2) == pytest.approx((1 + 4 * 0.5 + 2) / 10)
    assert maj_at_k([None, None], [0, 0], 2) == 0
    many = ["a"] * 20 + ["b"] * 20
    sampled = maj_at_k(many, [1] * 20 + [0] * 20, 5, draws=4000)
    assert abs(sampled - 0.5) < 0.04 and sampled == maj_at_k(many, [1] * 20 + [0] * 20, 5, draws=4000)
    with pytest.raises(ValueError, match="maj@k needs"):
        maj_at_k(answers, correct, 6)


def test_wilson_interval():
    low, high = wilson_interval(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_bootstrap_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values, draws=4000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert (low, high) == bootstrap_interval(values, draws=4000)
    assert bootstrap_interval([0.4]) == (0.4, 0.4)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])
