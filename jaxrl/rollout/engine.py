"""Continuous batching: a pool of decode slots that the host harvests and refills.

Each distinct prompt is prefilled once and its cache copied into the slots of its samples. A decode call
runs until enough slots have finished to be worth refilling. When the queue is empty the pool shrinks, and
the attended window always follows the longest answer still running, so short answers never pay for long ones.
This file holds what callers see; the pool itself is in pool.py.
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

KEY_BLOCK = 256  # random keys are made this many at a time, so that their program has one shape


@dataclasses.dataclass(frozen=True)
class Request:
    """`samples` completions of one prompt.

    prompt: int32 [p], p >= 1. max_tokens: response tokens allowed, at least 1; one number, or one a sample.
    key: uint32, identifies the problem in the random keys. expected: guessed response length; longer requests
    start first. first_sample: index of the first sample in the random keys. min_tokens: end tokens are not
    drawn before. stop: token sequences that end a completion (finish "stop", the sequence included).
    """

    prompt: np.ndarray
    samples: int
    max_tokens: int | Sequence[int]
    key: int
    expected: float = 0.0
    first_sample: int = 0
    min_tokens: int = 0
    stop: tuple[tuple[int, ...], ...] = ()

    @property
    def limits(self) -> np.ndarray:
        """int32 [samples]: response tokens allowed. Raises ValueError if max_tokens has another length."""
        limits = np.asarray(self.max_tokens, np.int32)
        if limits.ndim and limits.shape != (self.samples,):
            raise ValueError(f"max_tokens: {limits.shape} limits for {self.samples} samples")
        return np.broadcast_to(limits, (self.samples,))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off. bias: float32 [V], added to the logits.

    -inf in `bias` bans a token. Raises ValueError naming the field that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    bias: np.ndarray | None = None

    def __post_init__(self):
        valid = {
            "temperature": (self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_k": (self.top_k >= 0, "at least 0 (0 is off)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1] (1 is off)"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1] (0 is off)"),
        }
        for name, (ok, range_) in valid.items():
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: must be {range_}")


@dataclasses.dataclass
class Stats:
    """Counts of one `generate` call. slot_steps: rows x decode steps run, the denominator of utilisation.

    seconds_decode: in or waiting for decode calls; seconds_prefill: launching prefills (their execution
    overlaps); what is left of seconds_total is the host's own work, when the device may idle.
    """

    tokens: int = 0
    slot_steps: int = 0
    decode_calls: int = 0
    prefill_calls: int = 0
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


class Sampler:
    """Samples completions from a decoder.

    Args:
      config: the decoder. eos_ids: end tokens. max_prompt, max_tokens: the longest prompt and response that
        will be asked for. slots: rows decoded together. chunk: most decode steps between two looks at the
        pool. dtype: compute and cache dtype. window: granularity of the attended length.
      refill: share of the slots that must be free before a decode call returns early to refill them.
      placement: the chips to use when there are several (jaxrl.rollout.placement); slots must divide over them.

    Raises ValueError on sizes that do not fit each other.
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
        for name, value in dict(
            max_prompt=max_prompt, max_tokens=max_tokens, slots=slots, chunk=chunk
        ).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.config, self.slots, self.chunk, self.dtype = config, slots, chunk, dtype
        self.max_prompt, self.max_tokens = max_prompt, max_tokens
        self.refill_at = max(1, round(refill * slots))
        self.eos = np.array(sorted(set(eos_ids)), np.int32)
        self.placement = placement
        self.row_multiple = unit = placement.row_multiple if placement else 1
        if slots % unit:
            raise ValueError(f"slots={slots} must be a multiple of {unit}, the replicas on this host")
        fused = placement.fused if placement else True
        platform = placement.platform if placement else jax.default_backend()
        where = placement and placement.cache()
        self.programs: Programs = build_programs(config, dtype, chunk, attention, fused, where, platform)
        self._layout = jax.jit(
            lambda p: sampling_layout(p, config, dtype, fused, untie=platform == "cpu"),
            out_shardings=placement and placement.cast_where_they_lie(config),
        )
        rows = (max(1, slots // d) for d in (8, 4, 2, 1))  # a few rows are no faster than eight
        self.row_sizes = sorted({-(-b // unit) * unit for b in rows if b >= min(slots, 8)})
        self.windows = [bucket(1, window)]
        while self.windows[-1] < bucket(max_prompt, 32) + max_tokens + min(chunk, max_tokens):
            self.windows.append(bucket(self.windows[-1] + 1, window))
        self.shapes: dict[tuple, float] = {}  # (program, sizes) -> seconds of its first call
        self.warm = False
        self.stats = Stats()
        self.on_progress: Callable[[], object] = lambda: None  # called after every decode call

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

        Raises:
          ValueError: a prompt, limit, stop sequence or bias that the sampler cannot take, naming the request.
        """
        from jaxrl.rollout.pool import Run

        begin = time.perf_counter()
        run = Run(self, params, requests, seed, step, sampling or Sampling(), on_tokens)
        run.loop()
        out = run.results()
        self.stats = run.stats
        self.stats.seconds_total = time.perf_counter() - begin
        return out

    def prompt_logprobs(self, params, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probability of each prompt token but the first, at temperature 1; float32 [p - 1] a prompt."""
        out = []
        for prompt in prompts:
            padded = np.zeros((1, bucket(len(prompt), 32)), np.int32)
            padded[0, : len(prompt)] = prompt
            logps = self.call("score", padded.shape, params, padded)
            out.append(np.asarray(logps)[0, : len(prompt) - 1])
        return out

    def warmup(
        self,
        params,
        prompt_lengths: Sequence[int] | None = None,
        completions: int | None = None,
        sampling: Sampling | None = None,
    ) -> float:
        """Compile every shape that `generate` can need; afterwards a compile is a logged warning.

        Args:
          params: from `layout`. prompt_lengths: those to expect, default 1..max_prompt. completions: the
            smallest number one call will ask for, default at least `slots`. sampling: whether it truncates
            or biases selects the decode program.

        Returns: seconds it took; `self.shapes` says for what.
        """
        begin = time.perf_counter()
        s, sizes = sampling or Sampling(), self.row_sizes
        knobs, kind = make_knobs(self, s)
        lengths = range(1, self.max_prompt + 1) if prompt_lengths is None else prompt_lengths
        prompts = sorted({bucket(n - 1, 32) for n in lengths})
        zeros = np.zeros(KEY_BLOCK, np.uint32)
        self.call("keys", (), np.uint32(0), np.uint32(0), zeros, zeros)
        caches = [
            self.call("prefill", (n, P), params, np.zeros((n, P), np.int32), np.zeros(n, np.int32))
            for P in prompts
            for n in self.prefill_sizes()
        ]
        first = next((b for b in sizes if b >= (completions or self.slots)), self.slots)
        for rows in sizes[: sizes.index(first) + 1]:
            for i, window in enumerate(self.windows):
                cache = self.call("new_cache", (rows, window), rows, window)
                if rows == first or completions is not None:
                    for prompt in caches:
                        if prompt[1][0].shape[2] <= window:
                            none = np.zeros(rows, np.int32)
                            cache = insert(self, cache, prompt, none, none > 0, prompt[1][0].shape[2])
                for other in self.windows[max(i - 1, 0) : i + 2]:
                    rebase(self, cache, None, 0, other, keep=True)
                for fewer in sizes[: sizes.index(rows)]:
                    rebase(self, cache, np.arange(fewer, dtype=np.int32), 0, window, keep=True)
                state = idle_rows(rows)
                args = (params, cache, state, knobs, np.int32(0), np.int32(1))
                self.call("decode", (rows, window, *kind), *args)
        self.warm = True
        return time.perf_counter() - begin

    def prefill_sizes(self) -> list[int]:
        """Numbers of prompts prefilled together; padded up to one of these."""
        least = max(4, self.row_multiple)
        return [least << i for i in range(4) if i == 0 or least << i <= self.slots]

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


def make_knobs(sampler: Sampler, sampling: Sampling) -> tuple[Knobs, tuple[bool, bool]]:
    """The traced settings, and which decode program they need: (truncated, biased)."""
    V, bias = sampler.config.vocab_size, None
    if sampling.bias is not None:
        bias = np.asarray(sampling.bias, np.float32)
        if bias.shape != (V,):
            raise ValueError(f"bias has shape {bias.shape}, the vocabulary ({V},)")
        if not np.any(bias > -np.inf) or np.any(np.isnan(bias)) or np.any(bias == np.inf):
            raise ValueError("bias must be finite or -inf, and leave at least one token")
    truncated = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    values = dict(
        top_k=np.int32(sampling.top_k), top_p=np.float32(sampling.top_p), min_p=np.float32(sampling.min_p)
    )
    knobs = Knobs(np.float32(sampling.temperature), sampler.eos, bias=bias, **(values if truncated else {}))
    return knobs, (truncated, bias is not None)


def idle_rows(size: int) -> Rows:
    """Rows of a pool in which nothing runs."""
    zero = np.zeros(size, np.int32)
    return Rows(zero, zero, zero, zero, zero > 0, np.zeros((size, 2), np.uint32), zero)


def insert(sampler: Sampler, cache, prompt, source, chosen, end: int):
    """Copy prompt rows `source` into the `chosen` rows of the cache, ending at column `end`."""
    n, _, P, _ = prompt[1][0].shape
    window, arrays = cache.v[0].shape[2], []
    for pool, new, axis in ((cache.k, prompt[0], sampler.programs.key_axis), (cache.v, prompt[1], 2)):
        sizes = (n, P, len(chosen), window, axis)
        args = (source, chosen, np.int32(end))
        arrays.append(
            tuple(
                sampler.call("insert", sizes, a, b, *args, axis=axis) for a, b in zip(pool, new, strict=True)
            )
        )
    return cache.replace(k=arrays[0], v=arrays[1])


def rebase(sampler: Sampler, cache, rows, shift: int, window: int, keep: bool = False):
    """The cache with other rows (None: the same) and another window, its columns moved left by `shift`.

    The old cache is freed layer by layer, whoever still refers to it, unless `keep`: two caches would not fit.
    """
    count, old = cache.v[0].shape[0], cache.v[0].shape[2]
    sizes = (count, old, None if rows is None else len(rows), window)
    moved = []
    for arrays, axis in ((list(cache.k), sampler.programs.key_axis), (list(cache.v), 2)):
        out = []
        for array in arrays:
            args = (array, rows, np.int32(shift))
            out.append(sampler.call("rebase", (*sizes, axis), *args, window=window, axis=axis))
            if not keep:
                array.delete()
        moved.append(tuple(out))
    start = cache.start if rows is None else cache.start[: len(rows)]
    return cache.replace(k=moved[0], v=moved[1], start=start)
