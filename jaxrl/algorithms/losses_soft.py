"""Losses without a hard clip of the objective: CISPO, SAPO, GPG."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.algorithms.inputs import LossInputs, guarded, token_ratio, token_stats


def cispo_loss(inputs: LossInputs, hyper):
    """CISPO (2506.13585 eq. 4-5): -sg(clip(rho, 1 - low, 1 + high)) A log pi. No token loses its gradient.

    hyper: clip_low, clip_high, log_ratio_clamp, and cap: if above 0 the weight is min(rho, cap)
    instead (ScaleRL 2510.13786 and TRL: 5.0). clip_low, clip_high count the tokens whose weight is changed.
    """
    tokens = guarded(inputs)
    ratio = token_ratio(tokens, hyper)
    capped = jnp.asarray(hyper["cap"]) > 0
    low = jnp.where(capped, 0.0, 1 - hyper["clip_low"]).astype(ratio.dtype)
    high = jnp.where(capped, hyper["cap"], 1 + hyper["clip_high"]).astype(ratio.dtype)
    weight = jax.lax.stop_gradient(jnp.clip(ratio, low, high))
    return -weight * tokens.advantages * tokens.logp, token_stats(tokens, ratio, ratio < low, ratio > high)


def sapo_loss(inputs: LossInputs, hyper):
    """SAPO (2511.20347): -A f(rho), f = sigmoid(tau (rho - 1)) 4 / tau, tau by the sign of A.

    hyper: tau_pos (A > 0), tau_neg (A <= 0), log_ratio_clamp. Extra sum gate: 4 p (1 -
    p) with p = sigmoid(tau (rho - 1)), the factor by which the gradient of rho A is damped.
    """
    tokens = guarded(inputs)
    ratio = token_ratio(tokens, hyper)
    tau = jnp.where(tokens.advantages > 0, hyper["tau_pos"], hyper["tau_neg"]).astype(ratio.dtype)
    p = jax.nn.sigmoid(tau * (ratio - 1))
    return -tokens.advantages * p * 4 / tau, token_stats(tokens, ratio, gate=4 * p * (1 - p))


def gpg_loss(inputs: LossInputs, hyper):
    """GPG (2504.02546): -A log pi, the plain policy gradient; pair it with the gpg advantage."""
    tokens = guarded(inputs)
    return -tokens.advantages * tokens.logp, token_stats(tokens, token_ratio(tokens, hyper))
