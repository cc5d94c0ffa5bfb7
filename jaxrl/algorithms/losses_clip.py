"""Losses that clip the token ratio rho = pi / pi_old between two bounds: GRPO, Dr. GRPO, DAPO, PPO, DAC, BAPO.

    l = max(-rho A, -clip(rho, low, high) A),   and for A < 0 with dual clip c > 1:   l = min(l, -c A)

They differ in the bounds and in the aggregation (see losses.LOSSES).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.algorithms.inputs import LossInputs, guarded, token_ratio, token_stats


def _clipped(tokens: LossInputs, ratio: jax.Array, low, high, dual_clip, **more) -> tuple[jax.Array, dict]:
    """The pessimistic clipped loss of the module's docstring; low, high: bounds on rho, scalars or [R, T];
    more: sums to report.
    """
    adv = tokens.advantages
    plain, clipped = -ratio * adv, -jnp.clip(ratio, low, high) * adv
    loss = jnp.where(clipped > plain, clipped, plain)
    cap = (adv < 0) & (dual_clip > 0) & (loss > -dual_clip * adv)
    stats = token_stats(
        tokens,
        ratio,
        clip_low=(adv < 0) & (ratio < low),
        clip_high=(adv > 0) & (ratio > high),
        dual_clip=cap,
        **more,
    )
    return jnp.where(cap, -dual_clip * adv, loss), stats


def clip_loss(inputs: LossInputs, hyper):
    """PPO's clipped surrogate (1707.06347 eq. 7), the token loss of GRPO, Dr. GRPO, DAPO (2503.14476 eq. 8) and PPO.

    hyper: clip_low, clip_high (bounds 1 - low, 1 + high), dual_clip (c of 1912.09729; 0 = off),
    log_ratio_clamp. Returns the token loss [R, T] and sums (see `token_stats`; dual_clip: tokens at -c A).
    """
    tokens = guarded(inputs)
    low, high = 1 - hyper["clip_low"], 1 + hyper["clip_high"]
    return _clipped(tokens, token_ratio(tokens, hyper), low, high, hyper["dual_clip"])


def dac_loss(inputs: LossInputs, hyper):
    """Dynamic adaptive clipping of DCPO (2509.02333): the bounds widen as the old probability q falls.

        low  = 1/2 + 1/2 sqrt(max(1 - 4 eps_low / q, 0)),   high = 1/2 + 1/2 sqrt(1 + 4 eps_high / q) <=
        ratio_max

    hyper: eps_low, eps_high, ratio_max, dual_clip (0 = off), log_ratio_clamp.
    """
    tokens = guarded(inputs)
    inverse_q = jnp.exp(jnp.minimum(-tokens.old_logp, 60.0))  # 60: finite in float32, far beyond ratio_max
    low = 0.5 + 0.5 * jnp.sqrt(jnp.maximum(1 - 4 * hyper["eps_low"] * inverse_q, 0))
    high = jnp.minimum(0.5 + 0.5 * jnp.sqrt(1 + 4 * hyper["eps_high"] * inverse_q), hyper["ratio_max"])
    return _clipped(tokens, token_ratio(tokens, hyper), low, high, hyper["dual_clip"])


def bapo_loss(inputs: LossInputs, hyper):
    """BAPO (2510.18927): PPO clip between the ratio bounds hyper["low"], hyper["high"] that `bapo_bounds` chose.

    Without `bapo_bounds` the bounds are where its search starts. Extra sums: bound_low, bound_high (their means over
    tokens are the bounds in use).
    """
    tokens = guarded(inputs)
    low, high = (jnp.full_like(tokens.mask, hyper[k]) for k in ("low", "high"))
    ratio = token_ratio(tokens, hyper)
    return _clipped(tokens, ratio, low, high, hyper["dual_clip"], bound_low=low, bound_high=high)


def bapo_schedule(hyper: dict) -> tuple[np.ndarray, np.ndarray]:
    """The bounds BAPO tries, in order: raise the lower one step by step to its maximum, then the upper one."""
    lows, highs = [hyper["low"]], [hyper["high"]]
    while lows[-1] < hyper["low_max"] - 1e-9 and hyper["low_step"] > 0:
        lows.append(min(lows[-1] + hyper["low_step"], hyper["low_max"]))
    while highs[-1] < hyper["high_max"] - 1e-9 and hyper["high_step"] > 0:
        highs.append(min(highs[-1] + hyper["high_step"], hyper["high_max"]))
    extra = len(highs) - 1
    return np.array(lows + [lows[-1]] * extra), np.array([highs[0]] * len(lows) + highs[1:])


def bapo_bounds(inputs: LossInputs, hyper) -> dict:
    """BAPO's bound search over a whole mini-batch, before its update: hyper with "low" and "high" replaced by arrays.

    The clipped contribution of a token is min(rho, high) A for A >= 0 and max(rho, low) A for A < 0; P and N are the
    sums of the positive and of the negative ones' magnitudes. The first bounds of `bapo_schedule` with P / (P + N) >=
    hyper["target"] are taken, else its last. Written as share, the released code's ratio P / N >= 1 is target 0.5.
    inputs: all rows of the mini-batch (any sharding).
    """
    tokens = guarded(inputs)
    ratio, adv = token_ratio(tokens, hyper), tokens.advantages
    lows, highs = (jnp.asarray(x, ratio.dtype) for x in bapo_schedule(hyper))

    def share(i):
        contribution = jnp.where(adv >= 0, jnp.minimum(ratio, highs[i]), jnp.maximum(ratio, lows[i])) * adv
        positive, negative = jnp.sum(jnp.maximum(contribution, 0)), jnp.sum(jnp.maximum(-contribution, 0))
        total = positive + negative
        return jnp.where(total > 0, positive / jnp.where(total > 0, total, 1), 1.0)  # nothing to balance: stop

    def unmet(i):
        return (i < len(lows) - 1) & (share(i) < hyper["target"])

    i = jax.lax.while_loop(unmet, lambda i: i + 1, jnp.int32(0))
    return {**hyper, "low": lows[i], "high": highs[i]}
