"""Replays the engine's scheduler for given response lengths, without a model. Multiply its calls by measured times.

The engine and its cache are the real ones. Only the programs are replaced: calls are recorded, and a decode call ends
each response at its given length. Only a few scalars touch a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl.rollout.cache import DenseCache
from jaxrl.rollout.engine import Engine
from jaxrl.rollout.paged import PagedCache
from jaxrl.rollout.programs import Runner
from jaxrl.rollout.requests import Request, Stats
from models.config import DecoderConfig
from models.decoder import Cache
from models.pages import BLOCK, Pages

END = 1
_MODEL = DecoderConfig(2, 8, 8, 1, 1, 1, 8, model_type="llama", max_position_embeddings=2**31 - 1)


class Call(NamedTuple):
    """program: "prefill", "decode", "resize", "write_prompts" or "write_pages". rows: slots, or prompts. columns: of
    the cache. steps: of a decode call, else 1. active: rows in which a response ran. contexts: tokens that these
    attended to, summed over steps. read: columns that decoding reads, over all rows and steps."""

    program: str
    rows: int
    columns: int
    steps: int = 1
    active: int = 0
    contexts: int = 0
    read: int = 0


@dataclasses.dataclass
class Rollout:
    """calls: in order; where the engine works array by array, one per array (keys, values) of a single layer. stats:
    the engine's own counts. largest: columns of the cache over all slots, when it is at its largest."""

    calls: list[Call]
    stats: Stats
    largest: int

    def of(self, program: str) -> list[Call]:
        return [call for call in self.calls if call.program == program]

    @property
    def read(self) -> int:
        """Columns of the cache that decoding reads, those of a dense cache's free slots included."""
        return sum(c.read for c in self.of("decode"))

    @property
    def contexts(self) -> int:
        """Columns that decoding cannot avoid reading: each response's own tokens at each of its steps."""
        return sum(c.contexts for c in self.of("decode"))


class _Array(NamedTuple):
    """Stands for an array of a cache."""

    shape: tuple[int, ...]

    def delete(self) -> None:
        """It holds nothing."""


class _Recorder(Runner):
    """Programs of one layer that compute nothing. lengths: [problems, samples]."""

    def __init__(self, lengths: np.ndarray):
        self.lengths, self.calls, self.warm, self.shapes = lengths, [], True, {}

    def keys(self, seed, step, problem, sample) -> np.ndarray:
        return np.stack([problem, sample], axis=1).astype(np.uint32)  # so that decode knows whose row it is

    def call(self, name: str, sizes: tuple, *args, **kwargs):
        if name == "decode":
            return self.decode(*args)
        if name == "prefill":
            self.calls.append(Call(name, *sizes[:2]))
            return [[_Array((sizes[0], 1, args[1].shape[1], 1))] for _ in range(2)]
        if name == "new_cache":
            return Cache(*[[_Array((sizes[0], 1, sizes[1], 1))] for _ in range(2)], np.zeros(sizes[0], np.int32), 0)
        if name == "new_pages":
            return (None,)
        if name == "write_pages":
            self.calls.append(Call(name, *sizes))
            return args[0]
        if name == "resize":
            old, rows, window = args[0].shape, args[1], kwargs["window"]
            new = (old[0] if rows is None else len(rows), 1, window, 1)
        else:  # write_prompts
            new = args[0].shape
        self.calls.append(Call(name, new[0], new[2]))
        return _Array(new)

    def decode(self, params, cache, rows, settings, steps, refill_at):
        running = np.flatnonzero(rows.active)
        problem, sample = rows.keys[running].astype(np.int64).T
        left = np.minimum(self.lengths[problem, sample], rows.limit[running]) - rows.count[running]
        enough = np.sort(left)[refill_at - 1] if refill_at <= len(left) else steps
        steps = int(min(steps, enough, left.max()))
        emitted = np.zeros(len(rows.active), np.int32)
        emitted[running] = own = np.minimum(left, steps)
        tokens = np.zeros((steps, len(emitted)), np.int32)
        ended = running[left <= steps]
        tokens[emitted[ended] - 1, ended] = END
        contexts = int(np.sum(own * (rows.used[running] + 1) + own * (own - 1) // 2))
        if isinstance(cache, Pages):  # a kernel reads a row's own blocks until the call ends
            columns = cache.table.shape[1]
            ends = rows.used[running][:, None] + 1 + np.arange(steps)
            read = int(np.sum(-(-ends // BLOCK) * BLOCK))
        else:
            columns = cache.v[0].shape[2]
            read = len(emitted) * columns * steps
        self.calls.append(Call("decode", len(emitted), columns, steps, len(left), contexts, read))
        return cache, tokens, np.zeros(tokens.shape, np.float32), emitted, {}


def replay(lengths, prompts: Sequence[int], *, slots: int, chunk: int, window: int, max_prompt: int, max_tokens: int,
           multiple: int = 1, page: int = 0, tokens: int = 0) -> Rollout:
    """The calls of one host that samples problems with prompts of these lengths.

    lengths: int [problems, samples], tokens that each response draws; what is above max_tokens is cut there. multiple:
    replicas of the weights on this host. page, tokens: of a cache in pages, 0: dense. Others: see Engine.
    """
    lengths = np.asarray(lengths)
    sizes = dict(max_prompt=max_prompt, max_tokens=max_tokens, slots=slots, chunk=chunk)
    engine, recorder = Engine(_MODEL, (END,), window=window, **sizes), _Recorder(lengths)
    sizes |= dict(multiple=multiple, window=window)
    if page:
        cache = PagedCache(recorder, **sizes, page=page, tokens=tokens, implementation="ragged")
        largest = cache.pages * cache.replicas * page
    else:
        cache = DenseCache(recorder, **sizes)
        largest = slots * cache.windows[-1]
    engine.runner, engine.cache = recorder, cache
    for key, (length, own) in enumerate(zip(prompts, lengths, strict=True)):
        engine.submit(Request(np.zeros(length, np.int32), len(own), max_tokens, key))
    while engine.busy:
        engine.step(None)
    return Rollout(recorder.calls, engine.stats, largest)


def log_normal(shape: tuple[int, int], limit: int, median: float, sigma: float, seed: int = 0) -> np.ndarray:
    """int [problems, samples]: log-normal lengths with median `median` * limit, cut at the limit, as answers are."""
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(median * limit), sigma, shape))
    return np.clip(drawn, 1, limit).astype(np.int64)
