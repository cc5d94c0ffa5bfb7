"""Which graded groups are trained on. Pure functions on lists of groups; NumPy, on the host.

Every entry of SELECTIONS is `fn(groups, hyper) -> (kept, dropped)`: kept is the list of groups to train on, in their
order (for overlong, pods and gfpo with completions masked or removed), dropped the groups by reason. Reasons that end
in "completions" hold a count of completions instead. `select` runs a chain of them. A group is anything with the fields
of `jaxrl.types.Group`. Completions with valid False (grading failed) take no part in any decision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl.algorithms.hyper import Choice, Integer, Method, Number, resolve

# The fields of Group that hold one entry per completion.
PER_COMPLETION = ("completions", "texts", "correct", "rewards", "valid", "outcomes")


def _valid(group) -> np.ndarray:
    return np.asarray(group.valid, bool)


def mean_length(group) -> float:
    """Mean response length in tokens over the group's graded completions (LSPO's L(q)); NaN if there are none."""
    lengths = np.asarray(group.lengths)[_valid(group)]
    return float(np.mean(lengths)) if len(lengths) else float("nan")


def mean_accuracy(group) -> float:
    """Mean of `correct` over the group's graded completions; NaN if there are none."""
    correct = np.asarray(group.correct, np.float64)[_valid(group)]
    return float(np.mean(correct)) if len(correct) else float("nan")


def _take(group, index):
    """The group with only the completions `index`, in that order."""
    changes = {}
    for name in PER_COMPLETION:
        value = getattr(group, name)
        changes[name] = value[index] if isinstance(value, np.ndarray) else [value[i] for i in index]
    return dataclasses.replace(group, **changes)


def _partition(groups, reason: Callable[[Any], str | None]) -> tuple[list, dict[str, list]]:
    """Keep the groups for which reason(group) is None; sort the others by reason."""
    kept, dropped = [], {}
    for group in groups:
        why = reason(group)
        if why is None:
            kept.append(group)
        else:
            dropped.setdefault(why, []).append(group)
    return kept, dropped


def none(groups, hyper):
    """Keep everything."""
    return list(groups), {}


def accuracy(groups, hyper):
    """DAPO's dynamic sampling (2503.14476 eq. 11): drop groups whose graded completions all score the same.

    hyper: metric, "correct" (accuracy, as DAPO and LSPO) or "rewards" (the shaped reward). Equality is
    exact. A group that was sampled with a single completion is kept (it has no spread to judge); one
    without any graded completion is dropped. Reasons: all_correct, all_wrong, all_equal, ungraded.
    """

    def reason(group):
        values = np.asarray(getattr(group, hyper["metric"]))[_valid(group)]
        if not len(values):
            return "ungraded"
        if len(group.completions) == 1 or values.min() < values.max():
            return None
        if hyper["metric"] == "rewards":
            return "all_equal"
        return {1.0: "all_correct", 0.0: "all_wrong"}.get(float(values[0]), "all_equal")

    return _partition(groups, reason)


def thresholds(values, fractions: Sequence[float], quantile: str) -> list[float]:
    """Quantiles of `values` [n >= 1] at the fractions, float64.

    quantile "linear": NumPy's interpolated percentile, as LSPO's released code. "inf": inf{t : F(t) >= a} with the
    empirical distribution F, as its paper defines it. They keep different groups in most small batches.
    """
    values = np.sort(np.asarray(values, np.float64))
    if quantile == "linear":
        return [float(np.percentile(values, 100 * a)) for a in fractions]
    ranks = (math.ceil(a * len(values) - 1e-9) for a in fractions)  # 0.28 of 25 is 7, not the 8 of its rounding
    return [float(values[max(rank, 1) - 1]) for rank in ranks]


def _by_statistic(groups, statistic: Callable, reason_for: Callable):
    """Accuracy filter, then drop by reason_for(the survivors' statistics) -> (statistic -> reason or None)."""
    survivors, dropped = accuracy(groups, {"metric": "correct"})
    if not survivors:
        return [], dropped
    reason = reason_for([statistic(g) for g in survivors])
    kept, more = _partition(survivors, lambda g: reason(statistic(g)))
    return kept, {**dropped, **more}


def _outside(low: float, high: float, top: float, between: str, above: str) -> Callable:
    """The reason to drop a group of statistic m, or None for m <= low and high <= m <= top."""
    return lambda m: None if m <= low or high <= m <= top else between if m < high else above


def _two_ends(groups, statistic: Callable, hyper, between: str, above: str):
    """LSPO's rule on a statistic: keep m <= Q(low) or Q(high) <= m <= Q(max), after the accuracy filter."""
    fractions = hyper["low"], hyper["high"], hyper["max"]

    def reason_for(values):
        return _outside(*thresholds(values, fractions, hyper["quantile"]), between, above)

    return _by_statistic(groups, statistic, reason_for)


def lspo(groups, hyper):
    """LSPO (2510.01459): accuracy filter, then keep the groups with short or long, but not the longest, answers.

        keep  L(q) <= Q(low)  or  Q(high) <= L(q) <= Q(max),   L(q) the mean response length

    Thresholds are taken over the accuracy survivors of these groups (one generation batch), comparisons are
    inclusive: no survivor keeps nothing, one survivor or equal lengths keep all. hyper: low, high, max as
    fractions (0.30, 0.65, 0.95; the released script runs 0.30, 0.60, 0.90), quantile (see `thresholds`).
    Reasons beyond accuracy's: middle, longest.
    """
    return _two_ends(groups, mean_length, hyper, "middle", "longest")


def lspo_accuracy(groups, hyper):
    """LSPO's ablation on accuracy: the same rule with the group's accuracy in place of its mean length.

    hyper as lspo (released constants 0.30, 0.65, 0.95). Reasons beyond accuracy's: middle_accuracy, top_accuracy.
    """
    return _two_ends(groups, mean_accuracy, hyper, "middle_accuracy", "top_accuracy")


def lspo_middle(groups, hyper):
    """LSPO's ablation that keeps the middle: Q(low) <= L(q) <= Q(high). Reasons: shortest, longest."""

    def reason_for(lengths):
        low, high = thresholds(lengths, (hyper["low"], hyper["high"]), hyper["quantile"])
        return lambda m: "shortest" if m < low else "longest" if m > high else None

    return _by_statistic(groups, mean_length, reason_for)


def lspo_shortest(groups, hyper):
    """Keep the shortest only: L(q) <= Q(fraction). Reason: longest."""

    def reason_for(lengths):
        (limit,) = thresholds(lengths, (hyper["fraction"],), hyper["quantile"])
        return lambda m: "longest" if m > limit else None

    return _by_statistic(groups, mean_length, reason_for)


def lspo_longest(groups, hyper):
    """Keep the longest only: L(q) >= Q(1 - fraction). Reason: shortest."""

    def reason_for(lengths):
        (limit,) = thresholds(lengths, (1 - hyper["fraction"],), hyper["quantile"])
        return lambda m: "shortest" if m < limit else None

    return _by_statistic(groups, mean_length, reason_for)


def lspo_value(groups, hyper):
    """LSPO's ablation with thresholds in tokens, at fractions of the range [min, max] of the mean lengths.

        keep  L(q) <= min + low (max - min)  or  min + high (max - min) <= L(q) <= top

    hyper: low 0.3, high 0.7, max 0.98, and upper: "released", top = max_fraction * max length (what the
    released expression evaluates to), or "range", top = min + max_fraction (max - min), which it seems to
    have meant. Reasons: middle, longest.
    """

    def reason_for(lengths):
        least, most = min(lengths), max(lengths)
        low, high, top = (least + hyper[k] * (most - least) for k in ("low", "high", "max"))
        return _outside(low, high, hyper["max"] * most if hyper["upper"] == "released" else top, "middle", "longest")

    return _by_statistic(groups, mean_length, reason_for)


def overlong(groups, hyper):
    """DAPO's overlong filtering (2503.14476 section 3.4): truncated completions are not trained on.

    hyper: max_truncated, the largest share of truncated completions a group may have; above it (and always when nothing
    graded is left) the whole group is dropped. Kept groups have valid False at truncated completions, so they leave the
    advantage statistics as well. Reasons: overlong_completions (masked, in kept groups), overlong.
    """
    kept, masked, gone = [], 0, []
    for group in groups:
        cut = np.asarray(group.truncated, bool)
        valid = _valid(group) & ~cut
        if (len(cut) and cut.mean() > hyper["max_truncated"]) or (cut.any() and not valid.any()):
            gone.append(group)
            continue
        masked += int((_valid(group) & cut).sum())
        kept.append(dataclasses.replace(group, valid=valid) if cut.any() else group)
    return kept, {k: v for k, v in (("overlong_completions", masked), ("overlong", gone)) if v}


def max_variance_subset(rewards, keep: int) -> np.ndarray:
    """Indices (ascending) of the `keep` entries of rewards [n] with the largest variance (PODS, 2504.13818).

    An optimal subset takes the k smallest and keep - k largest for some k, so all keep + 1 candidates are
    compared on prefix sums of the sorted rewards. Among equal variances the
    smallest k wins; of equal rewards the low end takes the first in the group, the high end the last.
    """
    rewards = np.asarray(rewards, np.float64)
    order = np.argsort(rewards, kind="stable")
    n, centred = len(rewards), rewards[order] - rewards.mean()
    s1, s2 = (np.concatenate([[0.0], np.cumsum(centred**p)]) for p in (1, 2))
    k = np.arange(keep + 1)
    total, squares = (s[k] + s[n] - s[n - keep + k] for s in (s1, s2))
    best = int(np.argmax(np.round(squares / keep - (total / keep) ** 2, 12)))
    return np.sort(np.concatenate([order[:best], order[n - keep + best :]]))


def _reduce(groups, choose: Callable, keep: int):
    """Cut each group with more than `keep` graded completions to those that choose(group, graded indices) names."""
    kept, removed = [], 0
    for group in groups:
        graded = np.flatnonzero(_valid(group))
        if len(graded) > keep:
            index = choose(group, graded)
            removed += len(group.completions) - len(index)
            group = _take(group, index)
        kept.append(group)
    return kept, {"unselected_completions": removed} if removed else {}


def pods(groups, hyper):
    """PODS (2504.13818): of each group's n completions keep the m = hyper["keep"] with the largest reward variance.

    Groups with at most m graded completions stay as they are. Reason: unselected_completions.
    """

    def choose(group, graded):
        return graded[max_variance_subset(np.asarray(group.rewards)[graded], hyper["keep"])]

    return _reduce(groups, choose, hyper["keep"])


def gfpo(groups, hyper):
    """GFPO (2508.09726): keep each group's k = hyper["keep"] shortest completions, or the most rewarding per token.

    hyper: metric, "length" or "efficiency" (reward / length). The rest gets no gradient and advantages are normalised
    over the kept ones, which is what removing the rest does. Ties go by order. Reason: unselected_completions.
    """

    def choose(group, graded):
        lengths = np.asarray(group.lengths, np.float64)[graded]
        cost = lengths
        if hyper["metric"] == "efficiency":
            cost = -np.asarray(group.rewards, np.float64)[graded] / np.maximum(lengths, 1)
        return np.sort(graded[np.argsort(cost, kind="stable")[: hyper["keep"]]])

    return _reduce(groups, choose, hyper["keep"])


_ENDS = {"low": Number(0.30, 0, 1), "high": Number(0.65, 0, 1)}
_QUANTILE = {"quantile": Choice("linear", ("linear", "inf"))}
_LSPO = {**_ENDS, "max": Number(0.95, 0, 1), **_QUANTILE}
_ONE_END = {"fraction": Number(0.6, 0, 1), **_QUANTILE}
_VALUE = {"low": Number(0.3, 0, 1), "high": Number(0.7, 0, 1), "max": Number(0.98, 0, 1)}
_VALUE |= {"upper": Choice("released", ("released", "range"))}
_RISING = [("low", "high", "max")]

SELECTIONS: dict[str, Method] = {
    "none": Method(none),
    "accuracy": Method(accuracy, {"metric": Choice("correct", ("correct", "rewards"))}),
    "lspo": Method(lspo, _LSPO, ordered=_RISING),
    "lspo_middle": Method(lspo_middle, {**_ENDS, **_QUANTILE}, ordered=[("low", "high")]),
    "lspo_shortest": Method(lspo_shortest, _ONE_END),
    "lspo_longest": Method(lspo_longest, _ONE_END),
    "lspo_value": Method(lspo_value, _VALUE, ordered=_RISING),
    "lspo_accuracy": Method(lspo_accuracy, _LSPO, ordered=_RISING),
    "overlong": Method(overlong, {"max_truncated": Number(1.0, 0, 1)}),
    "pods": Method(pods, {"keep": Integer(16, 1)}),
    "gfpo": Method(gfpo, {"keep": Integer(8, 1), "metric": Choice("length", ("length", "efficiency"))}),
}


def parse_chain(chain: str | Sequence[str]) -> list[str]:
    """ "accuracy+lspo" -> ["accuracy", "lspo"]. Raises ValueError for an unknown or empty name."""
    names = [n.strip() for n in chain.split("+")] if isinstance(chain, str) else list(chain)
    for name in names:
        resolve(SELECTIONS, "selection", name)
    return names


def select(
    groups: Sequence[Any], chain: str | Sequence[str], hyper: Mapping[str, Mapping] | None = None
) -> tuple[list, dict[str, int]]:
    """Run the selections of a chain such as "overlong+lspo" from left to right.

    groups: of one generation batch (percentiles are over it). hyper: {selection name: constants that differ
    from its defaults}. Returns the kept groups, in order, and {"name/reason": count} of what each dropped.
    Raises ValueError for unknown names or constants.
    """
    kept, dropped = explain(groups, chain, hyper)
    return kept, {reason: x if isinstance(x, int) else len(x) for reason, x in dropped.items()}


def explain(
    groups: Sequence[Any], chain: str | Sequence[str], hyper: Mapping[str, Mapping] | None = None
) -> tuple[list, dict[str, Any]]:
    """As `select`, but with the dropped groups themselves; reasons that end in "completions" stay counts."""
    kept, dropped = list(groups), {}
    for name in parse_chain(chain):
        entry, constants = resolve(SELECTIONS, "selection", name, (hyper or {}).get(name))
        kept, reasons = entry.fn(kept, constants)
        for reason, what in reasons.items():
            key = f"{name}/{reason}"
            dropped[key] = dropped[key] + what if key in dropped else what
    return kept, dropped
