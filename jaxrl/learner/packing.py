"""Sequences of any length into a few static shapes: rows of packed segments, cut into micro-batches. NumPy only.

Length-aware selection keeps the shortest and the longest answers on purpose, so padding every row to the
longest would waste most of the update. Rows are filled first-fit-decreasing; attention stays inside a
segment (`segment_ids`), and each segment counts its own positions.

With `share_prompts`, the responses to one prompt stand behind one copy of it, a bundle, and cost it once:

    row      p p p p | p r r r | p r r | ...        p: prompt, r: response; the prompt's last token is repeated, because
    segment  1 1 1 1 | 2 2 2 2 | 3 3 3 | ...        from it each response's first token is predicted
    parent   0 0 0 0 | 1 1 1 1 | 1 1 1 | ...        a token sees its own segment and the parent's, causally

Shapes are [M, R, T]: M micro-batches (only the first `num_micro` hold anything and only those are computed), R rows
(one of two counts), T tokens. A shape is a compilation, so M does not depend on the lengths.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import numpy as np

from jaxrl.errors import UserError
from jaxrl.rollouts import Rollouts


@flax.struct.dataclass
class PackedBatch:
    """One mini-batch: what one optimizer step sees. Index t of every array describes token t of its row.

    tokens, positions (within the segment), segment_ids (1, 2, ... within a row; 0 = padding): int32 [M, R, T].
    response_mask, advantages, old_logprobs, sampler_logprobs, ref_logprobs, stale: float32 [M, R, T], 0 outside
    responses. response_mask: 1 at tokens that are trained on. old_logprobs and ref_logprobs are zeros until scored.
    stale: 1 at tokens that older parameters drew.
    num_micro: int32 [], micro-batches in use. num_tokens, num_sequences: float32 [], response tokens and responses
    of the mini-batch, the denominators of every aggregation.
    capacity: static; most response tokens that one micro-batch has on one batch shard, rounded up.
    parents: int32 [M, R, T], the id of one more segment that a token sees, 0 for none; None if prompts are not shared.
    least: float32 [M, R, T], what tells the set that a token was drawn from (jaxrl.rollout.sampling.kept_set); None if
    that is not replayed.
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
    parents: Any = None
    least: Any = None


@dataclasses.dataclass(frozen=True)
class PackSettings:
    """The sizes of a mini-batch.

    row_tokens: T, tokens of a row. micro_tokens: positions (padding included) of one micro-batch over all devices; at
    least one row a shard is used however small it is. shards: data x fsdp of the mesh; R is a multiple of it, and
    response tokens are dealt evenly. most_rows: how many rows the mini-batches of a run can fill
    (`jaxrl.batch.most_rows`): all of them get an M for that many; 0: M is the next power of two. share_prompts: the
    responses to one prompt stand behind one copy of it. replay: log-probs are those of the truncated distributions
    that the tokens were drawn from, by the rollouts' token columns "kept" and "least".
    """

    row_tokens: int
    micro_tokens: int
    shards: int = 1
    most_rows: int = 0
    share_prompts: bool = False
    replay: bool = False


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the responses went.

    shape: (M, R, T). index: int64 [total], the position of each response token among the M x R x T. offsets: int64
    [N + 1], of the responses in it. waste: share of the computed positions that hold padding. waste_to_longest: what it
    would be with one sequence per row, padded to the longest.
    """

    shape: tuple[int, int, int]
    index: np.ndarray
    offsets: np.ndarray
    waste: float
    waste_to_longest: float

    def spread(self, values, dtype=np.float32) -> np.ndarray:
        """[M, R, T] with values ([N], one a response, or [total], one a token) at the responses, 0 elsewhere."""
        values = np.asarray(values)
        if len(values) != len(self.index):
            values = np.repeat(values, np.diff(self.offsets))
        out = np.zeros(np.prod(self.shape), dtype)
        out[self.index] = values
        return out.reshape(self.shape)

    def collect(self, values) -> np.ndarray:
        """The inverse of `spread`: [total], the values of each response token, from an [M, R, T] array."""
        return np.asarray(values).reshape(-1)[self.index]


def pack(
    rollouts: Rollouts, advantages, settings: PackSettings, step: int | None = None
) -> tuple[PackedBatch, Packing]:
    """Pack the N responses of `rollouts`, each behind its prompt, into a mini-batch. Deterministic.

    advantages: [N], one a response, or [total], one a token. step: tokens drawn before this training step are stale;
    None: none is. Trained on (`response_mask`) are the tokens that the policy drew (`sampled`) of valid responses.
    Leave out responses that carry no gradient (ungraded ones): they would only cost time.

    Raises UserError: no response, an empty prompt or response, or a sequence longer than a row.
    """
    r = rollouts
    if not len(r):
        raise UserError("packing: the mini-batch holds no sequences")
    prompt_lengths = r.per_response([len(p.tokens) for p in r.prompts], np.int64)
    if min(prompt_lengths.min(), r.lengths.min()) == 0:
        empty = int(np.argmin(np.minimum(prompt_lengths, r.lengths)))
        raise UserError(f"packing: sequence {empty} has an empty prompt or response")
    lengths, T = prompt_lengths + r.lengths, int(settings.row_tokens)
    longest = int(lengths.max())
    if longest > T:
        raise UserError(f"config.batch.row_tokens: rows of {T} tokens cannot hold a sequence of {longest} (prompt "
                        f"{prompt_lengths[lengths.argmax()]}); use at least that")

    # ---- a row and a column for every bundle: a prompt and the responses behind it
    trained = r.sampled & r.per_token(r.valid)
    bundle, start, bundle_lengths = _bundles(r, prompt_lengths, T, settings.share_prompts)
    row_of_bundle, column = _first_fit_decreasing(bundle_lengths, T)
    R, num_micro = _row_count(int(row_of_bundle.max()) + 1, T, settings.micro_tokens, settings.shards)
    row_of, most = _deal(row_of_bundle[bundle], r.token_sum(trained), num_micro, R, settings.shards)
    M = max(num_micro, -(-settings.most_rows // R)) if settings.most_rows else 1 << (num_micro - 1).bit_length()

    # ---- the arrays
    tokens, positions, segments, parents = np.zeros((4, M * R, T), np.int32)
    first = column[bundle] + start  # where each response begins in its row
    for members in _left_to_right(bundle, row_of, first):
        i, row = members[0], row_of[members[0]]
        prompt, begin = r.prompts[r.group[i]].tokens, column[bundle[i]]
        segment = segments[row].max() + 1  # ids count up within a row
        shared = len(prompt) - 1 if len(members) > 1 else 0  # prompt tokens in a segment of their own
        tokens[row, begin : begin + shared] = prompt[:shared]
        positions[row, begin : begin + shared] = np.arange(shared)
        segments[row, begin : begin + shared] = segment
        for number, j in enumerate(members, int(shared > 0)):
            own = slice(first[j] - len(prompt) + shared, first[j] + r.lengths[j])
            tokens[row, own.start : first[j]] = prompt[shared:]
            positions[row, own] = np.arange(shared, len(prompt) + r.lengths[j])
            segments[row, own] = segment + number
            parents[row, own] = segment if shared else 0
    packing = Packing(
        shape=(M, R, T),
        index=np.repeat(row_of * T + first - r.offsets[:-1], r.lengths) + np.arange(len(r.tokens)),
        offsets=r.offsets,
        waste=1 - bundle_lengths.sum() / (num_micro * R * T),
        waste_to_longest=1 - lengths.mean() / longest,
    )
    zeros = np.zeros((M, R, T), np.float32)
    kept, least = (r.token_columns.get(name, np.zeros(len(r.tokens), np.float32)) for name in ("kept", "least"))
    batch = PackedBatch(
        tokens=tokens.reshape(M, R, T) + packing.spread(r.tokens, np.int32),
        positions=positions.reshape(M, R, T),
        segment_ids=segments.reshape(M, R, T),
        response_mask=packing.spread(trained),
        advantages=packing.spread(advantages),
        old_logprobs=zeros,
        sampler_logprobs=packing.spread(r.logprobs - kept if settings.replay else r.logprobs),
        ref_logprobs=zeros,
        stale=zeros if step is None else packing.spread(r.version < step),
        num_micro=np.int32(num_micro),
        num_tokens=np.float32(trained.sum()),
        num_sequences=np.float32((r.token_sum(trained) > 0).sum()),
        capacity=capacity_bucket(most, R // settings.shards * T),
        parents=parents.reshape(M, R, T) if settings.share_prompts else None,
        least=packing.spread(least) if settings.replay else None,
    )
    return batch, packing


def capacity_bucket(tokens: int, positions: int) -> int:
    """tokens rounded up to a quarter of the positions, so that few capacities occur; at most all positions."""
    step = -(-positions // 4)
    return int(min(positions, max(step, -(-tokens // step) * step)))


def _bundles(r: Rollouts, prompt_lengths, T: int, share: bool):
    """(bundle of each response, columns from its start to the response's first token, tokens of each bundle).

    A bundle is a prompt with one response, or, if shared, with as many of its responses as a row of T tokens holds;
    each further response brings the prompt's last token along.
    """
    if not share:
        return np.arange(len(r)), prompt_lengths, prompt_lengths + r.lengths
    bundle, start, sizes, latest = np.zeros(len(r), np.int64), prompt_lengths.copy(), [], {}
    for i, (group, length) in enumerate(zip(r.group.tolist(), r.lengths.tolist(), strict=True)):
        number = latest.get(group)
        if number is None or sizes[number] + 1 + length > T:
            number = latest[group] = len(sizes)
            sizes.append(int(prompt_lengths[i]) + length)
        else:
            start[i] = sizes[number] + 1
            sizes[number] += 1 + length
        bundle[i] = number
    return bundle, start, np.array(sizes, np.int64)


def _left_to_right(bundle, row_of, first) -> list[np.ndarray]:
    """The responses of each bundle, bundles by row and from left to right."""
    order = np.lexsort((first, row_of))
    return np.split(order, np.flatnonzero(np.diff(bundle[order])) + 1)


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
    """Deals the rows to num_micro x shards bins, so that each gets about the same number of response tokens: sorted by
    them, the rows go to the bins from the first to the last, then back, and so on.

    Returns (new row of each sequence, the largest number of response tokens in one bin).
    """
    load = np.bincount(row_of, weights=response_lengths)  # response tokens of each row
    fullest_first = np.argsort(-load, kind="stable")
    bins, rows_per_bin = num_micro * shards, R // shards
    turn, place = np.divmod(np.arange(len(load)), bins)
    bin_of = np.where(turn % 2 == 0, place, bins - 1 - place)
    new_row = np.empty(len(load), np.int64)
    new_row[fullest_first] = bin_of * rows_per_bin + turn
    return new_row[row_of], int(np.bincount(bin_of, weights=load[fullest_first]).max())
