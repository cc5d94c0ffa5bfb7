"""Losses that look at each token's share in the covariance of advantage and log-probability: Clip-Cov, KL-Cov.

    cov_t = (A_t - mean A) (log pi_t - mean log pi)         means over all response tokens of the mini-batch

Entropy falls by this covariance (2505.22617), so a few tokens with a large covariance are left out of the gradient
(Clip-Cov), or held near their old log-probability (KL-Cov). `prepare` computes the means and chooses the tokens for the
whole mini-batch, so that the result does not depend on micro-batches, packing or devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.algorithms.inputs import LossInputs, guarded, token_ratio, token_stats

_MEANS = ("advantage_mean", "logp_mean")


def _means(tokens: LossInputs) -> dict:
    count = jnp.maximum(jnp.sum(tokens.mask), 1)
    return dict(zip(_MEANS, (jnp.sum(x) / count for x in (tokens.advantages, tokens.logp)), strict=True))


def _covariance(tokens: LossInputs, hyper):
    advantage, logp = (hyper[name] for name in _MEANS)
    return (tokens.advantages - advantage) * (jax.lax.stop_gradient(tokens.logp) - logp)


def _how_many(tokens: LossInputs, hyper):
    """How many tokens the share `ratio` of the mini-batch is: at least one, but 0 for a ratio of 0."""
    return jnp.where(hyper["ratio"] > 0, jnp.maximum(jnp.floor(hyper["ratio"] * jnp.sum(tokens.mask) + 1e-4), 1), 0)


# --- Clip-Cov -------------------------------------------------------------------------------------------------------


def clip_cov_loss(inputs: LossInputs, hyper):
    """Clip-Cov (2505.22617 eq. 10, 11): PPO's clip; in addition, a few tokens get no gradient, chosen at random among
    the unclipped tokens with a covariance within (cov_low, cov_high).

    hyper: clip_low, clip_high, ratio (share of all tokens that is left out), cov_low, cov_high, log_ratio_clamp, and
    what `clip_cov_choice` found. Extra sum: left_out.
    """
    tokens = guarded(inputs)
    ratio, plain, clipped = _surrogates(tokens, hyper)
    out = _eligible(tokens, plain, clipped, hyper) & (_lot(tokens) < hyper["share"])
    adv = tokens.advantages
    low, high = (adv < 0) & (ratio < 1 - hyper["clip_low"]), (adv > 0) & (ratio > 1 + hyper["clip_high"])
    loss = jnp.where(out, 0, jnp.where(clipped > plain, clipped, plain))
    return loss, token_stats(tokens, ratio, low, high, left_out=out)


def clip_cov_choice(inputs: LossInputs, hyper) -> dict:
    """The means of the mini-batch, and the probability with which a token in the band is left out."""
    tokens = guarded(inputs)
    hyper = {**hyper, **_means(tokens)}
    _, plain, clipped = _surrogates(tokens, hyper)
    eligible = jnp.sum(_eligible(tokens, plain, clipped, hyper))
    return {**hyper, "share": _how_many(tokens, hyper) / jnp.maximum(eligible, 1)}


def _surrogates(tokens: LossInputs, hyper):
    ratio = token_ratio(tokens, hyper)
    clipped = jnp.clip(ratio, 1 - hyper["clip_low"], 1 + hyper["clip_high"])
    return ratio, -ratio * tokens.advantages, -clipped * tokens.advantages


def _eligible(tokens: LossInputs, plain, clipped, hyper):
    cov = _covariance(tokens, hyper)
    return (tokens.mask > 0) & ~(clipped > plain) & (cov > hyper["cov_low"]) & (cov < hyper["cov_high"])


def _lot(tokens: LossInputs):
    """A number in [0, 1) drawn for each token by hashing its old log-prob and advantage: the same however the
    mini-batch is packed, cut and spread over devices."""
    fixed = (jnp.round(jnp.clip(x, -2e5, 2e5) * 4096).astype(jnp.int32) for x in (tokens.old_logp, tokens.advantages))
    a, b = (x.astype(jnp.uint32) for x in fixed)
    h = a * jnp.uint32(2654435761) + b
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the end of MurmurHash3
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return ((h ^ (h >> 16)) >> 8).astype(jnp.float32) / 2**24


# --- KL-Cov ---------------------------------------------------------------------------------------------------------


def kl_cov_loss(inputs: LossInputs, hyper):
    """KL-Cov (2505.22617 eq. 13): -rho A, plus kl_coef |log pi - log pi_old| on the tokens of the largest covariance.

    hyper: ratio (their share of all tokens), kl_coef, log_ratio_clamp, and what `kl_cov_choice` found. Extra sum: held.
    """
    tokens = guarded(inputs)
    ratio = token_ratio(tokens, hyper)
    held = (tokens.mask > 0) & (_covariance(tokens, hyper) >= hyper["least"])
    moved = jnp.clip(tokens.log_ratio, -hyper["log_ratio_clamp"], hyper["log_ratio_clamp"])
    distance = moved * jax.lax.stop_gradient(jnp.sign(moved))  # |x| with slope 0 at 0
    return -ratio * tokens.advantages + jnp.where(held, hyper["kl_coef"] * distance, 0), token_stats(
        tokens, ratio, held=held)


def kl_cov_choice(inputs: LossInputs, hyper) -> dict:
    """The means of the mini-batch, and the smallest covariance in the share `ratio` of tokens that have the largest."""
    tokens = guarded(inputs)
    hyper = {**hyper, **_means(tokens)}
    ranked = jnp.sort(jnp.where(tokens.mask > 0, _covariance(tokens, hyper), -jnp.inf).ravel())
    count = _how_many(tokens, hyper).astype(jnp.int32)
    return {**hyper, "least": jnp.where(count > 0, ranked[ranked.size - count], jnp.inf)}
