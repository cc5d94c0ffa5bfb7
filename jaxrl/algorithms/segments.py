"""Reductions over the sequences of a packed batch [R, T] (see inputs.py).

Each row is reduced on its own, so these work on rows sharded over devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
