"""Rewards that depend on response length, LCPO's prompt suffixes, and samplers of length budgets. NumPy, on the host.

Every entry of LENGTH_REWARDS is

    fn(correct [N], lengths [N], budgets [N], group_ids [N], truncated [N], max_length, modes [N], hyper) ->
    rewards [N]

correct: 0/1. lengths: response tokens, as counted by the caller (whole response, or thinking only).
budgets: requested tokens, 0 for none. group_ids: any integers; completions of one prompt share one.
truncated: True where the response ran into the limit. max_length: that limit in tokens. modes: "none",
"exact" or "max" per completion. Rewards are float64, to be maximised, and include the correctness reward.
Only completions that were graded should be passed.
"""

from __future__ import annotations

import numpy as np

from jaxrl.algorithms.hyper import Choice, Flag, Integer, Method, Number


def _floats(*arrays):
    return tuple(np.asarray(a, np.float64) for a in arrays)


def _by_group(group_ids, fn, *arrays) -> np.ndarray:
    """Apply fn to the arrays of each group and put the results back in place."""
    group_ids = np.asarray(group_ids)
    out = np.zeros(len(group_ids))
    for g in np.unique(group_ids):
        members = group_ids == g
        out[members] = fn(*(a[members] for a in arrays))
    return out


def none(correct, lengths, budgets, group_ids, truncated, max_length, modes, hyper):
    """Correctness alone."""
    return np.array(correct, np.float64)


def _exact(correct, lengths, budgets, alpha):
    return correct - alpha * np.abs(budgets - lengths)


def lcpo_exact(correct, lengths, budgets, group_ids, truncated, max_length, modes, hyper):
    """LCPO-Exact (L1, 2503.04697 eq. 1): r = I - alpha |n_gold - n_y|; I alone without a budget.

    hyper: alpha, 3e-4 as printed; the first released code used 1/3000. Raises ValueError for prompts of
    mode "max": for mixed prompts use lcpo_max, which scores each by its mode.
    """
    if np.any(np.asarray(modes) == "max"):
        raise ValueError("lcpo_exact got a prompt of mode 'max'; length reward lcpo_max scores both modes")
    correct, lengths, budgets = _floats(correct, lengths, budgets)
    return np.where(budgets > 0, _exact(correct, lengths, budgets, hyper["alpha"]), correct)


def lcpo_max(correct, lengths, budgets, group_ids, truncated, max_length, modes, hyper):
    """LCPO-Max (L1, 2503.04697 eq. 2): r = I clip(alpha (n_gold - n_y) + delta, 0, 1).

    Prompts of mode "exact" get the Exact reward with slope exact_alpha (the paper's dual objective);
    prompts without a budget get I. hyper: alpha 1e-3 and delta 0.5 are what the first released code amounts to (alpha
    is not printed; the current code's own alpha is twice ours). combine: "multiply", or "add" for the current code
    without multiplier_reward (I + clip(...)). form: "linear", or "sigmoid" for I * sigmoid(alpha (n_gold - n_y)).
    """
    correct, lengths, budgets = _floats(correct, lengths, budgets)
    slack = hyper["alpha"] * (budgets - lengths)
    if hyper["form"] == "sigmoid":
        term = 1 / (1 + np.exp(-np.clip(slack, -700, 700)))
    else:
        term = np.clip(slack + hyper["delta"], 0, 1)
    scored = correct * term if hyper["combine"] == "multiply" else correct + term
    exact = _exact(correct, lengths, budgets, hyper["exact_alpha"])
    return np.where(budgets > 0, np.where(np.asarray(modes) == "exact", exact, scored), correct)


def arora(correct, lengths, budgets, group_ids, truncated, max_length, modes, hyper):
    """Arora & Zanette (2502.04463): r = I (1 - alpha sigmoid((len - mean) / (std + 1e-7))).

    Mean and (biased) std over the correct, untruncated responses of the prompt; truncated responses count as wrong.
    """
    correct, lengths = _floats(correct, lengths)
    correct = np.where(np.asarray(truncated, bool), 0.0, correct)

    def score(right, length):
        chosen = length[right > 0]
        if not len(chosen):
            return np.zeros(len(length))
        z = (length - chosen.mean()) / (chosen.std() + 1e-7)
        return right * (1 - hyper["alpha"] / (1 + np.exp(-np.clip(z, -700, 700))))

    return _by_group(group_ids, score, correct, lengths)


def kimi(correct, lengths, budgets, group_ids, truncated, max_length, modes, hyper):
    """Kimi k1.5 (2501.12599): r = I + weight * term, lambda = 0.5 - (len - min) / (max - min) over the group.

    term: lambda if correct, min(0, lambda) if not, 0 if all lengths are equal. The paper raises weight during training.
    """
    correct, lengths = _floats(correct, lengths)

    def term(right, length):
        spread = length.max() - length.min()
        if spread == 0:
            return np.zeros(len(length))
        lam = 0.5 - (length - length.min()) / spread
        return np.where(right > 0, lam, np.minimum(0, lam))

    return correct + hyper["weight"] * _by_group(group_ids, term, correct, lengths)


def alp(correct, lengths, budgets, group_ids, truncated, max_length, modes, hyper):
    """ALP (2506.05256): r = I - beta max(p_solved, 1/K) len / N: p_solved the group's accuracy, K its size.

    hyper: beta; N the normalising length in tokens, 0 for max_length.
    """
    correct, lengths = _floats(correct, lengths)
    rate = _by_group(group_ids, lambda right: np.full(len(right), max(right.mean(), 1 / len(right))), correct)
    return correct - hyper["beta"] * rate * lengths / (hyper["N"] or max_length)


def shorter_better(correct, lengths, budgets, group_ids, truncated, max_length, modes, hyper):
    """ShorterBetter (2504.21370): r = alpha I - beta |l* - len|, l* the shortest correct length or the group mean."""
    correct, lengths = _floats(correct, lengths)

    def score(right, length):
        best = length[right > 0].min() if np.any(right > 0) else length.mean()
        return hyper["alpha"] * right - hyper["beta"] * np.abs(best - length)

    return _by_group(group_ids, score, correct, lengths)


def laser(correct, lengths, budgets, group_ids, truncated, max_length, modes, hyper):
    """LASER (2505.15612): r = I + bonus * I * [len <= target]. hyper: target in tokens, 0 for half of max_length."""
    correct, lengths = _floats(correct, lengths)
    return correct + hyper["bonus"] * correct * (lengths <= (hyper["target"] or max_length / 2))


def laser_targets(correct, lengths, group_ids, candidates, max_length) -> dict[str, float]:
    """LASER-D's targets from a monitored batch: {"easy", "medium", "hard"} -> tokens.

    Groups with accuracy >= 2/3 are easy, >= 1/3 medium, below hard. The coverage of a level at a length L is the share
    of its correct responses with len <= L. The target is the smallest candidate at which at least one correct response
    is still expected in a group at the level's lower accuracy: int(coverage * int(G * level)) >= 1 with level 2/3, 1/3,
    and 1 response for hard; max_length if none. G is the largest group. (The "floor" rule of the released code.)
    """
    correct, lengths = _floats(correct, lengths)
    level = _levels(correct, group_ids)
    size = int(np.max(np.bincount(np.unique(group_ids, return_inverse=True)[1]), initial=0))
    targets = {}
    for name, code, expected in (
        ("easy", 2, int(size * 2 / 3)),
        ("medium", 1, int(size / 3)),
        ("hard", 0, 1),
    ):
        right = lengths[(level == code) & (correct > 0)]
        fits = [c for c in sorted(candidates) if len(right) and int(np.mean(right <= c) * expected) >= 1]
        targets[name] = float(fits[0]) if fits else float(max_length)
    return targets


def _levels(correct, group_ids) -> np.ndarray:
    """Difficulty by group accuracy: 2 easy, 1 medium, 0 hard."""
    accuracy = _by_group(group_ids, lambda right: np.full(len(right), right.mean()), correct)
    return (accuracy >= 2 / 3).astype(int) + (accuracy >= 1 / 3)


def laser_d(correct, lengths, budgets, group_ids, truncated, max_length, modes, hyper):
    """LASER-D (2505.15612): LASER with one target per difficulty of the prompt.

    hyper: bonus, and target_easy, target_medium, target_hard in tokens. A target of 0 is found by
    `laser_targets` on this very batch (the paper uses a separate monitoring set) among `candidates` equally
    spaced lengths up to max_length.
    """
    correct, lengths = _floats(correct, lengths)
    grid = np.arange(1, hyper["candidates"] + 1) * max_length / hyper["candidates"]
    found = laser_targets(correct, lengths, group_ids, grid, max_length)
    target = np.array([hyper[f"target_{k}"] or found[k] for k in ("hard", "medium", "easy")])
    return correct + hyper["bonus"] * correct * (lengths <= target[_levels(correct, group_ids)])


def overlong(correct, lengths, budgets, group_ids, truncated, max_length, modes, hyper):
    """DAPO's soft overlong punishment (2503.14476 eq. 13): r = I + factor * p.

        p = 0 for len <= L - cache,   ((L - cache) - len) / cache beyond,   not below -1 with floor

    hyper: max_length (L; 0 for the response limit), cache (0 for a fifth of L, DAPO's 4096 of 20480),
    factor, floor (True as printed, in TRL and OpenRLHF; verl has none). DAPO's own correctness reward is
    +-1; here it is 0/1, which changes no group-normalised advantage but the weight of p: factor 0.5 is the
    equivalent. Raises ValueError if cache > L.
    """
    correct, lengths = _floats(correct, lengths)
    limit = hyper["max_length"] or max_length
    cache = hyper["cache"] or limit / 5
    if not 0 < cache <= limit:
        raise ValueError(f"overlong cache must be between 1 and max_length {limit}, not {cache}")
    penalty = np.minimum((limit - cache - lengths) / cache, 0)
    return correct + hyper["factor"] * (np.maximum(penalty, -1) if hyper["floor"] else penalty)


def dler(correct, lengths, budgets, group_ids, truncated, max_length, modes, hyper):
    """DLER's truncation (2510.15110): a response beyond the limit gets 0, any other its correctness.

    hyper: limit in tokens (published 4000), 0 for max_length. Responses cut by the sampler get 0 too.
    """
    correct, lengths = _floats(correct, lengths)
    beyond = np.asarray(truncated, bool) | (lengths > (hyper["limit"] or max_length))
    return np.where(beyond, 0.0, correct)


_LCPO_MAX = {"alpha": Number(1e-3), "delta": Number(0.5, 0, 1), "exact_alpha": Number(3e-4)}
_LCPO_MAX |= {"combine": Choice("multiply", ("multiply", "add")), "form": Choice("linear", ("linear", "sigmoid"))}
_TARGETS = {f"target_{level}": Integer(0) for level in ("easy", "medium", "hard")}
_OVERLONG = {"max_length": Integer(0), "cache": Integer(0), "factor": Number(1.0), "floor": Flag(True)}

LENGTH_REWARDS: dict[str, Method] = {
    "none": Method(none),
    "lcpo_exact": Method(lcpo_exact, {"alpha": Number(3e-4)}),
    "lcpo_max": Method(lcpo_max, _LCPO_MAX),
    "arora": Method(arora, {"alpha": Number(0.1, 0, 1)}),
    "kimi": Method(kimi, {"weight": Number(1.0)}),
    "alp": Method(alp, {"beta": Number(0.1), "N": Integer(0)}),
    "shorter_better": Method(shorter_better, {"alpha": Number(2.0, 0, above=True), "beta": Number(1e-3)}),
    "laser": Method(laser, {"bonus": Number(0.5), "target": Integer(0)}),
    "laser_d": Method(laser_d, {"bonus": Number(0.5), **_TARGETS, "candidates": Integer(16, 1, 4096)}),
    "overlong": Method(overlong, _OVERLONG),
    "dler": Method(dler, {"limit": Integer(0)}),
}


BUDGET_SAMPLERS = ("uniform", "log_uniform")


def sample_budgets(rng: np.random.Generator, n: int, kind: str, low: int, high: int) -> np.ndarray:
    """n length budgets in tokens, int64 in [low, high].

    uniform: every integer alike (L1: 100 to 4000). log_uniform: floor(2^U(log2 low, log2 (high + 1))), as
    much mass from 100 to 200 as from 1000 to 2000 (the released code's use_log option: 2^U(8, 14.5)).
    Raises ValueError unless 1 <= low <= high and the kind is known.
    """
    if kind not in BUDGET_SAMPLERS:
        raise ValueError(f"unknown budget sampler {kind!r}; valid: {', '.join(BUDGET_SAMPLERS)}")
    if not 1 <= low <= high:
        raise ValueError(f"budgets need 1 <= low <= high, not low {low}, high {high}")
    if kind == "uniform":
        return rng.integers(low, high, n, endpoint=True)
    drawn = np.exp2(rng.uniform(np.log2(low), np.log2(high + 1), n))
    return np.clip(np.floor(drawn), low, high).astype(np.int64)
