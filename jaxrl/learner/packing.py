"""Sequences of any length into a few static shapes: rows of packed segments, cut into micro-batches. NumPy only.

Length-aware selection keeps the shortest and the longest answers on purpose, so padding every row to the
longest would waste most of the update. Rows are filled first-fit-decreasing; attention stays inside a
segment (`segment_ids`), and each segment counts its own positions.

Shapes are [M, R, T]: M micro-batches (only the first `num_micro` hold anything and only those are computed), R rows
(one of two counts), T tokens (one of `row_lengths`). A shape is a compilation, so M does not depend on the lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import numpy as np

from jaxrl.errors import UserError


@flax.struct.dataclass
class PackedBatch:
    """One mini-batch: what one optimizer step sees. Index t of every array describes token t of its row.

    tokens, positions (within the segment), segment_ids (1, 2, ... within a row; 0 = padding): int32 [M, R, T].
    response_mask, advantages, old_logprobs, sampler_logprobs, ref_logprobs, stale: float32 [M, R, T], 0 outside
    responses. old_logprobs and ref_logprobs are zeros until scored. stale: 1 at tokens that older parameters drew.
    num_micro: int32 [], micro-batches in use. num_tokens, num_sequences: float32 [], response tokens and responses
    of the mini-batch, the denominators of every aggregation.
    capacity: static; most response tokens that one micro-batch has on one batch shard, rounded up.
    """

    tokens: Any
    positions: Any
    segment_ids: Any
    response_mask: Any
    advantages: Any
    old_logprobs: Any
    sampler_logprobs: Any
    ref_logprobs: Any
    stale: Any
    num_micro: Any
    num_tokens: Any
    num_sequences: Any
    capacity: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the sequences went.

    shape: (M, R, T). rows: int64 [N], index of each sequence's row among the M x R. starts: int64 [N], column of
    its first response token. lengths: int64 [N], response tokens. waste: share of the computed positions that hold
    padding. waste_to_longest: what it would be with one sequence per row, padded to the longest.
    """

    shape: tuple[int, int, int]
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    waste: float
    waste_to_longest: float

    def spread(self, values: Sequence, dtype=np.float32) -> np.ndarray:
        """[M, R, T] with values[i] (a number, or one per token of response i) at response i, 0 elsewhere."""
        M, R, T = self.shape
        out = np.zeros((M * R, T), dtype)
        for value, row, start, n in zip(values, self.rows, self.starts, self.lengths, strict=True):
            out[row, start : start + n] = value
        return out.reshape(self.shape)

    def collect(self, values) -> list[np.ndarray]:
        """The inverse of `spread`: per-token values of each response, from an [M, R, T] array."""
        flat = np.asarray(values).reshape(-1, self.shape[2])
        spans = zip(self.rows, self.starts, self.lengths, strict=True)
        return [flat[row, start : start + n] for row, start, n in spans]


def pack(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    advantages: Sequence,
    sampler_logprobs: Sequence[np.ndarray],
    row_lengths: Sequence[int],
    micro_tokens: int,
    shards: int = 1,
    stale: Sequence[int] | None = None,
    most_rows: int = 0,
) -> tuple[PackedBatch, Packing]:
    """Pack N sequences into a mini-batch. Deterministic.

    Args:
      prompts, responses: N integer arrays each, none empty. Leave out what carries no gradient (ungraded
        completions, filtered overlong ones): it would only cost time.
      advantages: N numbers, or arrays with one per response token. sampler_logprobs: N float arrays.
      row_lengths: allowed T; the smallest that holds the longest sequence is taken.
      micro_tokens: positions (padding included) of one micro-batch over all devices; at least one row per
        shard is used however small it is.
      stale: of each response, how many tokens from the first on older parameters drew; default none.
      shards: data x fsdp of the mesh; R is a multiple of it, and response tokens are dealt evenly.
      most_rows: how many rows the mini-batches of a run can fill (see `most_rows` in jaxrl.batch); all of them get
        an M for that many. Default: M is the next power of two.

    Raises:
      UserError: no sequences, an empty prompt or response, or a sequence longer than every row.
    """
    plen, rlen = (np.array([len(x) for x in xs], np.int64) for xs in (prompts, responses))
    if not len(rlen):
        raise UserError("packing: the mini-batch holds no sequences")
    if min(plen.min(), rlen.min()) == 0:
        raise UserError(f"packing: sequence {int(np.argmin(np.minimum(plen, rlen)))} has an empty prompt or response")
    lengths = plen + rlen
    longest = int(lengths.max())
    if longest > max(row_lengths):
        raise UserError(f"config.batch.row_tokens: rows of {max(row_lengths)} tokens cannot hold a sequence of "
                        f"{longest} (prompt {plen[lengths.argmax()]}); use at least that")
    T = int(min(t for t in row_lengths if t >= longest))
    row_of, column = _first_fit_decreasing(lengths, T)
    R, num_micro = _row_count(int(row_of.max()) + 1, T, micro_tokens, shards)
    row_of, most = _deal(row_of, rlen, num_micro, R, shards)
    M = max(num_micro, -(-most_rows // R)) if most_rows else 1 << (num_micro - 1).bit_length()
    tokens, positions, segments = np.zeros((3, M * R, T), np.int32)
    for i in np.lexsort((column, row_of)):  # left to right, so that segment ids count up within a row
        row, start = row_of[i], column[i]
        middle, end = start + plen[i], start + lengths[i]
        tokens[row, start:middle], tokens[row, middle:end] = prompts[i], responses[i]
        positions[row, start:end] = np.arange(end - start)
        segments[row, start:end] = segments[row].max() + 1
    packing = Packing(
        shape=(M, R, T),
        rows=row_of,
        starts=column + plen,
        lengths=rlen,
        waste=1 - lengths.sum() / (num_micro * R * T),
        waste_to_longest=1 - lengths.mean() / longest,
    )
    zeros = np.zeros((M, R, T), np.float32)
    batch = PackedBatch(
        tokens=tokens.reshape(M, R, T),
        positions=positions.reshape(M, R, T),
        segment_ids=segments.reshape(M, R, T),
        response_mask=packing.spread(np.ones(len(rlen))),
        advantages=packing.spread(advantages),
        old_logprobs=zeros,
        sampler_logprobs=packing.spread(sampler_logprobs),
        ref_logprobs=zeros,
        stale=zeros if stale is None else packing.spread([np.arange(n) < s for n, s in zip(rlen, stale, strict=True)]),
        num_micro=np.int32(num_micro),
        num_tokens=np.float32(rlen.sum()),
        num_sequences=np.float32(len(rlen)),
        capacity=capacity_bucket(most, R // shards * T),
    )
    return batch, packing


def capacity_bucket(tokens: int, positions: int) -> int:
    """tokens rounded up to a quarter of the positions, so that few capacities occur; at most all positions."""
    step = -(-positions // 4)
    return int(min(positions, max(step, -(-tokens // step) * step)))


def _first_fit_decreasing(lengths, T: int):
    """(row of each sequence, its first column): longest first, each into the first row with room."""
    room = np.full(len(lengths), T, np.int64)
    rows, columns = np.zeros_like(lengths), np.zeros_like(lengths)
    for i in np.argsort(-lengths, kind="stable"):
        row = int(np.argmax(room >= lengths[i]))
        rows[i], columns[i] = row, T - room[row]
        room[row] -= lengths[i]
    return rows, columns


def _row_count(rows: int, T: int, micro_tokens: int, shards: int) -> tuple[int, int]:
    """(R, micro-batches in use): the budget's row count where at least four of them are filled to the last percent,
    else its quarter. Not what is best for each batch: that would be many shapes."""
    most = max(1, micro_tokens // (T * shards))
    R, quarter = most * shards, max(1, most // 4) * shards
    if rows < 4 * R or -(-rows // R) * R > 1.01 * -(-rows // quarter) * quarter:
        R = quarter
    return R, -(-rows // R)


def _deal(row_of, response_lengths, num_micro: int, R: int, shards: int):
    """Deals rows back and forth over micro-batches and shards, most response tokens first, so that each gets
    about the same number: (new row of each sequence, largest number of response tokens in one of them)."""
    load = np.bincount(row_of, weights=response_lengths, minlength=row_of.max() + 1)
    order, bins, per_bin = np.argsort(-load, kind="stable"), num_micro * shards, R // shards
    turn, place = np.divmod(np.arange(len(order)), bins)
    to_bin = np.where(turn % 2 == 0, place, bins - 1 - place)
    new = np.empty(len(order), np.int64)
    new[order] = to_bin * per_bin + turn
    return new[row_of], int(np.bincount(to_bin, weights=load[order]).max())
