"""Newer length rewards: relative to the group (GR3, prime-rl's, quantile slack), and with an adaptive multiplier
(Leash, A-DLP). LENGTH_REWARDS (length.py) lists them with their constants; `inputs` is a LengthInputs.

An adaptive reward reads its state, a dict that JSON can hold, from `inputs.state` ({} at first) and has an
`update(inputs, hyper) -> state`, called once a step with everything that the step has sampled.
"""

from __future__ import annotations

import numpy as np


def gr3(inputs, hyper):
    """GR3 (2603.10535): r = I / (1 + a len / mean length of the group), a <= alpha.

    hyper: alpha (0.33: prime-rl's; 0.3 elsewhere), calibration: which responses the rescaling must not push below the
    group's mean reward. "representative": a correct response of mean length, 1 / (1 + a) >= mean(r) (what the paper's
    advantage-aware calibration protects, as others describe it; solved here for each group). "correct": every correct
    response, min(r over the correct) >= mean(r). "none" (prime-rl). a is alpha if that satisfies the condition, else
    bisection finds an a below alpha that does; in a group that is all correct only 0 does, unless lengths are equal.
    """

    def rescaled(right, length, a):
        return right / (1 + a * length / max(length.mean(), 1e-9))

    def holds(right, length, a):
        found = rescaled(right, length, a)
        least = 1 / (1 + a) if hyper["calibration"] == "representative" else found[right > 0].min()
        return least >= found.mean() - 1e-12

    def score(right, length):
        alpha = hyper["alpha"]
        if hyper["calibration"] == "none" or not np.any(right > 0) or holds(right, length, alpha):
            return rescaled(right, length, alpha)
        low, high = 0.0, alpha
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(right, length, middle) else (low, middle)
        return rescaled(right, length, low)

    return inputs.by_group(score, inputs.correct, inputs.lengths)


def linear(inputs, hyper):
    """prime-rl's linear penalty (#2901): r = I - coef p len / L, p the group's accuracy (0: no penalty).

    hyper: coef 0.25; per: what L is, "group" for the longest response of the group (#2901), "limit" for max_length
    (#2702). gated: only for correct responses (#3376), so that short wrong ones are not preferred. prime-rl's terms for
    prompt tokens and turns are left out: they are equal for all responses here and would not change an advantage.
    """

    def penalty(right, length):
        most = max(length.max(), 1) if hyper["per"] == "group" else inputs.max_length
        return hyper["coef"] * right.mean() * length / most * (right if hyper["gated"] else 1.0)

    return inputs.correct - inputs.by_group(penalty, inputs.correct, inputs.lengths)


def efficiency(inputs, hyper):
    """prime-rl's efficiency rewards, on correct responses only.

    hyper: form, "bonus", r = I (1 + clip(1 - len / mean, 0, 1)) with the mean over the correct responses of the
    group (#2265), or "attenuate", r = I min / len with their shortest (#2169).
    """

    def score(right, length):
        chosen = length[right > 0]
        if not len(chosen) or chosen.mean() <= 0:
            return right
        if hyper["form"] == "attenuate":
            return right * max(chosen.min(), 1) / np.maximum(length, 1)
        return right * (1 + np.clip(1 - length / chosen.mean(), 0, 1))

    return inputs.by_group(score, inputs.correct, inputs.lengths)


def quantile_slack(inputs, hyper):
    """Penalty on correct responses that exceed the length of their siblings by more than a slack (miles #1573).

        r = max(min(floor, I), I - min(cap, beta (len - allowed) / ref))  where len > allowed
        ref = quantile of the lengths of the group's correct responses,  allowed = ref (1 + slack) + tokens

    Groups with fewer than 2 correct responses get no penalty. hyper: quantile, slack, tokens, beta, cap, floor.
    """

    def score(right, length):
        chosen = length[right > 0]
        if len(chosen) < 2:
            return right
        ref = max(np.quantile(chosen, hyper["quantile"]), 1.0)
        excess = np.maximum(length - ref * (1 + hyper["slack"]) - hyper["tokens"], 0)
        shaped = right - np.minimum(hyper["cap"], hyper["beta"] * excess / ref)
        return np.where((right > 0) & (excess > 0), np.maximum(shaped, np.minimum(hyper["floor"], right)), right)

    return inputs.by_group(score, inputs.correct, inputs.lengths)


# ---- rewards with an adaptive multiplier


def multiplier(inputs, hyper) -> float:
    """The multiplier of an adaptive reward: from its state, hyper["start"] before the first update."""
    return inputs.state.get("multiplier", hyper["start"])


def _excess(inputs, hyper) -> np.ndarray:
    return inputs.lengths / (hyper["target"] or inputs.max_length / 2) - 1


def leash(inputs, hyper):
    """Leash (2512.21540): r = clip(I - lambda max(len / target - 1, 0), -1, 1): one-sided, so nothing is won by being
    shorter than the target. hyper: target in tokens, 0 for half of max_length; start, rate, low, high of lambda."""
    return np.clip(inputs.correct - multiplier(inputs, hyper) * np.maximum(_excess(inputs, hyper), 0), -1, 1)


def leash_update(inputs, hyper) -> dict:
    """Dual ascent on the constraint E[len / target - 1] <= 0: lambda + rate mean(len / target - 1), in [low, high]."""
    step = hyper["rate"] * float(np.mean(_excess(inputs, hyper))) if len(inputs.lengths) else 0.0
    return {"multiplier": float(np.clip(multiplier(inputs, hyper) + step, hyper["low"], hyper["high"]))}


def a_dlp(inputs, hyper):
    """A-DLP (2505.18298): r = I - lambda len. hyper: start and rate of lambda (1e-3 both in the released script) and
    reference, the accuracy above which it grows (0.62 there: the accuracy of the model that training starts from)."""
    return inputs.correct - multiplier(inputs, hyper) * inputs.lengths


def a_dlp_update(inputs, hyper) -> dict:
    """lambda follows the batch's accuracy: max(lambda + rate (accuracy - reference), 0)."""
    step = hyper["rate"] * float(np.mean(inputs.correct) - hyper["reference"]) if len(inputs.correct) else 0.0
    return {"multiplier": max(float(multiplier(inputs, hyper) + step), 0.0)}
