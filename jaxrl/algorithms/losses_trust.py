"""Losses that keep the policy close to the old one by other means than clipping the ratio: DPPO, VESPO, DRO."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.algorithms.inputs import LossInputs, guarded, token_ratio, token_stats
from jaxrl.algorithms.segments import sequence_sum


def _masked_gradient(tokens: LossInputs, outside, hyper):
    """-A sg[min(rho, ratio_max)] log pi, and 0 for tokens outside the trust region."""
    ratio = token_ratio(tokens, hyper)
    weight = jax.lax.stop_gradient(jnp.where(outside, 0, jnp.minimum(ratio, hyper["ratio_max"])))
    stats = token_stats(tokens, ratio, outside & (tokens.advantages <= 0), outside & (tokens.advantages > 0))
    return -tokens.advantages * weight * tokens.logp, stats


def dppo_tv_loss(inputs: LossInputs, hyper):
    """DPPO with the total variation of the sampled token (2602.04879): a token gives no gradient once its probability
    has risen by more than `high` (A > 0), or fallen by more than `low` (A <= 0).

        outside = pi - pi_old > high for A > 0,   pi_old - pi > low for A <= 0

    hyper: low, high (probability), ratio_max, log_ratio_clamp.
    """
    tokens = guarded(inputs)
    moved = jnp.exp(tokens.logp) - jnp.exp(tokens.old_logp)
    outside = jnp.where(tokens.advantages > 0, moved > hyper["high"], moved < -hyper["low"])
    return _masked_gradient(tokens, outside, hyper)


def dppo_kl_loss(inputs: LossInputs, hyper):
    """DPPO with the KL divergence between "this token" and "any other" (2602.04879), in nats:

        D = q log(q / p) + (1 - q) log((1 - q) / (1 - p)),   q = pi_old, p = pi;   outside = D above the bound and
        p > q for A > 0 (bound high),   p < q for A <= 0 (bound low)

    hyper: low, high (nats), ratio_max, log_ratio_clamp. 1e-8 is added to both 1 - q and 1 - p, as released.
    """
    tokens = guarded(inputs)
    p, q = jnp.exp(tokens.logp), jnp.exp(tokens.old_logp)
    others = jnp.log(1e-8 - jnp.expm1(tokens.old_logp)) - jnp.log(1e-8 - jnp.expm1(tokens.logp))
    divergence = -q * tokens.log_ratio - jnp.expm1(tokens.old_logp) * others
    up = tokens.advantages > 0
    outside = jnp.where(up, (divergence > hyper["high"]) & (p > q), (divergence > hyper["low"]) & (p < q))
    return _masked_gradient(tokens, outside, hyper)


def vespo_loss(inputs: LossInputs, hyper):
    """VESPO (2602.10693): -sg[phi(W)] A log pi, with W = prod_t rho_t of the whole sequence and

        phi(W) = W^k exp(lambda (1 - W)),   k, lambda by the sign of A;   phi(1) = 1

    hyper: k_pos, lambda_pos (A >= 0), k_neg, lambda_neg, log_ratio_clamp (of each token). log W is held within
    [log 1e-8, 20] (TRL). Extra sum: phi.
    """
    tokens = guarded(inputs)
    bound = hyper["log_ratio_clamp"]
    total = sequence_sum(jnp.clip(tokens.log_ratio, -bound, bound) * tokens.mask, tokens.segment_ids)
    log_w = jnp.clip(total, jnp.log(1e-8), 20.0)
    positive = tokens.advantages >= 0
    k, slope = (jnp.where(positive, hyper[f"{name}_pos"], hyper[f"{name}_neg"]) for name in ("k", "lambda"))
    phi = jax.lax.stop_gradient(jnp.exp(k * log_w + slope * (1 - jnp.exp(log_w)))).astype(tokens.logp.dtype)
    return -phi * tokens.advantages * tokens.logp, token_stats(tokens, jnp.exp(log_w), phi=phi)


def dro_loss(inputs: LossInputs, hyper):
    """DRO (2405.19107, as in verl): -A log pi + beta / 2 (log pi - log pi_old)^2. hyper: beta, log_ratio_clamp (of the
    square, with zero gradient beyond)."""
    tokens = guarded(inputs)
    bound = hyper["log_ratio_clamp"]
    square = jnp.clip(tokens.log_ratio, -bound, bound) ** 2
    loss = -tokens.advantages * tokens.logp + 0.5 * hyper["beta"] * square
    return loss, token_stats(tokens, token_ratio(tokens, hyper))
