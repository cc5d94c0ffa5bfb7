"""Advantages: one number per response from the rewards of its group, or one per token. NumPy float64, on the host.

Every entry is `fn(rollouts, hyper) -> [N]`, one advantage per response, or `[total]`, one per token. rollouts holds
graded responses only (jaxrl.rollouts.Rollouts); the methods here read its `reward`, `group` and `lengths` [N]. Where a
method subtracts the group mean, a group whose rewards are exactly equal gets exactly 0 (decided by comparison, not by
rounding), and a group of one follows hyper["singleton"]: "reward" keeps its reward as advantage (verl: mean 0, std 1),
"zero" gives 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxrl.algorithms.hyper import Choice, Integer, Method, Number, resolve


class _Groups(NamedTuple):
    rewards: np.ndarray
    index: np.ndarray  # group number of each completion
    size: np.ndarray  # of its group
    mean: np.ndarray  # of its group
    equal: np.ndarray  # bool: its group has several completions, all with the same reward


def _groups(rollouts, rewards: np.ndarray | None = None) -> _Groups:
    rewards = np.asarray(rollouts.reward if rewards is None else rewards, np.float64)
    _, index = np.unique(rollouts.group, return_inverse=True)
    count = np.bincount(index)
    mean = np.bincount(index, rewards) / count
    low, high = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(low, index, rewards)
    np.maximum.at(high, index, rewards)
    return _Groups(rewards, index, count[index], mean[index], ((low == high) & (count > 1))[index])


def _centre(groups: _Groups, hyper: Mapping, baseline: np.ndarray | None = None) -> np.ndarray:
    """Rewards minus the baseline (default: the group mean), with the two special cases of the module's docstring."""
    centred = groups.rewards - (groups.mean if baseline is None else baseline)
    alone = groups.rewards if hyper["singleton"] == "reward" else np.zeros_like(groups.rewards)
    return np.where(groups.equal, 0.0, np.where(groups.size == 1, alone, centred))


def _std(values: np.ndarray, ddof: int) -> float:
    """Of the batch; 1 where all values are equal, which nothing should be divided by."""
    return float(np.std(values, ddof=ddof)) if len(values) > ddof and np.ptp(values) else 1.0


def grpo(rollouts, hyper):
    """(R - group mean) / (std + eps) (GRPO, 2402.03300).

    hyper: eps (1e-6 verl, 1e-4 TRL), ddof (1: unbiased std, verl and TRL), scale: "group" (std of the group),
    "batch" (std of all rewards: TRL, Lite PPO 2508.08221) or "none" (no division).
    """
    groups = _groups(rollouts)
    centred = _centre(groups, hyper)
    if hyper["scale"] == "none":
        return centred
    if hyper["scale"] == "batch":
        return centred / (_std(groups.rewards, hyper["ddof"]) + hyper["eps"])
    return _normalised(groups, hyper)


def _normalised(groups: _Groups, hyper: Mapping) -> np.ndarray:
    """(R - group mean) / (std of the group + eps)."""
    centred = _centre(groups, hyper)
    squares = np.bincount(groups.index, (groups.rewards - groups.mean) ** 2)[groups.index]
    std = np.sqrt(squares / np.maximum(groups.size - hyper["ddof"], 1))
    return centred / (np.where(groups.size == 1, 1.0, std) + hyper["eps"])


def dr_grpo(rollouts, hyper):
    """R - group mean (Dr. GRPO, 2503.20783)."""
    return _centre(_groups(rollouts), hyper)


def rloo(rollouts, hyper):
    """R_i - mean of the others = G / (G - 1) (R_i - mean) (RLOO, 2402.14740)."""
    groups = _groups(rollouts)
    return _centre(groups, hyper) * np.where(groups.size > 1, groups.size / np.maximum(groups.size - 1, 1), 1.0)


def reinforce_pp_baseline(rollouts, hyper):
    """REINFORCE++-baseline (2501.03262): R - group mean, then whitened over the response tokens of the batch.

    Mean and (unbiased) variance count each completion once per response token; divided by sqrt(variance + eps), eps
    1e-8 as verl. Whitening subtracts a batch mean, so a group of equal rewards does NOT get exactly 0 here.
    """
    return _whitened(_centre(_groups(rollouts), hyper), rollouts.lengths, hyper["eps"])


def _whitened(values: np.ndarray, lengths: np.ndarray, eps: float) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps), each value counted `length` times; variance unbiased."""
    weights = np.asarray(lengths, np.float64)
    total = weights.sum()
    if total <= 0:
        return values
    mean = (values * weights).sum() / total
    variance = ((values - mean) ** 2 * weights).sum() / max(total - 1, 1)
    return (values - mean) / np.sqrt(variance + eps)


def opo(rollouts, hyper):
    """R_i - sum_j l_j R_j / sum_j l_j over the group: the length-weighted optimal baseline (OPO, 2505.23585)."""
    groups = _groups(rollouts)
    weights = np.asarray(rollouts.lengths, np.float64)
    total = np.bincount(groups.index, weights)[groups.index]
    weighted = np.bincount(groups.index, weights * groups.rewards)[groups.index]
    return _centre(groups, hyper, np.where(total > 0, weighted / np.where(total > 0, total, 1.0), groups.mean))


def gpg(rollouts, hyper):
    """alpha (R - group mean) / f_norm (GPG, 2504.02546).

    hyper: f_norm; alpha: "paper", B / (B - M) with M the completions of groups without gradient, or "verl",
    B / (number of nonzero rewards), which is what verl computes.
    """
    groups = _groups(rollouts)
    centred = _centre(groups, hyper)
    counted = np.count_nonzero(groups.rewards if hyper["alpha"] == "verl" else ~groups.equal)
    return centred * (len(centred) / max(counted, 1)) / hyper["f_norm"]


def dler(rollouts, hyper):
    """(R - group mean) / (std over the batch of these + eps) (DLER, 2510.15110; as REINFORCE++, per completion).

    The mean over the batch of the centred rewards is 0 by construction, so it is not subtracted.
    """
    centred = _centre(_groups(rollouts), hyper)
    return centred / (_std(centred, hyper["ddof"]) + hyper["eps"])


def gdpo(rollouts, hyper):
    """GDPO (2601.05242): each named reward normalised within its group, summed with its weight, then normalised over
    the batch.

        A = B(sum_k w_k (r_k - group mean) / (group std + eps)),   B(x) = x / (batch std + eps)

    The named rewards are the columns "reward/NAME" of the rollouts, with weights "weight/NAME" (jaxrl.shaping); without
    such columns `reward` is the only one. hyper: eps (1e-4 in the released TRL code), ddof, over: "responses" (TRL; the
    batch mean is not subtracted, as it is 0 by construction except for groups of one) or "tokens" (released verl code:
    B whitens over response tokens and subtracts the mean, so that a group of equal rewards does not get 0).
    """
    named = {k.removeprefix("reward/"): v for k, v in rollouts.columns.items() if k.startswith("reward/")}
    total = np.zeros(len(rollouts.group))
    for name, rewards in (named or {"": rollouts.reward}).items():
        weight = np.asarray(rollouts.columns.get(f"weight/{name}", 1.0), np.float64)
        total += weight * _normalised(_groups(rollouts, rewards), hyper)
    if hyper["over"] == "tokens":
        return _whitened(total, rollouts.lengths, hyper["eps"])
    return total / (_std(total, hyper["ddof"]) + hyper["eps"])


_EPS = Number(1e-6, 0, above=True)  # 0 would divide a group of equal rewards by 0
_DDOF = Integer(1, 0, 1)
_OVER = {"over": Choice("responses", ("responses", "tokens"))}
_SINGLETON = {"singleton": Choice("reward", ("reward", "zero"))}

# fn(rollouts, hyper) -> advantages [N] or [total]
ADVANTAGES: dict[str, Method] = {
    "grpo": Method(
        grpo, {"eps": _EPS, "ddof": _DDOF, "scale": Choice("group", ("group", "batch", "none")), **_SINGLETON}
    ),
    "dr_grpo": Method(dr_grpo, _SINGLETON),
    "rloo": Method(rloo, _SINGLETON),
    "reinforce_pp_baseline": Method(reinforce_pp_baseline, {"eps": Number(1e-8, 0, above=True), **_SINGLETON}),
    "opo": Method(opo, _SINGLETON),
    "gpg": Method(
        gpg, {"alpha": Choice("paper", ("paper", "verl")), "f_norm": Number(1.0, 0, above=True), **_SINGLETON}
    ),
    "dler": Method(dler, {"eps": _EPS, "ddof": _DDOF, **_SINGLETON}),
    "gdpo": Method(gdpo, {"eps": Number(1e-4, 0, above=True), "ddof": _DDOF, **_OVER, **_SINGLETON}),
}


def advantages(rollouts, name: str, overrides: Mapping | None = None) -> np.ndarray:
    """Advantages of a step's selected responses: float64 [N], or [total] from a method that gives one per token.

    Responses with valid False are left out of every statistic and get 0. Raises ValueError as `resolve`
    does, or for a method that returns another shape.
    """
    entry, hyper = resolve(ADVANTAGES, "advantage", name, overrides)
    valid = np.asarray(rollouts.valid, bool)
    if not valid.any():
        return np.zeros(len(valid))
    graded = rollouts.where(valid)
    found = np.asarray(entry.fn(graded, hyper), np.float64)
    if found.shape == graded.group.shape:
        where = valid
    elif found.shape == graded.tokens.shape:
        where = rollouts.per_token(valid)
    else:
        raise ValueError(
            f"advantage {name!r} must return [{len(graded)}], one a response, or [{len(graded.tokens)}], one a token; "
            f"not {list(found.shape)}"
        )
    out = np.zeros(len(where))
    out[where] = found
    return out
