"""Which graded responses are trained on. Pure functions of columns; NumPy, on the host.

Every entry of SELECTIONS is `fn(rollouts, hyper) -> (keep, reason)`: keep bool [N], reason [N] of words, "" where kept.
rollouts: the graded responses of one generation batch (jaxrl.rollouts.Rollouts). Most rules decide for whole groups
(`of_groups`); overlong, pods and gfpo for single responses, with reasons that end in "completions" and are counted as
responses, not groups. `select` runs a chain of rules. Responses with valid False (grading failed) take no part in any
decision.

A rule may look at any column, and at any statistic of a group; STATISTICS names those that the LSPO rules can use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxrl.algorithms.hyper import Choice, Integer, Method, Number, resolve

# ---- statistics of groups


def mean_length(rollouts) -> np.ndarray:
    """float64 [P]: mean response length in tokens (LSPO's L(q)); NaN without graded responses."""
    return rollouts.group_mean(rollouts.lengths)


def mean_accuracy(rollouts) -> np.ndarray:
    """float64 [P]: mean of `correct`; NaN without graded responses."""
    return rollouts.group_mean(rollouts.correct)


STATISTICS: dict[str, Callable] = {"length": mean_length, "accuracy": mean_accuracy}  # name -> fn(rollouts) -> [P]


# ---- rules


def of_groups(rollouts, reasons: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(keep [N], reason [N]) of a rule that gave each group a reason to drop it, or "" to keep it."""
    reason = rollouts.per_response(reasons, object)
    return reason == "", reason


def none(rollouts, hyper):
    """Keep everything."""
    return of_groups(rollouts, [""] * rollouts.num_groups)


def accuracy(rollouts, hyper):
    """DAPO's dynamic sampling (2503.14476 eq. 11): drop groups whose graded responses all score the same.

    hyper: metric, "correct" (accuracy, as DAPO and LSPO) or "rewards" (the shaped reward). Equality is
    exact. A group that was sampled with a single response is kept (it has no spread to judge); one
    without any graded response is dropped. Reasons: all_correct, all_wrong, all_equal, ungraded.
    """
    return of_groups(rollouts, _accuracy_reasons(rollouts, hyper["metric"]))


def _accuracy_reasons(rollouts, metric: str = "correct") -> np.ndarray:
    least, most = rollouts.group_range(rollouts.correct if metric == "correct" else rollouts.reward)
    spread = (least < most) | np.array([p.samples == 1 for p in rollouts.prompts], bool)
    reasons = np.where(spread, "", "all_equal").astype(object)
    if metric == "correct":
        reasons[~spread & (least == 1)] = "all_correct"
        reasons[~spread & (most == 0)] = "all_wrong"
    reasons[rollouts.group_count() == 0] = "ungraded"
    return reasons


def thresholds(values, fractions: Sequence[float], quantile: str) -> list[float]:
    """Quantiles of `values` [n >= 1] at the fractions, float64.

    quantile "linear": NumPy's interpolated percentile, as LSPO's released code. "inf": inf{t : F(t) >= a} with the
    empirical distribution F, as its paper defines it. They keep different groups in most small batches.
    """
    values = np.sort(np.asarray(values, np.float64))
    if quantile == "linear":
        return [float(np.percentile(values, 100 * a)) for a in fractions]
    ranks = (math.ceil(a * len(values) - 1e-9) for a in fractions)  # 0.28 of 25 is 7, not 8 by rounding
    return [float(values[max(rank, 1) - 1]) for rank in ranks]


def _survivors(rollouts, statistic: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(reasons [P] of the accuracy filter, the statistic [P], its values at the groups that pass, NaN left out)."""
    reasons, values = _accuracy_reasons(rollouts), STATISTICS[statistic](rollouts)
    return reasons, values, values[reasons == ""]


def _drop(reasons: np.ndarray, which: np.ndarray, why: str) -> None:
    reasons[(reasons == "") & which] = why


def lspo(rollouts, hyper):
    """LSPO (2510.01459): accuracy filter, then keep the groups with short or long, but not the longest, answers.

        keep  L(q) <= Q(low)  or  Q(high) <= L(q) <= Q(max),   L(q) the mean response length

    Thresholds are taken over the groups of the generation batch that pass the accuracy filter. Comparisons are
    inclusive, so one such group, or groups of equal lengths, are all kept. hyper: low, high, max as
    fractions (0.30, 0.65, 0.95; the released script runs 0.30, 0.60, 0.90), quantile (see `thresholds`), statistic:
    what L(q) is, a name in STATISTICS ("accuracy": LSPO's ablation on accuracy).
    Reasons beyond accuracy's: middle, longest; on another statistic middle_NAME, top_NAME.
    """
    fractions = hyper["low"], hyper["high"], hyper["max"]
    name = hyper["statistic"]
    reasons, values, passed = _survivors(rollouts, name)
    middle, longest = ("middle", "longest") if name == "length" else (f"middle_{name}", f"top_{name}")
    if len(passed):
        low, high, top = thresholds(passed, fractions, hyper["quantile"])
        _drop(reasons, (values > low) & (values < high), middle)
        _drop(reasons, (values > low) & (values > top), longest)
    return of_groups(rollouts, reasons)


def lspo_middle(rollouts, hyper):
    """LSPO's ablation that keeps the middle: Q(low) <= L(q) <= Q(high). Reasons: shortest, longest."""
    reasons, values, passed = _survivors(rollouts, "length")
    if len(passed):
        low, high = thresholds(passed, (hyper["low"], hyper["high"]), hyper["quantile"])
        _drop(reasons, values < low, "shortest")
        _drop(reasons, values > high, "longest")
    return of_groups(rollouts, reasons)


def lspo_shortest(rollouts, hyper):
    """Keep the shortest only: L(q) <= Q(fraction). Reason: longest."""
    reasons, values, passed = _survivors(rollouts, "length")
    if len(passed):
        _drop(reasons, values > thresholds(passed, (hyper["fraction"],), hyper["quantile"])[0], "longest")
    return of_groups(rollouts, reasons)


def lspo_longest(rollouts, hyper):
    """Keep the longest only: L(q) >= Q(1 - fraction). Reason: shortest."""
    reasons, values, passed = _survivors(rollouts, "length")
    if len(passed):
        q = round(1 - hyper["fraction"], 12)  # 1 - 0.7 is a little more than 0.3
        _drop(reasons, values < thresholds(passed, (q,), hyper["quantile"])[0], "shortest")
    return of_groups(rollouts, reasons)


def lspo_value(rollouts, hyper):
    """LSPO's ablation with thresholds in tokens, at fractions of the range [min, max] of the mean lengths.

        keep  L(q) <= min + low (max - min)  or  min + high (max - min) <= L(q) <= top

    hyper: low 0.3, high 0.7, max 0.98, and upper: "released", top = max_fraction * max length (what the
    released expression evaluates to), or "range", top = min + max_fraction (max - min), which it seems to
    have meant. Reasons: middle, longest.
    """
    reasons, values, passed = _survivors(rollouts, "length")
    if len(passed):
        least, most = passed.min(), passed.max()
        low, high, top = (least + hyper[k] * (most - least) for k in ("low", "high", "max"))
        top = hyper["max"] * most if hyper["upper"] == "released" else top
        _drop(reasons, (values > low) & (values < high), "middle")
        _drop(reasons, (values > low) & (values > top), "longest")
    return of_groups(rollouts, reasons)


def overlong(rollouts, hyper):
    """DAPO's overlong filtering (2503.14476 section 3.4): truncated responses are not trained on.

    hyper: max_truncated, the largest share of truncated responses a group may have; above it (and always when nothing
    graded is left) the whole group is dropped. The responses leave the advantage statistics of kept groups as well.
    Reasons: overlong_completions (responses of kept groups), overlong (groups).
    """
    cut, graded = rollouts.truncated, rollouts.valid
    counts = [rollouts.group_count(which) for which in (cut, graded & ~cut, np.ones(len(rollouts), bool))]
    truncated, left, size = counts
    gone = (truncated / size > hyper["max_truncated"]) | ((truncated > 0) & (left == 0))
    reason = rollouts.per_response(np.where(gone, "overlong", ""), object)
    reason[(reason == "") & cut & graded] = "overlong_completions"
    return reason == "", reason


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


def _cheapest(cost: np.ndarray, keep: int) -> np.ndarray:
    """Indices of the `keep` lowest costs [n]; ties go by order."""
    return np.argsort(cost, kind="stable")[:keep]


def _reduce(rollouts, values: np.ndarray, keep: int, choose: Callable):
    """In each group with more than `keep` graded responses, keep those that choose(their values, keep) names."""
    kept = np.ones(len(rollouts), bool)
    for group in np.flatnonzero(rollouts.group_count() > keep):
        members = rollouts.group == group
        graded = np.flatnonzero(members & rollouts.valid)
        kept[members] = False
        kept[graded[choose(values[graded], keep)]] = True
    return kept, np.where(kept, "", "unselected_completions").astype(object)


def pods(rollouts, hyper):
    """PODS (2504.13818): of each group's n responses keep the m = hyper["keep"] with the largest reward variance.

    Groups with at most m graded responses stay as they are. Reason: unselected_completions.
    """
    return _reduce(rollouts, rollouts.reward, hyper["keep"], max_variance_subset)


def gfpo(rollouts, hyper):
    """GFPO (2508.09726): keep each group's k = hyper["keep"] shortest responses, or the most rewarding per token.

    hyper: metric, "length" or "efficiency" (reward / length). The rest is removed, so it gets no gradient and
    advantages are normalised over the kept ones. Ties go by order. Reason: unselected_completions.
    """
    cost = rollouts.lengths.astype(np.float64)
    if hyper["metric"] == "efficiency":
        cost = -rollouts.reward.astype(np.float64) / np.maximum(cost, 1)
    return _reduce(rollouts, cost, hyper["keep"], _cheapest)


_ENDS = {"low": Number(0.30, 0, 1), "high": Number(0.65, 0, 1)}
_QUANTILE = {"quantile": Choice("linear", ("linear", "inf"))}
_LSPO = {**_ENDS, "max": Number(0.95, 0, 1), **_QUANTILE}
_BY = {name: {"statistic": Choice(name, STATISTICS.keys())} for name in ("length", "accuracy")}
_ONE_END = {"fraction": Number(0.6, 0, 1), **_QUANTILE}
_VALUE = {"low": Number(0.3, 0, 1), "high": Number(0.7, 0, 1), "max": Number(0.98, 0, 1)}
_VALUE |= {"upper": Choice("released", ("released", "range"))}
_RISING = [("low", "high", "max")]

SELECTIONS: dict[str, Method] = {
    "none": Method(none),
    "accuracy": Method(accuracy, {"metric": Choice("correct", ("correct", "rewards"))}),
    "lspo": Method(lspo, {**_LSPO, **_BY["length"]}, ordered=_RISING),
    "lspo_middle": Method(lspo_middle, {**_ENDS, **_QUANTILE}, ordered=[("low", "high")]),
    "lspo_shortest": Method(lspo_shortest, _ONE_END),
    "lspo_longest": Method(lspo_longest, _ONE_END),
    "lspo_value": Method(lspo_value, _VALUE, ordered=_RISING),
    "lspo_accuracy": Method(lspo, {**_LSPO, **_BY["accuracy"]}, ordered=_RISING),
    "overlong": Method(overlong, {"max_truncated": Number(1.0, 0, 1)}),
    "pods": Method(pods, {"keep": Integer(16, 1)}),
    "gfpo": Method(gfpo, {"keep": Integer(8, 1), "metric": Choice("length", ("length", "efficiency"))}),
}


# ---- chains


def parse_chain(chain: str | Sequence[str]) -> list[str]:
    """ "accuracy+lspo" -> ["accuracy", "lspo"]. Raises ValueError for an unknown or empty name."""
    names = [n.strip() for n in chain.split("+")] if isinstance(chain, str) else list(chain)
    for name in names:
        resolve(SELECTIONS, "selection", name)
    return names


def select(
    rollouts, chain: str | Sequence[str], hyper: Mapping[str, Mapping] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Run the selections of a chain such as "overlong+lspo" from left to right, each on what is left.

    rollouts: of one generation batch (percentiles are over it). hyper: {selection name: constants that differ
    from its defaults}. Returns keep, bool [N], and reason, object [N]: "name/reason" of the rule that dropped the
    response, "" where it is kept. Raises ValueError for unknown names or constants, or what is not (keep, reason).
    """
    reason = np.full(len(rollouts), "", object)
    left = np.arange(len(rollouts))
    for name in parse_chain(chain):
        entry, constants = resolve(SELECTIONS, "selection", name, (hyper or {}).get(name))
        keep, why = (np.asarray(x) for x in entry.fn(rollouts.take(left), constants))
        if keep.dtype != bool or keep.shape != left.shape or why.shape != left.shape:
            raise ValueError(f"selection {name!r} must return (keep, reason), bool [N] and words [N] of N {len(left)}")
        reason[left[~keep]] = [f"{name}/{w}" if w else name for w in why[~keep]]
        left = left[keep]
    return reason == "", reason


def dropped(rollouts, reason: np.ndarray) -> dict[str, int]:
    """{"name/reason": count}, sorted: how many groups, or responses if the reason ends in "completions"."""
    return {
        str(why): int((reason == why).sum()) if why.endswith("completions") else
        int(rollouts.group_any(reason == why).sum())
        for why in sorted(set(reason[reason != ""]))
    }  # fmt: skip


def group_reasons(rollouts, reason: np.ndarray) -> np.ndarray:
    """object [P]: why no response of the group is kept, "" for groups with a kept response."""
    out = np.full(rollouts.num_groups, "", object)
    single = np.array([why.endswith("completions") for why in reason], bool)
    for which in (single, ~single):  # a reason that dropped the whole group takes precedence
        out[rollouts.group[which]] = reason[which]
    out[rollouts.group_any(reason == "")] = ""
    return out
