"""Rewards that depend on response length. NumPy, on the host.

Every entry of LENGTH_REWARDS is `fn(inputs: LengthInputs, hyper) -> rewards [N]`. Rewards are float64, to be maximised,
and include the correctness reward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxrl.algorithms import length_penalties as penalties
from jaxrl.algorithms.hyper import Choice, Flag, Integer, Method, Number, resolve


@dataclasses.dataclass(frozen=True)
class LengthInputs:
    """What a length reward sees of N graded responses; values given are converted to arrays of the types below.

    correct: float64 [N], 0 or 1. lengths: float64 [N], response tokens as config.length.count counts them (the whole
    response, or thinking only). max_length: the response limit in tokens. budgets: float64 [N], requested tokens, 0 for
    none. modes: [N] of "none", "exact", "max", what the prompt asks for. group: int64 [N], the same number for
    responses of one prompt. truncated: bool [N], the response ran into the limit. columns: those of the rollouts, [N].
    state: what the reward's `update` returned last, {} at first.
    """

    correct: np.ndarray
    lengths: np.ndarray
    max_length: int
    budgets: Any = 0
    modes: Any = "none"
    group: Any = 0
    truncated: Any = False
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    state: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        types = {"correct": np.float64, "lengths": np.float64, "budgets": np.float64, "modes": object,
                 "group": np.int64, "truncated": bool}  # fmt: skip
        for name, dtype in types.items():
            array = np.broadcast_to(np.array(getattr(self, name), dtype), np.shape(self.correct))
            object.__setattr__(self, name, array)

    def by_group(self, fn: Callable, *arrays: np.ndarray) -> np.ndarray:
        """float64 [N]: fn applied to the arrays of each group, results in the order of the responses."""
        out = np.zeros(len(self.group))
        for g in np.unique(self.group):
            members = self.group == g
            out[members] = fn(*(a[members] for a in arrays))
        return out


def length_rewards(name: str, inputs: LengthInputs, overrides: Mapping | None = None) -> np.ndarray:
    """float64 [N]: the length reward `name` with constants `overrides`. Raises ValueError as `resolve`, or for a
    function that returns another shape."""
    entry, hyper = resolve(LENGTH_REWARDS, "length reward", name, overrides)
    found = np.asarray(entry.fn(inputs, hyper), np.float64)
    if found.shape != inputs.correct.shape:
        raise ValueError(f"length reward {name!r} must return [{len(inputs.correct)}], not {list(found.shape)}")
    return found


def next_state(name: str, inputs: LengthInputs, overrides: Mapping | None = None) -> dict[str, float]:
    """The state of the length reward `name` after a step that sampled `inputs`; {} for one without a state."""
    entry, hyper = resolve(LENGTH_REWARDS, "length reward", name, overrides)
    return entry.update(inputs, hyper) if isinstance(entry, AdaptiveReward) else {}


@dataclasses.dataclass(frozen=True)
class AdaptiveReward(Method):
    """A length reward with a state that JSON can hold: update(inputs, hyper) -> dict of numbers, once a step."""

    update: Callable = dataclasses.field(kw_only=True)


def none(inputs, hyper):
    """Correctness alone."""
    return inputs.correct


def _exact(inputs: LengthInputs, alpha: float) -> np.ndarray:
    return inputs.correct - alpha * np.abs(inputs.budgets - inputs.lengths)


def lcpo_exact(inputs, hyper):
    """LCPO-Exact (L1, 2503.04697 eq. 1): r = I - alpha |n_gold - n_y|; I alone without a budget.

    hyper: alpha, 3e-4 as printed; the first released code used 1/3000. Raises ValueError for prompts of
    mode "max": for mixed prompts use lcpo_max, which scores each by its mode.
    """
    if np.any(inputs.modes == "max"):
        raise ValueError("lcpo_exact got a prompt of mode 'max'; length reward lcpo_max scores both modes")
    return np.where(inputs.budgets > 0, _exact(inputs, hyper["alpha"]), inputs.correct)


def lcpo_max(inputs, hyper):
    """LCPO-Max (L1, 2503.04697 eq. 2): r = I clip(alpha (n_gold - n_y) + delta, 0, 1).

    Prompts of mode "exact" get the Exact reward with slope exact_alpha (the paper's dual objective);
    prompts without a budget get I. hyper: alpha 1e-3 and delta 0.5 are what the first released code amounts to (alpha
    is not printed; the current code's own alpha is twice ours). combine: "multiply", or "add" for the current code
    without multiplier_reward (I + clip(...)). form: "linear"; "sigmoid", the current code's min(sigmoid(alpha (n_gold -
    n_y)) + 0.1 [n_y <= n_gold], 1) in place of the clipped line; "sigmoid_paper" without the 0.1.
    """
    correct = inputs.correct
    slack = hyper["alpha"] * (inputs.budgets - inputs.lengths)
    if hyper["form"] == "linear":
        term = np.clip(slack + hyper["delta"], 0, 1)
    else:
        bonus = 0.1 if hyper["form"] == "sigmoid" else 0.0
        term = np.minimum(1 / (1 + np.exp(-np.clip(slack, -700, 700))) + bonus * (slack >= 0), 1)
    scored = correct * term if hyper["combine"] == "multiply" else correct + term
    scored = np.where(inputs.modes == "exact", _exact(inputs, hyper["exact_alpha"]), scored)
    return np.where(inputs.budgets > 0, scored, correct)


def arora(inputs, hyper):
    """Arora & Zanette (2502.04463): r = I (1 - alpha sigmoid((len - mean) / (std + 1e-7))).

    Mean and (biased) std over the correct, untruncated responses of the prompt; truncated responses count as wrong.
    """
    correct = np.where(inputs.truncated, 0.0, inputs.correct)

    def score(right, length):
        chosen = length[right > 0]
        if not len(chosen):
            return np.zeros(len(length))
        z = (length - chosen.mean()) / (chosen.std() + 1e-7)
        return right * (1 - hyper["alpha"] / (1 + np.exp(-np.clip(z, -700, 700))))

    return inputs.by_group(score, correct, inputs.lengths)


def kimi(inputs, hyper):
    """Kimi k1.5 (2501.12599): r = I + weight * term, lambda = 0.5 - (len - min) / (max - min) over the group.

    term: lambda if correct, min(0, lambda) if not, 0 if all lengths are equal. The paper raises weight during training.
    """

    def term(right, length):
        spread = length.max() - length.min()
        if spread == 0:
            return np.zeros(len(length))
        lam = 0.5 - (length - length.min()) / spread
        return np.where(right > 0, lam, np.minimum(0, lam))

    return inputs.correct + hyper["weight"] * inputs.by_group(term, inputs.correct, inputs.lengths)


def alp(inputs, hyper):
    """ALP (2506.05256): r = I - beta max(p_solved, 1/K) len / N: p_solved the group's accuracy, K its size.

    hyper: beta; N the normalising length in tokens, 0 for max_length.
    """
    rate = inputs.by_group(lambda right: np.full(len(right), max(right.mean(), 1 / len(right))), inputs.correct)
    return inputs.correct - hyper["beta"] * rate * inputs.lengths / (hyper["N"] or inputs.max_length)


def shorter_better(inputs, hyper):
    """ShorterBetter (2504.21370): r = alpha I - beta |l* - len|, l* the shortest correct length or the group mean."""

    def score(right, length):
        best = length[right > 0].min() if np.any(right > 0) else length.mean()
        return hyper["alpha"] * right - hyper["beta"] * np.abs(best - length)

    return inputs.by_group(score, inputs.correct, inputs.lengths)


def laser(inputs, hyper):
    """LASER (2505.15612): r = I + bonus * I * [len <= target]. hyper: target in tokens, 0 for half of max_length."""
    within = inputs.lengths <= (hyper["target"] or inputs.max_length / 2)
    return inputs.correct + hyper["bonus"] * inputs.correct * within


def laser_targets(inputs: LengthInputs, candidates, coverage: str = "all") -> dict[str, float]:
    """LASER-D's targets from a monitored batch: {"easy", "medium", "hard"} -> tokens.

    The coverage of a level at a length L is the share of its responses with len <= L. The target is the smallest
    candidate at which at least one correct response is still expected in a group at the level's lower accuracy:
    int(coverage * int(G * level)) >= 1 with level 2/3, 1/3, and 1 response for hard. G is the largest group. (The
    "floor" rule of the released code.)

    coverage: "all", as released: over all responses of groups with accuracy > 2/3, > 1/3, below; where no candidate
    fits, the target is the longest response of the batch. "correct": over the correct responses of groups with
    accuracy >= 2/3, >= 1/3, below; max_length where no candidate fits.
    """
    level = _levels(inputs, strict=coverage == "all")
    counted = np.ones(len(level), bool) if coverage == "all" else inputs.correct > 0
    most = max(inputs.lengths, default=inputs.max_length) if coverage == "all" else inputs.max_length
    size = int(np.max(np.bincount(np.unique(inputs.group, return_inverse=True)[1]), initial=0))
    targets = {}
    for name, code, expected in (
        ("easy", 2, int(size * 2 / 3)),
        ("medium", 1, int(size / 3)),
        ("hard", 0, 1),
    ):
        lengths = inputs.lengths[(level == code) & counted]
        fits = [c for c in sorted(candidates) if len(lengths) and int(np.mean(lengths <= c) * expected) >= 1]
        targets[name] = float(min([*fits[:1], most]))
    return targets


def _levels(inputs: LengthInputs, strict: bool = False) -> np.ndarray:
    """Difficulty by group accuracy: 2 easy (>= 2/3), 1 medium (>= 1/3), 0 hard. strict: > instead of >=."""
    accuracy = inputs.by_group(lambda right: np.full(len(right), right.mean()), inputs.correct)
    reached = np.greater if strict else np.greater_equal
    return reached(accuracy, 2 / 3).astype(int) + reached(accuracy, 1 / 3)


def laser_d(inputs, hyper):
    """LASER-D (2505.15612): LASER with one target per difficulty of the prompt.

    A prompt is easy from an accuracy of 2/3 on, medium from 1/3. hyper: bonus, and target_easy, target_medium,
    target_hard in tokens. A target of 0 is found by `laser_targets` on this very batch (the paper uses a separate
    monitoring set) among `candidates` equally spaced lengths up to max_length, by `coverage`.
    """
    grid = np.arange(1, hyper["candidates"] + 1) * inputs.max_length / hyper["candidates"]
    found = laser_targets(inputs, grid, hyper["coverage"])
    target = np.array([hyper[f"target_{k}"] or found[k] for k in ("hard", "medium", "easy")])
    return inputs.correct + hyper["bonus"] * inputs.correct * (inputs.lengths <= target[_levels(inputs)])


def overlong(inputs, hyper):
    """DAPO's soft overlong punishment (2503.14476 eq. 13): r = I + factor * p.

        p = 0 for len <= L - cache,   ((L - cache) - len) / cache beyond,   not below -1 with floor

    hyper: max_length (L; 0 for the response limit), cache (0 for a fifth of L, DAPO's 4096 of 20480),
    factor, floor (True as printed, in TRL and OpenRLHF; verl has none). DAPO's own correctness reward is
    +-1; here it is 0/1, which changes no group-normalised advantage but the weight of p: factor 0.5 is the
    equivalent. Raises ValueError if cache > L.
    """
    limit = hyper["max_length"] or inputs.max_length
    cache = hyper["cache"] or limit / 5
    if not 0 < cache <= limit:
        raise ValueError(f"overlong cache must be between 1 and max_length {limit}, not {cache}")
    penalty = np.minimum((limit - cache - inputs.lengths) / cache, 0)
    return inputs.correct + hyper["factor"] * (np.maximum(penalty, -1) if hyper["floor"] else penalty)


def dler(inputs, hyper):
    """DLER's truncation (2510.15110): a response beyond the limit gets 0, any other its correctness.

    hyper: limit in tokens (published 4000), 0 for max_length. Responses cut by the sampler get 0 too.
    """
    beyond = inputs.truncated | (inputs.lengths > (hyper["limit"] or inputs.max_length))
    return np.where(beyond, 0.0, inputs.correct)


_LCPO_MAX = {"alpha": Number(1e-3), "delta": Number(0.5, 0, 1), "exact_alpha": Number(3e-4)}
_LCPO_MAX |= {"combine": Choice("multiply", ("multiply", "add"))}
_LCPO_MAX |= {"form": Choice("linear", ("linear", "sigmoid", "sigmoid_paper"))}
_TARGETS = {f"target_{level}": Integer(0) for level in ("easy", "medium", "hard")}
_COVERAGE = {"candidates": Integer(16, 1, 4096), "coverage": Choice("all", ("all", "correct"))}
_OVERLONG = {"max_length": Integer(0), "cache": Integer(0), "factor": Number(1.0), "floor": Flag(True)}
_GR3 = {"alpha": Number(0.33), "calibration": Choice("representative", ("representative", "correct", "none"))}
_LINEAR = {"coef": Number(0.25), "per": Choice("group", ("group", "limit")), "gated": Flag(False)}
_SLACK = {"quantile": Number(0.5, 0, 1), "slack": Number(0.25), "tokens": Integer(0), "beta": Number(0.2)}
_SLACK |= {"cap": Number(0.3), "floor": Number(0.5, 0, 1)}
_LEASH = {"target": Integer(0), "start": Number(0.2), "rate": Number(0.05), "low": Number(0.0), "high": Number(1.0)}
_A_DLP = {"start": Number(1e-3), "rate": Number(1e-3), "reference": Number(0.62, 0, 1)}

LENGTH_REWARDS: dict[str, Method] = {
    "none": Method(none),
    "lcpo_exact": Method(lcpo_exact, {"alpha": Number(3e-4)}),
    "lcpo_max": Method(lcpo_max, _LCPO_MAX),
    "arora": Method(arora, {"alpha": Number(0.1, 0, 1)}),
    "kimi": Method(kimi, {"weight": Number(1.0)}),
    "alp": Method(alp, {"beta": Number(0.1), "N": Integer(0)}),
    "shorter_better": Method(shorter_better, {"alpha": Number(2.0, 0, above=True), "beta": Number(1e-3)}),
    "laser": Method(laser, {"bonus": Number(0.5), "target": Integer(0)}),
    "laser_d": Method(laser_d, {"bonus": Number(0.5), **_TARGETS, **_COVERAGE}),
    "overlong": Method(overlong, _OVERLONG),
    "dler": Method(dler, {"limit": Integer(0)}),
    "gr3": Method(penalties.gr3, _GR3),
    "linear": Method(penalties.linear, _LINEAR),
    "efficiency": Method(penalties.efficiency, {"form": Choice("bonus", ("bonus", "attenuate"))}),
    "quantile_slack": Method(penalties.quantile_slack, _SLACK),
    "leash": AdaptiveReward(penalties.leash, _LEASH, ordered=[("low", "high")], update=penalties.leash_update),
    "a_dlp": AdaptiveReward(penalties.a_dlp, _A_DLP, update=penalties.a_dlp_update),
}
