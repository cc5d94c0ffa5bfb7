"""Continuous batching: a pool of decode slots that the host harvests and refills.

Each distinct prompt is prefilled once and its cache copied into the slots of its samples. A decode call
runs until enough slots have finished to be worth refilling. When the queue is empty the pool shrinks, and
the attended window always follows the longest answer still running, so short answers never pay for long ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rollout.placement import Placement
from jaxrl.rollout.programs import Knobs, Programs, Rows, build_programs
from jaxrl.types import Completion
from models.config import DecoderConfig
from models.decoder import sampling_layout

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Request:
    """`samples` completions of one prompt.

    prompt: int32 [p], p >= 1. max_tokens: response tokens allowed, at least 1. key: uint32, identifies the
    problem in the random keys. expected: guessed response length; longer requests start first.
    first_sample: index of the first sample in the random keys. min_tokens: end tokens are not drawn before.
    """

    prompt: np.ndarray
    samples: int
    max_tokens: int
    key: int
    expected: float = 0.0
    first_sample: int = 0
    min_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off. bias: float32 [V], added to the logits."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    bias: np.ndarray | None = None


@dataclasses.dataclass
class Stats:
    """Counts of one `generate` call. slot_steps: rows x decode steps run, the denominator of utilisation."""

    tokens: int = 0
    slot_steps: int = 0
    decode_calls: int = 0
    prefill_tokens: int = 0
    seconds_prefill: float = 0.0
    seconds_decode: float = 0.0
    seconds_total: float = 0.0

    @property
    def utilisation(self) -> float:
        """Share of the slot-steps that produced a token of a completion."""
        return self.tokens / max(self.slot_steps, 1)


def bucket(n: int, base: int, per_octave: int = 4) -> int:
    """Round n up to one of a few sizes: multiples of `base`, then `per_octave` sizes per power of two."""
    n = max(int(n), 1)
    step = max(base, 1 << max((n - 1).bit_length() - 1, 0) >> (per_octave.bit_length() - 1))
    return -(-n // step) * step


class _Slots:
    """Host copy of the pool's rows; the device never has to be asked where a row stands."""

    def __init__(self, size: int):
        self.request = np.full(size, -1, np.int32)
        self.sample = np.zeros(size, np.int32)
        self.token, self.used, self.count, self.limit, self.min_count = np.zeros((5, size), np.int32)
        self.keys = np.zeros((size, 2), np.uint32)

    @property
    def active(self):
        return self.request >= 0

    def take(self, rows):
        for name, value in vars(self).items():
            setattr(self, name, value[rows])

    def arguments(self) -> Rows:
        return Rows(self.token, self.used, self.count, self.limit, self.active, self.keys, self.min_count)


class Sampler:
    """Samples completions from a decoder.

    Args:
      config: the decoder. eos_ids: end tokens. max_prompt, max_tokens: the longest prompt and response that
        will be asked for. slots: rows decoded together. chunk: most decode steps between two looks at the
        pool. dtype: compute and cache dtype. window: granularity of the attended length.
      refill: share of the slots that must be free before a decode call returns early to refill them.
      placement: the chips to use when there are several (jaxrl.rollout.placement); slots must divide over them.

    Raises ValueError on requests longer than max_prompt or max_tokens.
    """

    def __init__(
        self,
        config: DecoderConfig,
        eos_ids: Sequence[int],
        *,
        max_prompt: int,
        max_tokens: int,
        slots: int = 32,
        chunk: int = 64,
        dtype=jnp.float32,
        window: int = 64,
        refill: float = 0.125,
        attention: str = "xla",
        placement: Placement | None = None,
    ):
        self.config, self.slots, self.chunk, self.dtype, self.window = config, slots, chunk, dtype, window
        self.max_prompt, self.max_tokens = max_prompt, max_tokens
        self.refill_at = max(1, round(refill * slots))
        self.eos = np.array(sorted(set(eos_ids)), np.int32)
        self.placement = placement
        self.row_multiple = placement.row_multiple if placement else 1
        if slots % self.row_multiple:
            raise ValueError(f"slots={slots} must be a multiple of {self.row_multiple}, the replicas on this host")
        fused = placement.fused if placement else True
        self.programs: Programs = build_programs(config, dtype, chunk, attention, fused)
        self._layout = jax.jit(
            lambda p: sampling_layout(p, config, dtype, fused),
            out_shardings=placement and placement.cast_where_they_lie(config),
        )
        self.shapes: dict[tuple, float] = {}  # (program, sizes) -> seconds of its first call
        self.warm = False
        self.stats = Stats()

    def layout(self, params):
        """Training parameters -> sampling parameters; once per rollout phase."""
        params = self._layout(params)
        return self.placement.fetch(params, self.config) if self.placement else params

    def generate(
        self,
        params,
        requests: Sequence[Request],
        *,
        seed: int,
        step: int = 0,
        sampling: Sampling | None = None,
        on_tokens: Callable[[int, int, np.ndarray], bool | None] | None = None,
    ) -> list[list[Completion]]:
        """Completions of every request, in order.

        Args:
          params: from `layout`. seed, step: with Request.key, the sample index and the position they make
            the random key of each token, so the result depends on neither slots, chunk nor request order.
          on_tokens: called as f(request index, sample index, new tokens) after each decode call; returning
            True stops that completion there (finish "stop").

        Returns:
          One list of `samples` completions per request. `self.stats` holds the counts of this call.
        """
        run = _Run(self, params, requests, seed, step, sampling or Sampling(), on_tokens)
        begin = time.perf_counter()
        run.loop()
        self.stats = run.stats
        self.stats.seconds_total = time.perf_counter() - begin
        return run.results()

    def call(self, name: str, sizes: tuple, *args, **kwargs):
        """Run a program, recording the first call of each shape (that is when it compiles)."""
        key, program = (name, *sizes), getattr(self.programs, name)
        with self.placement.use() if self.placement else contextlib.nullcontext():
            if key in self.shapes:
                return program(*args, **kwargs)
            begin = time.perf_counter()
            out = jax.block_until_ready(program(*args, **kwargs))
        self.shapes[key] = time.perf_counter() - begin
        message = "sampler: compiled %s %s in %.1f s"
        (log.warning if self.warm else log.info)(message, name, sizes, self.shapes[key])
        return out


class _Run:
    """The state of one `generate` call."""

    def __init__(self, sampler, params, requests, seed, step, sampling, on_tokens):
        self.s, self.params, self.requests, self.on_tokens = sampler, params, requests, on_tokens
        self.stats = Stats()
        for i, r in enumerate(requests):
            if not 1 <= len(r.prompt) <= sampler.max_prompt or not 1 <= r.max_tokens <= sampler.max_tokens:
                raise ValueError(
                    f"request {i}: prompt of {len(r.prompt)} and limit of {r.max_tokens} tokens; the sampler "
                    f"takes prompts of 1..{sampler.max_prompt} and limits of 1..{sampler.max_tokens}"
                )
        order = sorted(
            range(len(requests)), key=lambda i: (-requests[i].expected, -len(requests[i].prompt), i)
        )
        self.queue = [i for i in order if requests[i].samples > 0]
        self.pending: list[list] = []  # [prompt caches, row, request, next sample]
        self.out = [[([], [], [""]) for _ in range(r.samples)] for r in requests]
        n = sum(r.samples for r in requests)
        base = (
            max(8, sampler.slots // 8),
            max(1, sampler.slots // 4),
            max(1, sampler.slots // 2),
            sampler.slots,
        )
        unit = sampler.row_multiple
        self.row_buckets = sorted({-(-b // unit) * unit for b in base if b <= sampler.slots})
        size = next((b for b in self.row_buckets if b >= n), sampler.slots)
        self.slots = _Slots(size)
        problem = np.repeat(np.array([r.key for r in requests], np.uint32), [r.samples for r in requests])
        sample = np.concatenate(
            [r.first_sample + np.arange(r.samples, dtype=np.uint32) for r in requests]
            or [np.zeros(0, np.uint32)]
        ).astype(np.uint32)
        padded = bucket(n, 64, 1)
        problem, sample = (np.pad(a, (0, padded - n)) for a in (problem, sample))
        keys = sampler.call("keys", (padded,), np.uint32(seed), np.uint32(step), problem, sample)
        self.keys = np.asarray(keys)
        self.first_key = np.cumsum([0] + [r.samples for r in requests])
        truncated = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        self.knobs = Knobs(
            temperature=np.float32(sampling.temperature),
            eos=sampler.eos,
            bias=None if sampling.bias is None else np.asarray(sampling.bias, np.float32),
            **(
                dict(
                    top_k=np.int32(sampling.top_k),
                    top_p=np.float32(sampling.top_p),
                    min_p=np.float32(sampling.min_p),
                )
                if truncated
                else {}
            ),
        )
        self.kind = (truncated, sampling.bias is not None)
        self.cache, self.end, self.width = None, 0, 0

    def loop(self):
        while self.queue or self.pending or self.slots.active.any():
            self.refill()
            self.decode()

    def refill(self):
        """Fill free slots from prefilled prompts, prefilling as many more prompts as that takes."""
        free = np.flatnonzero(~self.slots.active)
        waiting = sum(self.requests[p[2]].samples - p[3] for p in self.pending)
        while self.queue and waiting < len(free):
            waiting += self.prefill(len(free) - waiting)
        placed = []  # (slot, prompt caches, row)
        for slot in free:
            if not self.pending:
                break
            caches, row, index, sample = self.pending[0]
            self.place(slot, index, sample)
            placed.append((slot, caches, row))
            self.pending[0][3] += 1
            if self.pending[0][3] >= self.requests[index].samples:
                self.pending.pop(0)
        if not placed and not self.queue and not self.pending:
            self.shrink()
        self.make_room(max((c[0][0].shape[2] for _, c, _ in placed), default=0))
        while placed:
            caches = placed[0][1]
            source, chosen = np.zeros(len(self.slots.token), np.int32), np.zeros(len(self.slots.token), bool)
            for slot, _, row in (p for p in placed if p[1] is caches):
                source[slot], chosen[slot] = row, True
            placed = [p for p in placed if p[1] is not caches]
            n, _, P, _ = caches[0][0].shape
            sizes = (n, P, len(chosen), self.width)
            self.cache = self.s.call("insert", sizes, self.cache, caches, source, chosen)

    def prefill(self, samples: int) -> int:
        """Prefill the next prompts, enough for `samples` slots; returns how many samples they bring."""
        begin = time.perf_counter()
        chosen, brought = [], 0
        while self.queue and brought < samples:
            chosen.append(self.queue.pop(0))
            brought += self.requests[chosen[-1]].samples
        # the last prompt token is left to the first decode step, so that prefill needs no head
        lengths = [len(self.requests[i].prompt) - 1 for i in chosen]
        P, n = bucket(max(lengths), 32), bucket(len(chosen), max(4, self.s.row_multiple), 1)
        tokens = np.zeros((n, P), np.int32)
        for row, (i, length) in enumerate(zip(chosen, lengths, strict=True)):
            tokens[row, P - length :] = self.requests[i].prompt[:-1]
        padded = np.array(lengths + [0] * (n - len(lengths)), np.int32)
        caches = self.s.call("prefill", (n, P), self.params, tokens, padded)
        self.pending += [[caches, row, i, 0] for row, i in enumerate(chosen)]
        self.stats.prefill_tokens += sum(lengths)
        self.stats.seconds_prefill += time.perf_counter() - begin
        return brought

    def place(self, slot: int, index: int, sample: int):
        r, s = self.requests[index], self.slots
        s.request[slot], s.sample[slot] = index, sample
        s.token[slot], s.used[slot], s.count[slot] = r.prompt[-1], len(r.prompt) - 1, 0
        s.limit[slot], s.min_count[slot] = r.max_tokens, min(r.min_tokens, r.max_tokens)
        s.keys[slot] = self.keys[self.first_key[index] + sample]

    def shrink(self):
        """With nothing left to place, keep only as many rows as still run."""
        running = np.flatnonzero(self.slots.active)
        size = next((b for b in self.row_buckets if b >= len(running)), len(self.slots.token))
        if 0 < len(running) and size < len(self.slots.token):
            rows = np.concatenate([running, np.flatnonzero(~self.slots.active)])[:size].astype(np.int32)
            self.slots.take(rows)
            self.move(rows)

    def make_room(self, prompt: int):
        """Give the pool a window that fits the longest running row, new prompts, and some steps to come."""
        if self.cache is None:
            self.width, self.end = bucket(prompt + self.chunk_ahead(), self.s.window, 8), prompt
            sizes = (len(self.slots.token), self.width)
            self.cache = self.s.call("new_cache", sizes, *sizes)
            if self.s.placement:
                where = self.s.placement.cache()
                k, v = (jax.device_put(pool, where) for pool in (self.cache.k, self.cache.v))
                self.cache = self.cache.replace(k=k, v=v)
            self.cache = self.cache.replace(end=jnp.int32(self.end))
        elif self.width - self.end < min(16, self.s.chunk) or prompt > self.end:
            self.move(np.arange(len(self.slots.token), dtype=np.int32), prompt)

    def chunk_ahead(self) -> int:
        """Steps to leave room for: a chunk, but no more than the longest response still allowed."""
        left = (self.slots.limit - self.slots.count)[self.slots.active]
        return min(self.s.chunk, max(left.max(initial=1), 1))

    def move(self, rows, prompt: int = 0):
        """Rebase the pool on `rows`, with the clock set back as far as the longest running row allows."""
        used = self.slots.used[self.slots.active].max(initial=0)
        end = max(int(used), prompt)
        width = bucket(end + self.chunk_ahead(), self.s.window, 8)
        sizes = (len(self.cache.k[0]), self.width, len(rows), width)
        self.cache = self.s.call("rebase", sizes, self.cache, rows, jnp.int32(end), window=width)
        self.end, self.width = end, width

    def decode(self):
        s, sampler = self.slots, self.s
        begin = time.perf_counter()
        steps = min(sampler.chunk, self.width - self.end)
        more = bool(self.queue or self.pending)
        refill_at = sampler.refill_at if more else self.shrink_at()
        sizes = (len(s.token), self.width, *self.kind)
        args = (self.params, self.cache, s.arguments(), self.knobs, np.int32(steps), np.int32(refill_at))
        self.cache, tokens, logps, emitted = sampler.call("decode", sizes, *args)
        tokens, logps, emitted = np.asarray(tokens), np.asarray(logps), np.asarray(emitted)
        ran = int(emitted.max(initial=0))
        self.end += ran
        self.stats.decode_calls += 1
        self.stats.slot_steps += ran * len(s.token)
        self.stats.tokens += int(emitted[s.active].sum())
        self.stats.seconds_decode += time.perf_counter() - begin
        for slot in np.flatnonzero(s.active):
            self.harvest(slot, tokens[: emitted[slot], slot], logps[: emitted[slot], slot])

    def shrink_at(self) -> int:
        """Finished rows after which a smaller pool is worth a copy; more than there are means never."""
        running = int(self.slots.active.sum())
        smaller = [b for b in self.row_buckets if b < len(self.slots.token)]
        return running - smaller[-1] if smaller and running > smaller[-1] else running + 1

    def harvest(self, slot: int, tokens, logps):
        s = self.slots
        index, sample = int(s.request[slot]), int(s.sample[slot])
        pieces = self.out[index][sample]
        pieces[0].append(tokens.copy())
        pieces[1].append(logps.copy())
        s.count[slot] += len(tokens)
        s.used[slot] += len(tokens)
        s.token[slot] = tokens[-1]
        stop = bool(self.on_tokens and self.on_tokens(index, sample, tokens))
        if tokens[-1] in self.s.eos:
            pieces[2][0] = "eos"
        elif s.count[slot] >= s.limit[slot]:
            pieces[2][0] = "length"
        elif stop:
            pieces[2][0] = "stop"
        else:
            return
        s.request[slot], s.used[slot] = -1, 0

    def results(self) -> list[list[Completion]]:
        return [
            [
                Completion(
                    np.concatenate(t).astype(np.int32), np.concatenate(lp).astype(np.float32), finish[0]
                )
                for t, lp, finish in group
            ]
            for group in self.out
        ]
