"""From per-token losses to one number. All denominators are global counts.

A micro-batch contributes its sum divided by the counts of the whole mini-batch. The contributions of micro-batches (and
of devices) therefore add up to the same value and gradient, however the mini-batch is split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.algorithms.inputs import compute_dtype
from jaxrl.algorithms.segments import sequence_sum

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def aggregate(
    loss: jax.Array,
    response_mask: jax.Array,
    sequence_ids: jax.Array,
    mode: str,
    num_tokens: jax.Array | float,
    num_sequences: jax.Array | float,
    norm_length: float = 1.0,
) -> jax.Array:
    """Reduce a per-token loss [R, T] to a scalar that sums over micro-batches to the global value.

    token-mean               sum m l / num_tokens                        (DAPO, 2503.14476 eq. 8)
    seq-mean-token-mean      sum_i [sum_t m l / |o_i|] / num_sequences    (GRPO, 2402.03300 eq. 3)
    seq-mean-token-sum       sum m l / num_sequences
    seq-mean-token-sum-norm  sum m l / (num_sequences * norm_length)      (Dr. GRPO, 2503.20783)

    num_tokens, num_sequences: counts over the whole mini-batch (`count_sequences` leaves fully masked sequences out;
    pass the number of rows to count them as TRL does). norm_length: L_const in tokens, usually the response limit.
    Masked positions may hold anything, NaN included. Empty batches give 0. Raises ValueError for an unknown mode.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {mode!r}; valid: {', '.join(AGGREGATIONS)}")
    dtype = compute_dtype(loss)
    valid = response_mask != 0
    loss = jnp.where(valid, loss.astype(dtype), 0)
    if mode == "seq-mean-token-mean":
        loss = loss / jnp.maximum(sequence_sum(valid.astype(dtype), sequence_ids), 1)
    count = num_tokens if mode == "token-mean" else num_sequences
    total = jnp.sum(loss) / jnp.maximum(jnp.asarray(count, dtype), 1)
    return total / norm_length if mode == "seq-mean-token-sum-norm" else total
