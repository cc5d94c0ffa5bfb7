"""Packs sequences of any length into a few static shapes: rows of segments, split into micro-batches. NumPy only.

Length-aware selection keeps the shortest and the longest answers on purpose, so padding every row to the
longest would waste most of the update. Rows are filled first-fit-decreasing; attention stays inside a
segment (`segment_ids`), and each segment counts its own positions.

With `share_prompts`, the responses to one prompt stand behind one copy of it, which is computed once (a bundle):

    row      p p p p | p r r r | p r r | ...        p: prompt, r: response; the prompt's last token is repeated, because
    segment  1 1 1 1 | 2 2 2 2 | 3 3 3 | ...        from it each response's first token is predicted
    parent   0 0 0 0 | 1 1 1 1 | 1 1 1 | ...        a token sees its own segment and the parent's, causally

Shapes are [M, R, T]: M micro-batches (only the first `num_micro` hold anything and only those are computed), R rows
(one of two counts), T tokens. Every shape is compiled, so M does not depend on the lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
    least: float32 [M, R, T], the probability that defines the set from which a token was drawn
    (jaxrl.rollout.sampling.kept_set); None without replay. experts: unsigned [M, R, T, L, k], the experts that the
    sampler chose for a token in L layers, counted from 1, zeros where it recorded none; None without router replay.
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
    experts: Any = None


@dataclasses.dataclass(frozen=True)
class PackSettings:
    """The sizes of a mini-batch.

    row_tokens: T, tokens of a row. micro_tokens: positions (padding included) of one micro-batch over all devices;
    every shard gets at least one row, however small this is. shards: data x fsdp x expert of the mesh; R is a multiple
    of it, and response tokens are spread evenly over shards. most_rows: the most rows that a mini-batch of the run can
    fill (`jaxrl.batch.most_rows`); M is large enough for them; 0: M is the next power of two. share_prompts: the
    responses to one prompt stand behind one copy of it. replay: log-probs are those of the truncated distributions
    that the tokens were drawn from (token columns "kept" and "least" of the rollouts). experts: the learner uses the
    sampler's experts (token column "experts").
    """

    row_tokens: int
    micro_tokens: int
    shards: int = 1
    most_rows: int = 0
    share_prompts: bool = False
    replay: bool = False
    experts: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The input of `plan`, numbers per response: every host has all of them, whichever host holds the tokens.

    group: equal for the responses to one prompt. prompt, response: lengths. trained: response tokens that are trained
    on. All int64 [N].
    """

    group: np.ndarray
    prompt: np.ndarray
    response: np.ndarray
    trained: np.ndarray

    def take(self, index) -> Sizes:
        """The sizes of the responses `index`."""
        return Sizes(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


def sizes(rollouts: Rollouts) -> Sizes:
    """The sizes of rollouts. Trained on are the tokens of valid responses that the policy drew (`sampled`)."""
    r = rollouts
    prompt = r.per_response([len(p.tokens) for p in r.prompts], np.int64)
    return Sizes(r.group, prompt, r.lengths, r.token_count(r.sampled) * r.valid)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the responses of a mini-batch go: those in this host's own rows (on one host: all).

    shape: (M, R, T), R the own rows of a micro-batch. responses: int64 [n], the responses in the own rows, ascending.
    first, segment, shared, parent: int64 [n], for each of them: where it begins among the M x R x T tokens, the id of
    its segment, how many tokens of its prompt stand before it in a segment of their own, and the id of that segment
    (0: none). index: int64 [total], the position of each token of these responses. offsets: int64 [n + 1], where each
    response begins in `index`.

    Of the whole mini-batch: num_micro, num_tokens, num_sequences, capacity (see PackedBatch). tokens: of prompts and
    responses. context: how many tokens one of them attends to, on average. waste: share of the computed positions that
    hold padding. waste_to_longest: that share with one sequence per row, padded to the longest.
    """

    shape: tuple[int, int, int]
    responses: np.ndarray
    first: np.ndarray
    segment: np.ndarray
    shared: np.ndarray
    parent: np.ndarray
    index: np.ndarray
    offsets: np.ndarray
    num_micro: int
    num_tokens: int
    num_sequences: int
    capacity: int
    tokens: int
    context: float
    waste: float
    waste_to_longest: float

    def spread(self, values, dtype=np.float32, before: int = 0) -> np.ndarray:
        """[M, R, T, ...] with values ([n], one per response, or [total, ...], one per token) at the response tokens, or
        `before` positions earlier; 0 elsewhere."""
        values = np.asarray(values)
        if len(values) != len(self.index):
            values = np.repeat(values, np.diff(self.offsets))
        out = np.zeros((np.prod(self.shape), *values.shape[1:]), dtype)
        out[self.index - before] = values
        return out.reshape(*self.shape, *values.shape[1:])

    def collect(self, values) -> np.ndarray:
        """The inverse of `spread`: [total], the values of each response token, from an [M, R, T] array."""
        return np.asarray(values).reshape(-1)[self.index]


def pack(
    rollouts: Rollouts, advantages, settings: PackSettings, step: int | None = None
) -> tuple[PackedBatch, Packing]:
    """Pack the N responses of `rollouts`, each behind its prompt, into a mini-batch: `plan` and `fill` for all rows.

    Leave out responses that carry no gradient (ungraded ones): they would only cost time.
    """
    packing = plan(sizes(rollouts), settings)
    return fill(packing, rollouts, advantages, settings, step), packing


def plan(of: Sizes, settings: PackSettings, own: Sequence[int] | None = None) -> Packing:
    """Assigns a row and a column to every response. Deterministic and a function of sizes alone, so all hosts agree.

    own: the batch shards (0 to settings.shards - 1, ascending) whose rows this host holds; None: all.
    Raises UserError: no response, an empty prompt or response, or a sequence longer than a row.
    """
    if not len(of.group):
        raise UserError("packing: the mini-batch holds no sequences")
    if min(of.prompt.min(), of.response.min()) == 0:
        empty = int(np.argmin(np.minimum(of.prompt, of.response)))
        raise UserError(f"packing: sequence {empty} has an empty prompt or response")
    lengths, T = of.prompt + of.response, int(settings.row_tokens)
    longest = int(lengths.max())
    if longest > T:
        raise UserError(f"config.batch.row_tokens: rows of {T} tokens cannot hold a sequence of {longest} (prompt "
                        f"{of.prompt[lengths.argmax()]}); use at least that")

    # ---- a row and a column for every bundle: a prompt and the responses behind it
    bundle, start, bundle_lengths = _bundles(of, T, settings.share_prompts)
    row_of_bundle, column = _first_fit_decreasing(bundle_lengths, T)
    R, num_micro = _row_count(int(row_of_bundle.max()) + 1, T, settings.micro_tokens, settings.shards)
    bin_of, turn, most = _deal(row_of_bundle[bundle], of.trained, num_micro, settings.shards)
    M = max(num_micro, -(-settings.most_rows // R)) if settings.most_rows else 1 << (num_micro - 1).bit_length()

    # ---- what of it lies in the own rows
    own = np.arange(settings.shards) if own is None else np.asarray(own, np.int64)
    micro, shard = np.divmod(bin_of, settings.shards)
    here, depth = np.isin(shard, own), R // settings.shards
    row = (micro * len(own) + np.searchsorted(own, shard)) * depth + turn
    begin, shared = column[bundle] + start, np.where(np.bincount(bundle)[bundle] > 1, of.prompt - 1, 0)
    segment, parent = _segments(bundle, row_of_bundle[bundle], begin, shared)
    first, count = (row * T + begin)[here], of.response[here]
    offsets = np.concatenate([[0], np.cumsum(count)])
    tokens, seen = int(bundle_lengths.sum()), _triangle(lengths) - _triangle(shared)
    heads = np.unique(bundle, return_index=True)[1]
    return Packing(
        shape=(M, len(own) * depth, T), responses=np.flatnonzero(here), first=first, segment=segment[here],
        shared=shared[here], parent=parent[here],
        index=np.repeat(first - offsets[:-1], count) + np.arange(offsets[-1]), offsets=offsets,
        num_micro=num_micro, num_tokens=int(of.trained.sum()), num_sequences=int((of.trained > 0).sum()),
        capacity=capacity_bucket(most, depth * T), tokens=tokens,
        context=float(seen.sum() + _triangle(shared)[heads].sum()) / tokens,
        waste=1 - tokens / (num_micro * R * T), waste_to_longest=1 - lengths.mean() / longest,
    )  # fmt: skip


def fill(packing: Packing, mine: Rollouts, advantages, settings: PackSettings, step: int | None = None) -> PackedBatch:
    """The arrays of a mini-batch, for the own rows of `packing`.

    mine: the responses `packing.responses`, in that order. advantages: [n], per response, or [total], per token.
    step: tokens drawn before this training step are stale; None: no token is.
    """
    r, shape = mine, packing.shape
    tokens, positions, segments, parents = np.zeros((4, np.prod(shape)), np.int32)
    where = (packing.first, packing.segment, packing.shared, packing.parent, r.lengths)
    for i, (first, segment, shared, parent, length) in enumerate(zip(*(x.tolist() for x in where), strict=True)):
        prompt = r.prompts[r.group[i]].tokens
        own = slice(first - len(prompt) + shared, first + length)
        tokens[own.start : first] = prompt[shared:]
        positions[own] = np.arange(shared, len(prompt) + length)
        segments[own], parents[own] = segment, parent
        if shared and segment == parent + 1:  # the first of its bundle: the prompt goes before it
            before = slice(own.start - shared, own.start)
            tokens[before], positions[before], segments[before] = prompt[:shared], np.arange(shared), parent
    tokens[packing.index] = r.tokens
    zeros = np.zeros(shape, np.float32)
    experts = r.token_columns.get("experts") if settings.experts else None
    kept, least = (r.token_columns.get(name, np.zeros(len(r.tokens), np.float32)) for name in ("kept", "least"))
    return PackedBatch(
        tokens=tokens.reshape(shape),
        positions=positions.reshape(shape),
        segment_ids=segments.reshape(shape),
        response_mask=packing.spread(r.sampled & r.per_token(r.valid)),
        advantages=packing.spread(advantages),
        old_logprobs=zeros,
        sampler_logprobs=packing.spread(r.logprobs - kept if settings.replay else r.logprobs),
        ref_logprobs=zeros,
        stale=zeros if step is None else packing.spread(r.version < step),
        num_micro=np.int32(packing.num_micro),
        num_tokens=np.float32(packing.num_tokens),
        num_sequences=np.float32(packing.num_sequences),
        capacity=packing.capacity,
        parents=parents.reshape(shape) if settings.share_prompts else None,
        least=packing.spread(least) if settings.replay else None,
        experts=None if experts is None else packing.spread(experts, experts.dtype, before=1),
    )


def _triangle(n):
    """1 + 2 + ... + n: how many tokens the n tokens of a segment attend to, added up."""
    return n * (n + 1) // 2


def capacity_bucket(tokens: int, positions: int) -> int:
    """tokens rounded up to a quarter of the positions, so that few capacities occur; at most all positions."""
    step = -(-positions // 4)
    return int(min(positions, max(step, -(-tokens // step) * step)))


def _bundles(of: Sizes, T: int, share: bool):
    """(bundle of each response, columns from its start to the response's first token, tokens of each bundle).

    A bundle is a prompt with one response, or, if shared, with as many of its responses as a row of T tokens holds;
    each further response brings the prompt's last token along.
    """
    if not share:
        return np.arange(len(of.group)), of.prompt, of.prompt + of.response
    bundle, start, found, latest = np.zeros(len(of.group), np.int64), of.prompt.copy(), [], {}
    for i, (group, length) in enumerate(zip(of.group.tolist(), of.response.tolist(), strict=True)):
        number = latest.get(group)
        if number is None or found[number] + 1 + length > T:
            number = latest[group] = len(found)
            found.append(int(of.prompt[i]) + length)
        else:
            start[i] = found[number] + 1
            found[number] += 1 + length
        bundle[i] = number
    return bundle, start, np.array(found, np.int64)


def _segments(bundle, row_of, begin, shared):
    """(segment id of each response, segment id of its shared prompt or 0 if it has none). Ids count up from 1 within a
    row, from left to right; a shared prompt comes before its responses."""
    order = np.lexsort((begin, row_of))
    head = np.diff(bundle[order], prepend=-1) != 0  # of its bundle
    id_ = np.cumsum(1 + (head & (shared[order] > 0)))
    new_row = np.diff(row_of[order], prepend=-1) != 0
    before = np.where(new_row, np.concatenate([[0], id_[:-1]]), 0)
    id_ -= np.maximum.accumulate(before)  # ids of the rows before
    of_prompt = np.maximum.accumulate(np.where(head, np.arange(len(order)), 0))
    parent = np.where(shared[order] > 0, id_[of_prompt] - 1, 0)
    segment, parents = np.empty_like(id_), np.empty_like(id_)
    segment[order], parents[order] = id_, parent
    return segment, parents


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
    """(R, micro-batches in use). R is the row count that micro_tokens allows, or a quarter of it: the quarter if fewer
    than four full micro-batches would be filled, or if the full count computes over 1 % more rows. Choosing the best R
    for each batch would give many shapes."""
    most = max(1, micro_tokens // (T * shards))
    R, quarter = most * shards, max(1, most // 4) * shards
    if rows < 4 * R or -(-rows // R) * R > 1.01 * -(-rows // quarter) * quarter:
        R = quarter
    return R, -(-rows // R)


def _deal(row_of, response_lengths, num_micro: int, shards: int):
    """Deals the rows to num_micro x shards bins, so that each gets about the same number of response tokens: sorted by
    response tokens, rows go to the bins from the first to the last, then from the last to the first, and so on.

    Returns (bin of each sequence, its row there, the largest number of response tokens in one bin).
    """
    load = np.bincount(row_of, weights=response_lengths)  # response tokens of each row
    fullest_first = np.argsort(-load, kind="stable")
    bins = num_micro * shards
    turn, place = np.divmod(np.arange(len(load)), bins)
    bin_of = np.where(turn % 2 == 0, place, bins - 1 - place)
    rank = np.argsort(fullest_first)[row_of]
    return bin_of[rank], turn[rank], int(np.bincount(bin_of, weights=load[fullest_first]).max())
