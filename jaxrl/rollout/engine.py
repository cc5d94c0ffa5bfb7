"""Continuous batching: a pool of decode slots that the host harvests and refills.

Each distinct prompt is prefilled once and its cache copied into the slots of its samples. A decode call
runs until enough slots have finished to be worth refilling. When the queue is empty the pool shrinks, and
the attended window always follows the longest answer still running, so short answers never pay for long ones.
This file holds what callers use; one call's pool is in pool.py, its device operations in device.py.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rollout.device import KEY_BLOCK, bucket, idle_rows, insert, make_knobs, rebase
from jaxrl.rollout.placement import Placement
from jaxrl.rollout.pool import Run
from jaxrl.rollout.programs import SamplerPrograms, sampler_programs
from jaxrl.rollout.requests import Request, SamplingParams, Stats
from jaxrl.runtime import compiles
from jaxrl.types import Completion
from models.config import DecoderConfig
from models.layout import sampling_layout

log = logging.getLogger(__name__)


class Engine:
    """Samples completions from a decoder.

    Args:
      config: the decoder. eos_ids: end tokens. max_prompt, max_tokens: the longest prompt and response that
        will be asked for. slots: rows decoded together. chunk: most decode steps between two looks at the
        pool. dtype: compute dtype. window: granularity of the attended length.
      refill: share of the slots that must be free before a decode call returns early to refill them.
      placement: the chips to use when there are several (jaxrl.rollout.placement); slots must divide over them.
      weights, cache: "same" as dtype, or "int8": matrices, keys and values of one byte an entry
        (models.layout.quantise).

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
        weights: str = "same",
        cache: str = "same",
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
        self.programs: SamplerPrograms = sampler_programs(
            config, dtype, chunk, attention, where, platform, jnp.int8 if cache == "int8" else None
        )
        self._layout = jax.jit(
            lambda p: sampling_layout(p, config, dtype, fused, platform == "cpu", weights == "int8"),
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
        sampling: SamplingParams | None = None,
        on_tokens: Callable[[int, int, np.ndarray], bool | None] | None = None,
        background: int = 0,
    ) -> list[list[Completion]]:
        """Completions of every request, in order.

        Args:
          params: from `layout`. seed, step: with Request.key, the sample index and the position they make
            the random key of each token, so the result depends on neither slots, chunk nor request order.
          on_tokens: called as f(request index, sample index, new tokens) after each decode call; returning
            True stops that completion there (finish "stop").
          background: the last so many requests only fill slots that idle while the others finish. What is undone
            then has finish "partial", perhaps without any token; how far it got depends on slots and chunk.

        Returns:
          One list of `samples` completions per request. `self.stats` holds the counts of this call.

        Raises:
          ValueError: a prompt, limit, stop sequence or bias that the sampler cannot take, naming the request.
        """
        begin = time.perf_counter()
        run = Run(self, params, requests, seed, step, sampling or SamplingParams(), on_tokens, background)
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
        samplings: Sequence[SamplingParams] = (SamplingParams(),),
        continued: bool = False,
    ) -> float:
        """Compile every shape that calls for `slots` completions or more can need; afterwards a compile is a logged
        warning.

        Args:
          params: from `layout`. samplings: the settings to expect; whether one truncates or biases selects the
            decode program. continued: requests with tokens drawn earlier will come, too.

        Returns: seconds it took; `self.shapes` says for what.
        """
        begin = time.perf_counter()
        knobs = {kind: values for values, kind in (make_knobs(self, s) for s in samplings)}
        longest = self.max_prompt + (self.max_tokens if continued else 0)
        prompts = sorted({self.prompt_bucket(n) for n in range(longest)})
        zeros = np.zeros(KEY_BLOCK, np.uint32)
        self.call("keys", (), np.uint32(0), np.uint32(0), zeros, zeros)
        caches = [
            self.call("prefill", (n, P), params, np.zeros((n, P), np.int32), np.zeros(n, np.int32))
            for P in prompts
            for n in self.prefill_sizes()
        ]
        for smaller, rows in enumerate(self.row_sizes):
            for i, window in enumerate(self.windows):
                cache = self.call("new_cache", (rows, window), rows, window)
                if rows == self.row_sizes[-1]:
                    for prompt in caches:
                        if prompt[1][0].shape[2] <= window:
                            none = np.zeros(rows, np.int32)
                            cache = insert(self, cache, prompt, none, none > 0, prompt[1][0].shape[2])
                for other in self.windows[max(i - 1, 0) : i + 2]:
                    rebase(self, cache, None, 0, other, keep=True)
                for fewer in self.row_sizes[:smaller]:
                    rebase(self, cache, np.arange(fewer, dtype=np.int32), 0, window, keep=True)
                for kind, values in knobs.items():
                    args = (params, cache, idle_rows(rows), values, np.int32(0), np.int32(1))
                    cache, *_ = self.call("decode", (rows, window, *kind), *args)
        self.warm = True
        return time.perf_counter() - begin

    def prompt_bucket(self, length: int) -> int:
        """Columns a prompt of `length` cached tokens is padded to; always leaves the pool room to decode."""
        return min(bucket(length, 32), self.windows[-1] - min(self.chunk, self.max_tokens))

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
            with compiles.program(name, *sizes):
                out = jax.block_until_ready(program(*args, **kwargs))
        self.shapes[key] = time.perf_counter() - begin
        if self.warm:
            log.warning("sampler: compiled %s %s in %.1f s", name, sizes, self.shapes[key])
        return out
