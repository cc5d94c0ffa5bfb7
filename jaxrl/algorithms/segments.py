"""Reductions over the sequences of a packed batch, and the guards that every loss starts with.

A batch is [R, T] (rows, positions). A row may hold several sequences one after another; `sequence_ids` tells them apart
as contiguous runs of equal integers, and `response_mask` picks the response tokens. Padding is just a run without
response tokens. Each row is reduced on its own, so these work on rows sharded over devices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# A sampled token never has log-probability -inf in exact arithmetic; in bfloat16 or after masking it can.
# Anything below this floor is treated as the floor, so that differences of log-probabilities stay finite.
LOGP_FLOOR = -1e5


def compute_dtype(x: jax.Array) -> jnp.dtype:
    """float64 for float64 input, else float32: the dtype that losses are computed in."""
    return jnp.float64 if jnp.asarray(x).dtype == jnp.float64 else jnp.float32


def run_index(sequence_ids: jax.Array) -> jax.Array:
    """Number the runs of each row: int [R, T] of any integers -> int32 [R, T] counting 0, 1, 2, ... from the left."""
    starts = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _run_totals(x: jax.Array, index: jax.Array) -> jax.Array:
    """[R, T] values and run numbers -> [R, T] totals, entry [r, k] for run k of row r (0 where there is no run k)."""
    length = x.shape[1]

    def total(row, ids):
        return jax.ops.segment_sum(row, ids, num_segments=length, indices_are_sorted=True)

    return jax.vmap(total)(x, index)


def sequence_sum(x: jax.Array, sequence_ids: jax.Array) -> jax.Array:
    """Sum x over each sequence and write the total at each of its positions. float [R, T] -> float [R, T]."""
    index = run_index(sequence_ids)
    return jnp.take_along_axis(_run_totals(x, index), index, axis=1)


def sequence_mean(x: jax.Array, mask: jax.Array, sequence_ids: jax.Array) -> jax.Array:
    """Mean of x over the tokens with mask 1 of each sequence, at each of its positions; 0 for empty sequences."""
    return sequence_sum(x * mask, sequence_ids) / jnp.maximum(sequence_sum(mask, sequence_ids), 1)


def count_sequences(response_mask: jax.Array, sequence_ids: jax.Array) -> jax.Array:
    """Number of sequences with at least one response token, int32 scalar.

    Fully masked sequences are not counted, as in verl; for TRL's convention (every row counts) pass your own
    number to `aggregate`.
    """
    totals = _run_totals((response_mask != 0).astype(jnp.int32), run_index(sequence_ids))
    return jnp.sum(totals > 0, dtype=jnp.int32)


class Tokens(NamedTuple):
    """Cleaned loss inputs, all [R, T] in the compute dtype; neutral (0) where the mask is 0."""

    logp: jax.Array
    old_logp: jax.Array  # no gradient
    advantages: jax.Array  # no gradient
    mask: jax.Array
    log_ratio: jax.Array  # logp - old_logp, not clamped


def clean(logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, response_mask: jax.Array) -> Tokens:
    """Cast to the compute dtype, neutralise masked positions (whatever they hold) and floor -inf log-probabilities.

    The masking happens before any arithmetic, so that neither values nor gradients of a masked position can
    reach the loss; flooring keeps -inf - -inf from becoming NaN. NaN at an unmasked position stays NaN:
    that is a bug upstream and must be seen.
    """
    dtype = compute_dtype(logp)
    valid = response_mask != 0

    def fix(x):
        return jnp.where(valid, x.astype(dtype), 0)

    logp = jnp.maximum(fix(logp), LOGP_FLOOR)
    old_logp = jax.lax.stop_gradient(jnp.maximum(fix(old_logp), LOGP_FLOOR))
    advantages = jax.lax.stop_gradient(fix(advantages))
    return Tokens(logp, old_logp, advantages, valid.astype(dtype), logp - old_logp)


def token_ratio(tokens: Tokens, hyper: dict) -> jax.Array:
    """rho = pi / pi_old [R, T], its logarithm clamped to +-hyper["log_ratio_clamp"] (verl: 20) against overflow."""
    return jnp.exp(jnp.clip(tokens.log_ratio, -hyper["log_ratio_clamp"], hyper["log_ratio_clamp"]))


def token_stats(tokens: Tokens, ratio: jax.Array, clip_low=None, clip_high=None, **more) -> dict[str, jax.Array]:
    """The statistics every loss reports, as SUMS over response tokens (divide by the token count for means).

    ratio: sum of the ratio the loss used (sequence-level losses: the sequence ratio at each token).
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
