"""Continuous batching: slots that decode together, harvested and refilled between decode calls.

    ticket = engine.submit(request)          any time, also between steps
    for event in engine.step(params): ...    new tokens, finished responses
    engine.cancel(ticket)                    returns what was drawn so far, frees the slots

Each distinct prompt is prefilled once and its cache copied into the slots of its samples. A decode call runs until
enough slots have finished to be worth refilling. When no request waits, the number of slots shrinks with the number of
running responses. A token depends only on (seed, step, problem, sample, position), not on when it was requested.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rollout.cache import DenseCache, KVCache, bucket
from jaxrl.rollout.kernels import SamplingArrays
from jaxrl.rollout.paged import PagedCache
from jaxrl.rollout.placement import Placement
from jaxrl.rollout.programs import Runner, SamplerPrograms, program_spec, sampler_programs
from jaxrl.rollout.requests import Event, Request, SamplingParams, Stats, check_request, first_stop
from jaxrl.rollout.slots import Slots, sampling_arrays
from jaxrl.rollout.waiting import Start, Waiting
from jaxrl.types import Completion, concat_columns
from models.config import DecoderConfig
from models.cpu import LARGE
from models.layout import sampling_layout
from models.pages import implementation, local_window

REFILL = 0.125  # share of the slots that must be free before a decode call returns early to refill them


@dataclasses.dataclass
class _Job:
    """A request with open samples. drawn: open sample -> pieces (see `_record`). keys: uint32 [samples, 2]."""

    request: Request
    seed: int
    step: int
    drawn: dict[int, list[dict]]
    background: bool
    keys: np.ndarray | None = None


class Engine:
    """Samples completions from a decoder.

    Args:
      config: the decoder. eos_ids: EOS tokens. max_prompt, max_tokens: the longest prompt and response that
        will be asked for. slots: rows decoded together. chunk: maximum decode steps of one call of `step`.
        dtype: compute dtype. window: granularity of the attended length.
      placement: the chips to use when there are several (jaxrl.rollout.placement); slots must be a multiple of the
        replicas on this host.
      weights, cache: "same" (stored in dtype) or "int8": weight matrices, or keys and values, with one byte per entry
        (models.layout.quantise).
      prefill_chunk: prompt tokens that one prefill call caches, with decode calls in between; 0: the whole prompt.
      pages: tokens per page of the cache; 0: a dense cache. cache_tokens: tokens that all pages hold together; 0: room
        for `slots` responses of full length.
      allowed: bool [V], tokens that may be drawn, None for all (jaxrl.rollout.requests.decodable).
      record: what completions store for each token in `columns` (jaxrl.rollout.kernels.ProgramSpec).

    Raises ValueError if the sizes do not fit together.
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
        prefill_chunk: int = 2048,
        dtype=jnp.float32,
        window: int = 64,
        placement: Placement | None = None,
        weights: str = "same",
        cache: str = "same",
        pages: int = 0,
        cache_tokens: int = 0,
        allowed: np.ndarray | None = None,
        record: tuple[str, ...] = (),
    ):
        sizes = dict(max_prompt=max_prompt, max_tokens=max_tokens, slots=slots, chunk=chunk)
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        multiple = placement.row_multiple if placement else 1
        if slots % multiple:
            raise ValueError(f"slots={slots} must be a multiple of {multiple}, the replicas on this host")
        self.config, self.slots, self.chunk, self.allowed = config, slots, chunk, allowed
        self.max_prompt, self.max_tokens, self.placement = max_prompt, max_tokens, placement
        self.eos = np.array(sorted(set(eos_ids)), np.int32)
        kinds = dict(int8_cache=cache == "int8", pages=pages, record=record)
        self.spec = spec = program_spec(config, dtype, chunk, placement, **kinds)
        self.programs: SamplerPrograms = sampler_programs(spec)
        self.runner = Runner(self.programs, placement)
        sizes |= dict(multiple=multiple, window=window, prefill_chunk=prefill_chunk)
        if pages:
            parts = placement.mesh.shape["tensor"] if placement else 1
            how = implementation(spec.platform, config, pages, cache == "int8", parts)
            sizes |= dict(page=pages, tokens=cache_tokens, implementation=how, local=local_window(config))
        self.cache: KVCache = (PagedCache if pages else DenseCache)(self.runner, **sizes)
        fused = placement.fused if placement else True
        on_cpu = spec.platform == "cpu"
        alone = on_cpu and not placement and dtype == jnp.float32 and not config.narrow
        form = dict(untie=on_cpu, int8=weights == "int8", transpose_from=LARGE if alone else 0)
        self._layout = jax.jit(
            lambda p: sampling_layout(p, config, dtype, fused, **form),
            out_shardings=placement.cast_where_they_lie(config) if placement else None,
        )
        self.stats = Stats()
        self.on_progress: Callable[[], object] = lambda: None  # called after every step
        self._rows = Slots(0)
        self._jobs: dict[int, _Job] = {}
        self._waiting = Waiting()
        self._keyless: list[_Job] = []
        self._tickets = self._born = 0
        self._settings: tuple = (None, None, None)  # the last SamplingParams, as arrays, and their program

    @property
    def shapes(self) -> dict[tuple, float]:
        """(program, sizes) -> seconds of its first call."""
        return self.runner.shapes

    @property
    def busy(self) -> bool:
        """Whether any ticket has open samples."""
        return bool(self._jobs)

    def layout(self, params):
        """Training parameters -> sampling parameters; once per rollout phase."""
        params = self._layout(params)
        return self.placement.fetch(params, self.config) if self.placement else params

    # ---- submit, step, cancel

    def submit(self, request: Request, *, seed: int = 0, step: int = 0, background: bool = False) -> int:
        """Take a request in; its samples start at one of the next steps. Returns the ticket that events will name.

        seed, step: with Request.key, sample index and position, they determine the random key of each token.
        background: its samples start only in slots that no other request needs.
        Raises ValueError for a prompt, limit or stop sequence that the sampler cannot take.
        """
        check_request(request, self.config.vocab_size, self.max_prompt, self.max_tokens)
        ticket, self._tickets = self._tickets, self._tickets + 1
        if request.samples:
            step = step if request.step is None else request.step
            drawn = {sample: [] for sample in range(request.samples)}
            self._jobs[ticket] = job = _Job(request, seed, step, drawn, background)
            self._keyless.append(job)
            self._waiting.add(Start(ticket, request.prompt, list(drawn)), (background, -request.expected))
        return ticket

    def step(self, params, sampling: SamplingParams | None = None) -> list[Event]:
        """One round: free slots are filled, and one decode call runs in all of them.

        params: from `layout`. sampling: the settings for all tokens drawn in this step. Returns an event for each
        running sample.
        Raises ValueError for a bias that does not fit the vocabulary.
        """
        settings, kind = self._sampling_arrays(sampling or SamplingParams())
        if not self._jobs:
            return []
        self._make_keys()
        self._admit(params)
        self._give_way()
        events = self._decode(params, settings, kind)
        self.on_progress()
        return events

    def cancel(self, ticket: int, sample: int | None = None) -> dict[int, Completion]:
        """Stop a ticket, or one sample of it: nothing more is drawn, and the slots are free at the next step.

        Returns a completion with finish "partial" for each unfinished sample; it may have no tokens.
        """
        job = self._jobs.get(ticket)
        if job is None:
            return {}
        stopped = [s for s in job.drawn if sample in (None, s)]
        rows = self._rows
        self._free(np.flatnonzero((rows.ticket == ticket) & np.isin(rows.sample, stopped)))
        out = {s: self._close(ticket, s, "partial") for s in stopped}
        self._waiting.remove(ticket, stopped)
        return out

    def _close(self, ticket: int, sample: int, finish: str) -> Completion:
        """End a sample and return its completion. The cache is freed when no sample is open any more."""
        job = self._jobs[ticket]
        pieces = [dict(tokens=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32)), *job.drawn.pop(sample)]
        if not job.drawn:
            del self._jobs[ticket]
        if not self._jobs:
            self._rows = Slots(0)
            self.cache.clear()
        columns = concat_columns([(p, len(p["tokens"])) for p in pieces])
        return Completion(columns.pop("tokens"), columns.pop("logprobs"), finish, columns=columns)

    def _free(self, rows: np.ndarray) -> None:
        self._rows.free(rows)
        self.cache.release(rows)

    # ---- what a step consists of

    def _sampling_arrays(self, sampling: SamplingParams) -> tuple[SamplingArrays, tuple[str, ...]]:
        """The settings as arrays, and which decode program they need: () or some of "truncated", "biased"."""
        if self._settings[0] is not sampling:
            self._settings = (sampling, *sampling_arrays(sampling, self.eos, self.config.vocab_size, self.allowed))
        return self._settings[1:]

    def _make_keys(self) -> None:
        """Random keys of all samples submitted since the last step."""
        jobs, self._keyless = self._keyless, []
        if not jobs:
            return
        samples = [job.request.samples for job in jobs]
        problem = np.repeat(np.array([job.request.key for job in jobs], np.uint32), samples)
        sample = [job.request.first_sample + np.arange(job.request.samples) for job in jobs]
        sample = np.concatenate(sample).astype(np.uint32)
        seed, step = (np.repeat([getattr(job, name) for job in jobs], samples) for name in ("seed", "step"))
        keys = self.runner.keys(seed, step, problem, sample)
        for job, own in zip(jobs, np.split(keys, np.cumsum(samples)[:-1]), strict=True):
            job.keys = own

    def _admit(self, params) -> None:
        """Fill free slots from prefilled prompts, and prefill more prompts where these are too few.

        Running rows do not wait for a long prompt: they decode again after one chunk of it is cached, and the next
        step caches the next chunk.
        """
        self._fit_slots()
        free = np.flatnonzero(~self._rows.active).tolist()
        placed = self._place(free)
        while free and self._prefill(params, len(free)):
            placed += self._place(free)
            if self._waiting.prefilling and self._rows.active.any():
                break
        self.cache.admit(self._rows.longest(), self._rows.steps_left(self.chunk), placed)

    def _give_way(self) -> None:
        """If the cache has no room for all responses, stop the youngest. Their tokens are kept, and they resume when
        there is room again."""
        rows = self._rows
        for slot in self.cache.room(rows.used, rows.limit - rows.count, rows.born):
            ticket, sample = int(rows.ticket[slot]), int(rows.sample[slot])
            job = self._jobs[ticket]
            tokens = np.concatenate([job.request.prompt, *(p["tokens"] for p in job.drawn[sample])]).astype(np.int32)
            rows.free(slot)
            self._waiting.add(Start(ticket, tokens, [sample]), (job.background, -math.inf))
            self.stats.waits += 1

    def _fit_slots(self) -> None:
        """Fit the number of rows to the running and waiting samples. It shrinks only when nothing waits."""
        running = np.flatnonzero(self._rows.active)
        have = len(self._rows)
        if self._waiting:
            if have == self.slots:
                return
            needed = len(running) + self._waiting.samples
        else:
            needed = len(running)
        size = next((size for size in self.cache.row_sizes if size >= needed), self.slots)
        if have == 0:
            self._rows = Slots(size)
            self.cache.begin(size)
        elif size > have or (size < have and not self._waiting):
            free = np.flatnonzero(~self._rows.active)
            rows = np.concatenate([running, free, np.zeros(max(size - have, 0), np.int64)])[:size].astype(np.int32)
            self._rows.take(rows)
            self._rows.free(slice(len(running), None))
            self.cache.take(rows, self._rows.longest(), self._rows.steps_left(self.chunk))

    def _prefill(self, params, samples: int) -> bool:
        """Prefill one chunk of the next prompts, which are enough for `samples` slots; False if nothing is to do."""
        begin, waiting = time.perf_counter(), self._waiting
        if not waiting.prefilling:
            if waiting.prefilled or not waiting.next or not self.cache.fits([waiting.next.cached]):
                return False
            chosen = waiting.choose(samples, self.cache)
            for start, prefix in zip(chosen, self.cache.prefill([s.tokens[:-1] for s in chosen]), strict=True):
                start.prefix = prefix
            self.stats.prefill_tokens += sum(start.cached for start in chosen)
        if waiting.prefilling[0].prefix.call.advance(params):
            waiting.prefilled, waiting.prefilling = waiting.prefilled + waiting.prefilling, []
        self.stats.prefill_calls += 1
        self.stats.seconds_prefill += time.perf_counter() - begin
        return True

    def _place(self, free: list[int]) -> list[tuple[int, Any]]:
        """Assign slots to the next samples and remove them from `free`. Returns (slot, prefilled prompt) pairs."""
        placed, prefilled = [], self._waiting.prefilled
        for slot in list(free):
            if not prefilled or not self.cache.reserve(slot, prefilled[0].prefix):
                continue  # another replica may have room
            start = prefilled[0]
            sample, job = start.samples.pop(0), self._jobs[start.ticket]
            self._born += 1
            born = self._born + (job.background << 60)  # background samples give way first
            self._rows.fill(slot, start.ticket, sample, job.request, start.tokens, keys=job.keys[sample], born=born)
            placed.append((slot, start.prefix))
            free.remove(slot)
            if not start.samples:
                prefilled.pop(0)
        return placed

    def _decode(self, params, settings: SamplingArrays, kind: tuple) -> list[Event]:
        """Run one decode call; returns an event for each running sample."""
        rows, begin = self._rows, time.perf_counter()
        refill_at = max(1, round(REFILL * self.slots)) if self._waiting else self._shrink_at()
        tokens, logprobs, emitted, columns = self.cache.decode(params, rows.arguments(), settings, kind, refill_at)
        steps = int(emitted.max(initial=0))
        self.stats.decode_calls += 1
        self.stats.steps += steps
        self.stats.slot_steps += steps * len(rows)
        self.stats.seconds_decode += time.perf_counter() - begin
        running = np.flatnonzero(rows.active)
        rows.advance(running, tokens, emitted)
        ended = np.isin(rows.token[running], self.eos)
        full = rows.count[running] >= rows.limit[running]
        finishes = np.where(ended, "eos", np.where(full, "length", ""))
        drawn = dict(tokens=tokens, logprobs=logprobs, **columns)
        return [
            self._record(slot, {name: values[: emitted[slot], slot] for name, values in drawn.items()}, str(finish))
            for slot, finish in zip(running, finishes, strict=True)
        ]

    def _record(self, slot: int, piece: dict[str, np.ndarray], finish: str) -> Event:
        """Keep what a slot drew (names as in Completion), up to a stop sequence; free the slot if its sample ended."""
        ticket, sample = int(self._rows.ticket[slot]), int(self._rows.sample[slot])
        job = self._jobs[ticket]
        pieces = job.drawn[sample]
        if job.request.stop:
            prompt = job.request.prompt
            begun = prompt[len(prompt) - job.request.done :]  # a stop sequence may begin in the earlier part
            whole = np.concatenate([begun, *(old["tokens"] for old in (*pieces, piece))])
            end = first_stop(whole, len(piece["tokens"]), job.request.stop)
            if end is not None:
                kept = len(piece["tokens"]) - (len(whole) - end)
                piece = {name: values[:kept] for name, values in piece.items()}
                finish = "eos" if piece["tokens"][-1] in self.eos else "stop"
        pieces.append(piece)
        self.stats.tokens += len(piece["tokens"])
        completion = None
        if finish:
            self._free(np.array([slot]))
            completion = self._close(ticket, sample, finish)
        return Event(ticket, sample, piece["tokens"], piece["logprobs"], completion)

    def _shrink_at(self) -> int:
        """After how many finished rows to copy the rest into fewer slots; running + 1 means never."""
        running = int(self._rows.active.sum())
        smaller = [size for size in self.cache.row_sizes if size < len(self._rows)]
        return running - smaller[-1] if smaller and running > smaller[-1] else running + 1

    # ---- built on submit, step and cancel

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
          params: from `layout`. seed, step: see `submit`; the result depends on neither slots, chunk nor the order of
            requests.
          on_tokens: called as f(request index, sample index, new tokens) after each decode call; returning
            True stops that completion there (finish "stop").
          background: so many requests at the end of the list only fill slots that idle while the others finish. Their
            unfinished samples then have finish "partial", perhaps no tokens; how many depends on slots and chunk.

        Returns:
          One list of `samples` completions per request. `self.stats` holds the counts of this call.

        Raises:
          ValueError: a prompt, limit, stop sequence or bias that the sampler cannot take, naming the request; or
            submitted requests are still open, whose events would be lost.
        """
        if self._jobs:
            raise ValueError(f"generate: {len(self._jobs)} submitted requests are open; step or cancel them first")
        begin, self.stats = time.perf_counter(), Stats()
        sampling, needed = sampling or SamplingParams(), len(requests) - background
        open_, index_of = sum(r.samples for r in requests[:needed]), {}
        out: list[list] = [[None] * r.samples for r in requests]
        try:
            for index, request in enumerate(requests):
                try:
                    index_of[self.submit(request, seed=seed, step=step, background=index >= needed)] = index
                except ValueError as e:
                    raise ValueError(f"request {index}: {e}") from None
            while open_:
                for event in self.step(params, sampling):
                    index, completion = index_of[event.ticket], event.completion
                    if on_tokens is not None and on_tokens(index, event.sample, event.tokens):
                        completion = completion or self.cancel(event.ticket, event.sample)[event.sample]
                        if completion.finish != "eos":
                            completion = dataclasses.replace(completion, finish="stop")
                    if completion is not None:
                        out[index][event.sample] = completion
                        open_ -= index < needed
        finally:
            for ticket, index in index_of.items():
                for sample, completion in self.cancel(ticket).items():
                    out[index][sample] = completion
        self.stats.seconds_total = time.perf_counter() - begin
        return out

    def prompt_logprobs(self, params, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probability of each prompt token except the first, at temperature 1; float32 [p - 1] per prompt."""
        out = []
        for prompt in prompts:
            padded = np.zeros((1, bucket(len(prompt), 32)), np.int32)
            padded[0, : len(prompt)] = prompt
            logps = self.runner.call("score", padded.shape, params, padded)
            out.append(np.asarray(logps)[0, : len(prompt) - 1])
        return out

    def warmup(self, params, samplings: Sequence[SamplingParams] = (SamplingParams(),),
               continued: bool = False) -> float:
        """Compile every shape that `slots` or more completions can need. Any later compile is logged as a warning.

        Args:
          params: from `layout`. samplings: the settings to expect; truncation and bias have decode programs of their
            own. continued: also expect requests that continue earlier ones (Request.done).

        Returns: seconds it took; `self.shapes` has the seconds per shape.
        """
        begin = time.perf_counter()
        self.runner.keys(*np.zeros((4, 1), np.uint32))
        settings = {kind: arrays for arrays, kind in map(self._sampling_arrays, samplings)}
        self.cache.warmup(params, settings, self.max_prompt + (self.max_tokens if continued else 0))
        self.runner.warm = True
        return time.perf_counter() - begin
