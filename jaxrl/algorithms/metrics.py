"""Accuracy over several samples per problem, with intervals: pass@k, maj@k, Wilson and bootstrap. NumPy, host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k of one problem (2107.03374 eq. 1): 1 - C(n - c, k) / C(n, k).

    n samples, c of them correct, 0 <= c <= n. Raises ValueError unless 1 <= k <= n (there is no estimate beyond n).
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= samples, not k {k} of {n} samples")
    if not 0 <= c <= n:
        raise ValueError(f"pass@k needs 0 <= correct <= samples, not {c} of {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(
    answers: Sequence[Hashable | None], correct: Sequence[float], k: int, draws: int = 1000, seed: int = 0
) -> float:
    """maj@k of one problem: the expected correctness of the most frequent answer among k of the n samples.

    answers: n extracted answers in a normal form; None (nothing extracted) does not vote, and no vote at
    all is wrong. correct: n of 0/1, the same for equal answers. A tie counts as its tied answers' mean
    correctness. Averaged over all subsets of k samples if there are at most `draws`, else over `draws`
    random ones (deterministic in seed). Raises ValueError unless 1 <= k <= n.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"maj@k needs 1 <= k <= samples, not k {k} of {n} samples")
    if math.comb(n, k) <= draws:
        subsets = np.array(list(itertools.combinations(range(n), k)))
    else:
        rng = np.random.default_rng(seed)
        subsets = rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)[:, :k]
    value = {a: c for a, c in zip(answers, correct, strict=True) if a is not None}
    is_for = np.array([[a == candidate for candidate in value] for a in answers])  # [n, candidates]
    votes = is_for[subsets].sum(axis=1)  # [subsets, candidates]
    winners = votes == votes.max(axis=1, keepdims=True, initial=1)  # without any vote nobody wins
    right = winners @ np.fromiter(value.values(), np.float64)
    return float(np.mean(right / np.maximum(winners.sum(axis=1), 1)))


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion; (0, 1) for n = 0. Trials must be independent."""
    if n == 0:
        return 0.0, 1.0
    import scipy.stats  # here, because it takes a second, which every start of a command would pay

    interval = scipy.stats.binomtest(round(successes), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(values, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean, resampling problems. Deterministic in seed.

    values: [problems], each the mean over its samples (samples of one problem are not independent, so the
    problem is the unit). A single value gives (value, value). Raises ValueError if there are none.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        if not len(values):
            raise ValueError("bootstrap_interval needs at least one value")
        return float(values[0]), float(values[0])
    import scipy.stats

    found = scipy.stats.bootstrap((values,), np.mean, n_resamples=draws, method="percentile", rng=seed)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
