"""`Rollouts`: the one record of a batch, from the sampler to the packed mini-batch. NumPy, on the host.

A struct of arrays for N responses to P prompts. Per-token arrays are flat; `offsets` says where each response begins:

    tokens   [ 7 9 2 | 4 2 | 5 5 5 2 ]      total = 9 tokens
    offsets  [ 0       3     5         9 ]  N + 1
    group    [ 0       0     1         ]    response 2 answers prompt 1
    reward   [ 1.0     0.0   1.0       ]

Selection, length rewards, advantages, packing, metrics, samples, checkpoints and the exchange between hosts use it.
A method that needs one more number per response or token puts it into `columns` or `token_columns`, which go through
every selection, checkpoint and exchange. Unfinished responses (partial rollouts, prompts begun ahead of time) are kept
in the same record, with finish "partial".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxrl.errors import UserError
from jaxrl.types import Completion, Problem, concat_columns

PARTIAL = "partial"  # the finish of a response that is to be continued
PER_TOKEN = {"tokens": np.int32, "logprobs": np.float32, "sampled": bool, "version": np.int32}
PER_RESPONSE = {"sample": np.int32, "correct": np.float32, "reward": np.float32, "valid": bool}
WORDS = ("finish", "outcome")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One problem as it was drawn for a batch; its responses are a group.

    tokens: int32 [p]. samples: how many responses are sampled for it, including those that selection drops later.
    position: its place in the order of problems. step: the training step in which it was drawn. Both are part of the
    random keys.
    """

    problem: Problem
    tokens: np.ndarray
    samples: int
    position: int = 0
    step: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Rollouts:
    """N responses with T tokens in all, to P prompts. Read only: every change makes a new record.

    prompts: P of them, each with at least one response. offsets: int64 [N + 1]. group: int64 [N], index into prompts.
    tokens: int32 [T], end-of-sequence tokens included. logprobs: float32 [T], of the tempered distribution before
        truncation. sampled: bool [T], False where a token was forced (budget forcing, a tool): it gets no gradient.
        version: int32 [T], the training step whose parameters drew it.
    sample: int32 [N], number of the response within its group. correct: float32 [N], 0 or 1, before any shaping.
        reward: float32 [N], what advantages see. valid: bool [N], False where grading failed: no gradient, no part in
        any statistic.
    finish: object [N], "eos", "length" (the token limit), "stop" (a stop sequence) or "partial" (to be continued).
    outcome: object [N], "correct", "wrong", "unparsed", "timeout", "crashed", "nonfinite"; "" before grading.
    columns: name -> [N]; token_columns: name -> [T, ...].
    """

    prompts: tuple[Prompt, ...]
    offsets: np.ndarray
    group: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    sampled: np.ndarray
    version: np.ndarray
    sample: np.ndarray
    correct: np.ndarray
    reward: np.ndarray
    valid: np.ndarray
    finish: np.ndarray
    outcome: np.ndarray
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    token_columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    # ---- sizes and per-response facts

    def __len__(self) -> int:
        return len(self.group)

    def __iter__(self):
        raise UserError(
            "Rollouts is a struct of arrays, not a list of groups: a selection rule is fn(rollouts, hyper) -> "
            "(keep [N] bool, reason [N]); see docs/extending.md"
        )

    @property
    def num_groups(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: response tokens, the end of the sequence included."""
        return np.diff(self.offsets)

    @property
    def truncated(self) -> np.ndarray:
        """bool [N]: the response ran into the token limit."""
        return self.finish == "length"

    @property
    def unfinished(self) -> np.ndarray:
        """bool [N]: the response is to be continued."""
        return self.finish == PARTIAL

    @property
    def budgets(self) -> np.ndarray:
        """int64 [N]: the requested length in tokens, 0 for none."""
        return self.per_response([p.problem.budget or 0 for p in self.prompts], np.int64)

    @property
    def modes(self) -> np.ndarray:
        """object [N]: "none", "exact" or "max", what the prompt says about its budget."""
        return self.per_response([p.problem.mode for p in self.prompts], object)

    @property
    def identity(self) -> list[tuple[int, int]]:
        """N pairs (position of the prompt, sample) that tell every response of a run from every other."""
        return [(self.prompts[g].position, s) for g, s in zip(self.group.tolist(), self.sample.tolist(), strict=True)]

    def per_response(self, values: Sequence, dtype=None) -> np.ndarray:
        """[N]: a value of each group, repeated for its responses."""
        return np.array(values, dtype)[self.group]

    def per_token(self, values: Sequence) -> np.ndarray:
        """[T]: a value of each response, repeated for its tokens."""
        return np.repeat(np.asarray(values), self.lengths)

    def split_tokens(self, values: np.ndarray | None = None) -> list[np.ndarray]:
        """A [T] array (default: the tokens) as one array a response."""
        return np.split(self.tokens if values is None else values, self.offsets[1:-1]) if len(self) else []

    def token_sum(self, values: np.ndarray) -> np.ndarray:
        """float64 [N]: the sum over each response of a [T] array."""
        response = np.repeat(np.arange(len(self)), self.lengths)
        return np.bincount(response, np.asarray(values, np.float64), len(self))

    def token_count(self, which: np.ndarray) -> np.ndarray:
        """int64 [N]: the number of tokens of each response for which `which` [T] is True."""
        out, some = np.zeros(len(self), np.int64), np.flatnonzero(self.lengths)
        if len(some):
            out[some] = np.add.reduceat(np.asarray(which, bool), self.offsets[some], dtype=np.int64)
        return out

    def column(self, name: str) -> np.ndarray:
        """The added column of that name: [N], or [T] if it has one value a token."""
        return self.columns[name] if name in self.columns else self.token_columns[name]

    # ---- statistics of groups, over graded responses

    def group_count(self, which: np.ndarray | None = None) -> np.ndarray:
        """int64 [P]: responses with `which` [N] (default: valid) True."""
        which = self.valid if which is None else which
        return np.bincount(self.group[which], minlength=self.num_groups)

    def group_any(self, which: np.ndarray) -> np.ndarray:
        """bool [P]: whether `which` [N] is True for any response."""
        return self.group_count(np.asarray(which, bool)) > 0

    def group_mean(self, values: np.ndarray) -> np.ndarray:
        """float64 [P]: mean of `values` [N] over the valid responses; NaN for a group without any."""
        sums = np.bincount(self.group, np.where(self.valid, values, 0), self.num_groups)
        count = self.group_count()
        return np.where(count > 0, sums / np.maximum(count, 1), np.nan)

    def group_range(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(least, most): float64 [P] over the valid responses; (inf, -inf) for a group without any."""
        least, most = np.full(self.num_groups, np.inf), np.full(self.num_groups, -np.inf)
        np.minimum.at(least, self.group[self.valid], values[self.valid])
        np.maximum.at(most, self.group[self.valid], values[self.valid])
        return least, most

    # ---- parts, sums, changes

    def take(self, index: Sequence[int]) -> Rollouts:
        """The responses `index` in that order; groups are renumbered as they first appear, empty groups are dropped."""
        index = np.asarray(index, np.int64)
        if len(index) == len(self) and (np.diff(index, prepend=-1) == 1).all() and self._groups_in_order():
            return self  # everything, as after a rule that dropped nothing: no copy
        offsets = np.concatenate([[0], np.cumsum(self.lengths[index])])
        # tokens are copied in runs of neighbours, mostly whole groups: several times faster than one by one
        cuts = np.flatnonzero(np.diff(index) != 1) + 1
        runs = [slice(self.offsets[run[0]], self.offsets[run[-1] + 1]) for run in np.split(index, cuts) if len(run)]
        tokens = lambda values: np.concatenate([values[:0], *(values[run] for run in runs)])  # noqa: E731
        groups, first, number = np.unique(self.group[index], return_index=True, return_inverse=True)
        order = np.argsort(first)
        return Rollouts(
            prompts=tuple(self.prompts[g] for g in groups[order]),
            offsets=offsets,
            group=np.argsort(order)[number],
            **{k: tokens(getattr(self, k)) for k in PER_TOKEN},
            **{k: getattr(self, k)[index] for k in (*PER_RESPONSE, *WORDS)},
            columns={k: v[index] for k, v in self.columns.items()},
            token_columns={k: tokens(v) for k, v in self.token_columns.items()},
        )

    def _groups_in_order(self) -> bool:
        """Whether groups are numbered as they first appear."""
        numbers, first = np.unique(self.group, return_index=True)
        return len(numbers) == self.num_groups and bool((np.diff(first) > 0).all())

    def where(self, keep: np.ndarray) -> Rollouts:
        """The responses with keep [N] True, in order."""
        return self.take(np.flatnonzero(keep))

    def part(self, start: int, stop: int) -> Rollouts:
        """The responses from start to stop, which must be whole groups, without a copy."""
        low, high = self.offsets[start], self.offsets[stop]
        groups = self.group[start:stop]
        first, last = (groups[0], groups[-1] + 1) if stop > start else (0, 0)
        return Rollouts(
            prompts=self.prompts[first:last],
            offsets=self.offsets[start : stop + 1] - low,
            group=groups - first,
            **{k: getattr(self, k)[low:high] for k in PER_TOKEN},
            **{k: getattr(self, k)[start:stop] for k in (*PER_RESPONSE, *WORDS)},
            columns={k: v[start:stop] for k, v in self.columns.items()},
            token_columns={k: v[low:high] for k, v in self.token_columns.items()},
        )

    def take_groups(self, groups: Sequence[int]) -> Rollouts:
        """The whole groups `groups`, in that order."""
        rank = np.full(self.num_groups, -1)
        rank[np.asarray(groups, np.int64)] = np.arange(len(groups))
        order = np.argsort(rank[self.group], kind="stable")
        return self.take(order[rank[self.group][order] >= 0])

    def split_groups(self, first: int) -> tuple[Rollouts, Rollouts]:
        """(the first `first` groups, the others)."""
        return self.take_groups(range(self.num_groups)[:first]), self.take_groups(range(self.num_groups)[first:])

    def extend(self, completions: Sequence[Completion], step: int, limit: int) -> Rollouts:
        """The record with completions appended to the unfinished responses, one for each, in their order.

        step: the version of the new tokens. limit: most tokens of a response; a response that stopped at "length" below
        this is still unfinished.
        """
        running = np.flatnonzero(self.unfinished)
        new = [(c, np.ones(len(c.tokens), bool) if c.sampled is None else c.sampled) for c in completions]
        before, after = self.token_columns, concat_columns([(c.columns, c.length) for c in completions])
        both = concat_columns([(before, len(self.tokens)), (after, int(sum(c.length for c in completions)))])
        added = np.zeros(len(self), np.int64)
        added[running] = [len(c.tokens) for c, _ in new]
        at = np.repeat(self.offsets[1:], added)
        lengths, finish = self.lengths + added, self.finish.copy()
        for i, (c, _) in zip(running, new, strict=True):
            finish[i] = PARTIAL if c.finish == "length" and lengths[i] < limit else c.finish
        return dataclasses.replace(
            self,
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            tokens=np.insert(self.tokens, at, _joined([c.tokens for c, _ in new], np.int32)),
            logprobs=np.insert(self.logprobs, at, _joined([c.logprobs for c, _ in new], np.float32)),
            sampled=np.insert(self.sampled, at, _joined([s for _, s in new], bool)),
            version=np.insert(self.version, at, step),
            finish=finish,
            token_columns={k: np.insert(v[: len(self.tokens)], at, v[len(self.tokens) :], 0) for k, v in both.items()},
        )

    def replace(self, **changes) -> Rollouts:
        """The record with other values in some of the fields."""
        return dataclasses.replace(self, **changes)

    # ---- plain arrays, for checkpoints and between hosts

    def to_arrays(self, prompts: bool = True) -> dict[str, np.ndarray]:
        """The record as arrays of numbers; `from_arrays` gives it back bit for bit.

        A token takes 8 1/8 bytes: `sampled` is packed to bits, `version` is stored as runs. Problems, and the names of
        outcomes, are JSON as bytes. prompts=False leaves the prompts out, for a reader that has them.
        """
        starts = np.flatnonzero(np.diff(self.version, prepend=-1))
        out = {k: getattr(self, k) for k in ("group", "tokens", "logprobs", *PER_RESPONSE)}
        out |= {"lengths": self.lengths.astype(np.int32), "group": self.group.astype(np.int32)}
        out |= {"sampled": np.packbits(self.sampled), "version": self.version[starts], "version_starts": starts}
        for name in WORDS:
            words, codes = np.unique(getattr(self, name).astype(str), return_inverse=True)
            out |= {name: codes.astype(np.uint8), f"{name}_words": _to_json(words.tolist())}
        out |= {f"columns/{k}": v for k, v in self.columns.items()}
        out |= {f"token_columns/{k}": v for k, v in self.token_columns.items()}
        if prompts:
            rows = [[dataclasses.asdict(p.problem), len(p.tokens), p.samples, p.position, p.step] for p in self.prompts]
            out |= {"prompts": _to_json(rows), "prompt_tokens": _joined([p.tokens for p in self.prompts], np.int32)}
        return out

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray], prompts: Sequence[Prompt] | None = None) -> Rollouts:
        """Inverse of `to_arrays`. prompts: needed if `to_arrays` left them out."""
        if prompts is None:
            rows = _from_json(arrays["prompts"])
            tokens = np.split(arrays["prompt_tokens"], np.cumsum([n for _, n, *_ in rows])[:-1])
            prompts = [Prompt(Problem(**p), t, *rest) for (p, _, *rest), t in zip(rows, tokens, strict=False)]
        total = len(arrays["tokens"])
        runs = np.diff(arrays["version_starts"], append=total)
        words = {k: np.array(_from_json(arrays[f"{k}_words"]), object)[arrays[k]] for k in WORDS}
        return Rollouts(
            prompts=tuple(prompts),
            offsets=np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)]),
            group=arrays["group"].astype(np.int64),
            **{k: arrays[k] for k in ("tokens", "logprobs", *PER_RESPONSE)},
            sampled=np.unpackbits(arrays["sampled"], count=total).view(bool),
            version=np.repeat(arrays["version"], runs),
            **words,
            columns={k[8:]: v for k, v in arrays.items() if k.startswith("columns/")},
            token_columns={k[14:]: v for k, v in arrays.items() if k.startswith("token_columns/")},
        )


def begin(prompts: Iterable[Prompt]) -> Rollouts:
    """Each prompt with its `samples` responses, none of which has a token yet."""
    prompts = tuple(prompts)
    samples = np.array([p.samples for p in prompts], np.int64)
    n = int(samples.sum())
    return Rollouts(
        prompts=prompts,
        offsets=np.zeros(n + 1, np.int64),
        group=np.repeat(np.arange(len(prompts)), samples),
        **{k: np.zeros(0, dtype) for k, dtype in PER_TOKEN.items()},
        **{k: np.zeros(n, dtype) for k, dtype in PER_RESPONSE.items()} | {"sample": _joined(map(np.arange, samples))},
        finish=np.full(n, PARTIAL, object),
        outcome=np.full(n, "", object),
    )


def from_sequences(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    logprobs: Sequence[np.ndarray] | None = None,
    group: Sequence[int] | None = None,
    **fields: Any,
) -> Rollouts:
    """Rollouts of plain lists: demonstrations, benchmarks, tests.

    responses, logprobs (default 0): N arrays. group: index into prompts of each response, default one response a
    prompt. fields: other fields of Rollouts; by default all responses are valid, drawn at step 0 and ended with "eos".
    """
    n = len(responses)
    group = np.arange(n) if group is None else np.asarray(group)
    counts = np.bincount(group, minlength=len(prompts)).tolist()
    rows = [Prompt(Problem(str(i), "", ""), np.asarray(p, np.int32), counts[i], i) for i, p in enumerate(prompts)]
    tokens = _joined(responses, np.int32)
    zeros = np.zeros(n, np.float32)
    return dataclasses.replace(
        Rollouts(
            prompts=tuple(rows),
            offsets=np.cumsum([0, *map(len, responses)], dtype=np.int64),
            group=group,
            tokens=tokens,
            logprobs=np.zeros(len(tokens), np.float32) if logprobs is None else _joined(logprobs, np.float32),
            sampled=np.ones(len(tokens), bool),
            version=np.zeros(len(tokens), np.int32),
            sample=_number_within(group),
            correct=zeros,
            reward=zeros,
            valid=np.ones(n, bool),
            finish=np.full(n, "eos", object),
            outcome=np.full(n, "", object),
        ),
        **fields,
    )


def concat(parts: Sequence[Rollouts]) -> Rollouts:
    """The responses of all parts, in order; no two parts share a group. A column that a part lacks is 0 there."""
    parts = [p for p in parts if len(p)] or [begin([])]
    if len(parts) == 1:
        return parts[0]
    first = np.cumsum([0, *(p.num_groups for p in parts)])
    return Rollouts(
        prompts=sum((p.prompts for p in parts), ()),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate([p.lengths for p in parts]))]),
        group=np.concatenate([p.group + n for p, n in zip(parts, first[:-1], strict=True)]),
        **{k: np.concatenate([getattr(p, k) for p in parts]) for k in (*PER_TOKEN, *PER_RESPONSE, *WORDS)},
        columns=concat_columns([(p.columns, len(p)) for p in parts]),
        token_columns=concat_columns([(p.token_columns, len(p.tokens)) for p in parts]),
    )


def merge(parts: Sequence[Rollouts], places: Sequence[Sequence[int]]) -> Rollouts:
    """The groups of all parts in one order: group g of part i becomes group places[i][g]. Within each part, responses
    must be in the order of its groups. Like `concat` and `take_groups`, but in one pass over the tokens.
    """
    pieces = []
    for part, where in zip(parts, places, strict=True):
        ends = np.searchsorted(part.group, np.arange(part.num_groups + 1))
        pieces += [(g, part.part(*ends[n : n + 2])) for n, g in enumerate(where)]
    return concat([piece for _, piece in sorted(pieces, key=lambda p: p[0])])


def _number_within(group: np.ndarray) -> np.ndarray:
    """int32 [N]: 0, 1, 2, ... within each group."""
    order, counts = np.argsort(group, kind="stable"), np.bincount(group)
    out = np.empty(len(group), np.int32)
    out[order] = _joined(map(np.arange, counts))
    return out


def _joined(arrays: Iterable, dtype=np.int32) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)


def _to_json(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _from_json(data: np.ndarray) -> Any:
    return json.loads(data.tobytes())
