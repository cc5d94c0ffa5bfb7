"""Outcome advantages: one number per completion from the rewards of its group. NumPy float64, on the host.

Every entry is `fn(rewards [N], group_ids [N], lengths [N], hyper) -> advantages [N]`, rewards and lengths (response
tokens) numeric, group_ids any integers in any order. Where a method subtracts the group mean, a group whose rewards are
exactly equal gets exactly 0 (decided by comparison, not by rounding), and a group of one follows hyper["singleton"]:
"reward" keeps its reward as advantage (verl: mean 0, std 1), "zero" gives 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl.algorithms.hyper import Choice, Integer, Method, Number, resolve


class _Groups(NamedTuple):
    rewards: np.ndarray
    index: np.ndarray  # group number of each completion
    size: np.ndarray  # of its group
    mean: np.ndarray  # of its group
    equal: np.ndarray  # bool: its group has several completions, all with the same reward


def _groups(rewards, group_ids) -> _Groups:
    rewards = np.asarray(rewards, np.float64)
    _, index = np.unique(np.asarray(group_ids), return_inverse=True)
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
    return float(np.std(values, ddof=ddof)) if len(values) > ddof else 0.0


def grpo(rewards, group_ids, lengths, hyper):
    """(R - group mean) / (std + eps) (GRPO, 2402.03300).

    hyper: eps (1e-6 verl, 1e-4 TRL), ddof (1: unbiased std, verl and TRL), scale: "group" (std of the group),
    "batch" (std of all rewards: TRL, Lite PPO 2508.08221) or "none" (no division).
    """
    groups = _groups(rewards, group_ids)
    centred = _centre(groups, hyper)
    if hyper["scale"] == "none":
        return centred
    if hyper["scale"] == "batch":
        return centred / (_std(groups.rewards, hyper["ddof"]) + hyper["eps"])
    squares = np.bincount(groups.index, (groups.rewards - groups.mean) ** 2)[groups.index]
    std = np.sqrt(squares / np.maximum(groups.size - hyper["ddof"], 1))
    return centred / (np.where(groups.size == 1, 1.0, std) + hyper["eps"])


def dr_grpo(rewards, group_ids, lengths, hyper):
    """R - group mean (Dr. GRPO, 2503.20783)."""
    return _centre(_groups(rewards, group_ids), hyper)


def rloo(rewards, group_ids, lengths, hyper):
    """R_i - mean of the others = G / (G - 1) (R_i - mean) (RLOO, 2402.14740)."""
    groups = _groups(rewards, group_ids)
    return _centre(groups, hyper) * np.where(groups.size > 1, groups.size / np.maximum(groups.size - 1, 1), 1.0)


def reinforce_pp_baseline(rewards, group_ids, lengths, hyper):
    """REINFORCE++-baseline (2501.03262): R - group mean, then whitened over the response tokens of the batch.

    Each completion counts `lengths` times in mean and (unbiased) variance; divided by sqrt(variance + eps), eps 1e-8 as
    verl. Whitening subtracts a batch mean, so a group of equal rewards does NOT get exactly 0 here.
    """
    centred = _centre(_groups(rewards, group_ids), hyper)
    weights = np.asarray(lengths, np.float64)
    total = weights.sum()
    if total <= 0:
        return centred
    mean = (centred * weights).sum() / total
    variance = ((centred - mean) ** 2 * weights).sum() / max(total - 1, 1)
    return (centred - mean) / np.sqrt(variance + hyper["eps"])


def opo(rewards, group_ids, lengths, hyper):
    """R_i - sum_j l_j R_j / sum_j l_j over the group: the length-weighted optimal baseline (OPO, 2505.23585)."""
    groups = _groups(rewards, group_ids)
    weights = np.asarray(lengths, np.float64)
    total = np.bincount(groups.index, weights)[groups.index]
    weighted = np.bincount(groups.index, weights * groups.rewards)[groups.index]
    return _centre(groups, hyper, np.where(total > 0, weighted / np.where(total > 0, total, 1.0), groups.mean))


def gpg(rewards, group_ids, lengths, hyper):
    """alpha (R - group mean) / f_norm (GPG, 2504.02546).

    hyper: f_norm; alpha: "paper", B / (B - M) with M the completions of groups without gradient, or "verl",
    B / (number of nonzero rewards), which is what verl computes.
    """
    groups = _groups(rewards, group_ids)
    centred = _centre(groups, hyper)
    counted = np.count_nonzero(groups.rewards if hyper["alpha"] == "verl" else ~groups.equal)
    return centred * (len(centred) / max(counted, 1)) / hyper["f_norm"]


def dler(rewards, group_ids, lengths, hyper):
    """(R - group mean) / (std over the batch of these + eps) (DLER, 2510.15110; as REINFORCE++, per completion).

    The mean over the batch of the centred rewards is 0 by construction, so it is not subtracted.
    """
    centred = _centre(_groups(rewards, group_ids), hyper)
    return centred / (_std(centred, hyper["ddof"]) + hyper["eps"])


_EPS = Number(1e-6, 0, above=True)  # 0 would divide a group of equal rewards by 0
_DDOF = Integer(1, 0, 1)
_SINGLETON = {"singleton": Choice("reward", ("reward", "zero"))}

# fn(rewards [N], group_ids [N], lengths [N], hyper) -> advantages [N]
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
}


def group_advantages(groups: Sequence[Any], name: str, overrides: Mapping | None = None) -> list[np.ndarray]:
    """Advantages for a list of `Group`s: one float64 [G] per group, in order.

    Completions with valid False are left out of every statistic and get 0. Raises ValueError as `resolve`.
    """
    entry, hyper = resolve(ADVANTAGES, "advantage", name, overrides)
    valid = [np.asarray(g.valid, bool) for g in groups]
    result = [np.zeros(len(v)) for v in valid]
    if not any(v.any() for v in valid):
        return result
    rewards = np.concatenate([np.asarray(g.rewards, np.float64)[v] for g, v in zip(groups, valid, strict=True)])
    lengths = np.concatenate([np.asarray(g.lengths)[v] for g, v in zip(groups, valid, strict=True)])
    ids = np.repeat(np.arange(len(groups)), [v.sum() for v in valid])
    advantages = entry.fn(rewards, ids, lengths, hyper)
    for i, v in enumerate(valid):
        result[i][v] = advantages[ids == i]
    return result
