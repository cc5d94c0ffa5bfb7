"""What a loss sees: one record of arrays, the guards that every loss starts with, and the statistics it reports.

A batch is [R, T] (rows, positions). A row may hold several sequences one after another; `segment_ids` tells them apart
as contiguous runs of equal integers, and `mask` picks the response tokens. Padding is a run without response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# A sampled token never has log-probability -inf in exact arithmetic; in bfloat16 or after masking it can.
# Anything below this floor is treated as the floor, so that differences of log-probabilities stay finite.
LOGP_FLOOR = -1e5


class LossInputs(NamedTuple):
    """All [R, T]; log-probabilities and entropy in nats, of the tempered distribution (with sampling.replay,
    log-probabilities are those of what top-k, top-p and min-p left of it).

    logp: of each token under the policy that is trained, with gradient. old_logp: under the policy at the beginning of
    the step (for tokens that older parameters drew: under those). advantages: one number per token. mask: 1 at response
    tokens. segment_ids: contiguous runs. sampler_logp: as the sampler recorded it. entropy: of the whole distribution
    at that position, with gradient. ref_logp: under the reference model. Arrays that were not computed are
    None: a loss declares that it needs `ref_logp` (see losses.Loss), all others are always there in training.
    """

    logp: jax.Array
    old_logp: jax.Array
    advantages: jax.Array
    mask: jax.Array
    segment_ids: jax.Array
    sampler_logp: jax.Array | None = None
    entropy: jax.Array | None = None
    ref_logp: jax.Array | None = None

    @property
    def log_ratio(self) -> jax.Array:
        """log pi / pi_old, not clamped."""
        return self.logp - self.old_logp


def compute_dtype(x: jax.Array) -> jnp.dtype:
    """float64 for float64 input, else float32: the dtype that losses are computed in."""
    return jnp.float64 if jnp.asarray(x).dtype == jnp.float64 else jnp.float32


def guarded(inputs: LossInputs) -> LossInputs:
    """The inputs in the compute dtype, neutral (0) where the mask is 0, with -inf log-probabilities floored. Only logp
    and entropy keep their gradient.

    The masking happens before any arithmetic, so that neither values nor gradients of a masked position can
    reach the loss; flooring keeps -inf - -inf from becoming NaN. NaN at an unmasked position stays NaN:
    that is a bug upstream and must be seen.
    """
    dtype, valid = compute_dtype(inputs.logp), inputs.mask != 0

    def fix(x):
        return None if x is None else jnp.where(valid, x.astype(dtype), 0)

    def floored(x):
        return None if x is None else jnp.maximum(fix(x), LOGP_FLOOR)

    constant = jax.lax.stop_gradient
    return inputs._replace(
        logp=floored(inputs.logp),
        old_logp=constant(floored(inputs.old_logp)),
        advantages=constant(fix(inputs.advantages)),
        mask=valid.astype(dtype),
        sampler_logp=constant(floored(inputs.sampler_logp)),
        entropy=fix(inputs.entropy),
        ref_logp=constant(floored(inputs.ref_logp)),
    )


def token_ratio(tokens: LossInputs, hyper: dict) -> jax.Array:
    """rho = pi / pi_old [R, T], its logarithm clamped to +-hyper["log_ratio_clamp"] (verl: 20) against overflow."""
    return jnp.exp(jnp.clip(tokens.log_ratio, -hyper["log_ratio_clamp"], hyper["log_ratio_clamp"]))


def token_stats(tokens: LossInputs, ratio: jax.Array, clip_low=None, clip_high=None, **more) -> dict[str, jax.Array]:
    """The statistics every loss reports, as SUMS over response tokens (divide by the token count for means).

    tokens: from `guarded`. ratio: the ratio the loss used (sequence-level losses: the sequence ratio at each token).
    old_kl: sum of the k3 estimate of KL(old || new), never negative.
    clip_low, clip_high: tokens whose gradient is cut at the lower or upper bound. more: loss-specific sums.
    """
    log_ratio = jnp.clip(tokens.log_ratio, -20.0, 20.0)
    zero = jnp.zeros_like(tokens.mask)
    sums = {
        "ratio": ratio,
        "old_kl": jnp.maximum(jnp.expm1(log_ratio) - log_ratio, 0),
        "clip_low": zero if clip_low is None else clip_low,
        "clip_high": zero if clip_high is None else clip_high,
        **more,
    }
    return {k: jax.lax.stop_gradient(jnp.sum(v * tokens.mask)) for k, v in sums.items()}
