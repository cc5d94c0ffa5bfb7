"""One `generate` call: the host's side of the slot pool."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rollout.device import KEY_BLOCK, insert, make_knobs, rebase
from jaxrl.rollout.programs import Rows
from jaxrl.rollout.requests import Stats
from jaxrl.types import Completion


class Slots:
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
        values = (self.token, self.used, self.count, self.limit, self.active, self.keys, self.min_count)
        # copies: the device may still read them while the host moves on
        return Rows(*(v.copy() for v in values))


class Run:
    """The state of one `generate` call."""

    def __init__(self, sampler, params, requests, seed, step, sampling, on_tokens, background=0):
        self.s, self.params, self.requests, self.on_tokens = sampler, params, requests, on_tokens
        self.stats = Stats()
        self.limits = [_check(sampler, i, r) for i, r in enumerate(requests)]
        self.knobs, self.kind = make_knobs(sampler, sampling)
        self.needed = len(requests) - background  # requests that must be finished
        order = sorted(
            range(len(requests)),
            key=lambda i: (i >= self.needed, -requests[i].expected, -len(requests[i].prompt), i),
        )
        self.queue = [i for i in order if requests[i].samples > 0]
        self.pending: list[list] = []  # [prompt caches, row, request, next sample]
        self.pieces = [[([], []) for _ in range(r.samples)] for r in requests]
        self.finish = [["partial"] * r.samples for r in requests]
        self.watched = on_tokens is not None or any(r.stop for r in requests)
        self.first_key = np.cumsum([0] + [r.samples for r in requests])
        self.keys = self._keys(seed, step)
        size = next((b for b in sampler.row_sizes if b >= self.first_key[-1]), sampler.slots)
        self.slots = Slots(size)
        self.cache, self.end, self.width = None, 0, 0
        self.record = None  # the last decode call's results, not yet sorted into pieces

    def _keys(self, seed, step):
        samples = [r.samples for r in self.requests]
        problem = np.repeat(np.array([r.key for r in self.requests], np.uint32), samples)
        sample = [r.first_sample + np.arange(r.samples) for r in self.requests]
        sample = np.concatenate([*sample, np.zeros(0)]).astype(np.uint32)
        steps = np.repeat([step if r.step is None else r.step for r in self.requests], samples)
        out = np.zeros((len(problem), 2), np.uint32)
        for value in np.unique(steps):
            rows = np.flatnonzero(steps == value)
            for block in np.split(rows, range(KEY_BLOCK, len(rows), KEY_BLOCK)):
                padded = (np.pad(a[block], (0, KEY_BLOCK - len(block))) for a in (problem, sample))
                keys = self.s.call("keys", (), np.uint32(seed), np.uint32(value), *padded)
                out[block] = np.asarray(keys)[: len(block)]
        return out

    def loop(self):
        while self.unfinished():
            self.refill()
            self.decode()
            self.s.on_progress()

    def unfinished(self) -> bool:
        """Whether a request that must be finished still waits or runs; those come first in the queue."""
        first = [*self.queue[:1], *(p[2] for p in self.pending[:1]), *self.slots.request[self.slots.active]]
        return any(index < self.needed for index in first)

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
        self.make_room(max((c[1][0].shape[2] for _, c, _ in placed), default=0))
        while placed:
            caches = placed[0][1]
            source, chosen = np.zeros(len(self.slots.token), np.int32), np.zeros(len(self.slots.token), bool)
            for slot, _, row in (p for p in placed if p[1] is caches):
                source[slot], chosen[slot] = row, True
            placed = [p for p in placed if p[1] is not caches]
            self.cache = insert(self.s, self.cache, caches, source, chosen, self.end)

    def prefill(self, samples: int) -> int:
        """Prefill the next prompts, enough for `samples` slots; returns how many samples they bring."""
        begin = time.perf_counter()
        sizes, chosen, brought = self.s.prefill_sizes(), [], 0
        while self.queue and brought < samples and len(chosen) < sizes[-1]:
            chosen.append(self.queue.pop(0))
            brought += self.requests[chosen[-1]].samples
        # the last prompt token is left to the first decode step, so that prefill needs no head
        n = next(size for size in sizes if size >= len(chosen))
        P = self.s.prompt_bucket(max(len(self.requests[i].prompt) - 1 for i in chosen))
        while self.queue and len(chosen) < n and len(self.requests[self.queue[0]].prompt) - 1 <= P:
            chosen.append(self.queue.pop(0))  # rows that would be padding
            brought += self.requests[chosen[-1]].samples
        lengths = np.zeros(n, np.int32)
        tokens = np.zeros((n, P), np.int32)
        for row, i in enumerate(chosen):
            prompt = self.requests[i].prompt
            lengths[row] = len(prompt) - 1
            tokens[row, P - lengths[row] :] = prompt[:-1]
        caches = self.s.call("prefill", (n, P), self.params, tokens, lengths)
        self.pending += [[caches, row, i, 0] for row, i in enumerate(chosen)]
        self.stats.prefill_calls += 1
        self.stats.prefill_tokens += int(lengths.sum())
        self.stats.seconds_prefill += time.perf_counter() - begin
        return brought

    def place(self, slot: int, index: int, sample: int):
        r, s = self.requests[index], self.slots
        s.request[slot], s.sample[slot] = index, sample
        s.token[slot], s.used[slot], s.count[slot] = r.prompt[-1], len(r.prompt) - 1, r.done
        s.limit[slot] = r.done + self.limits[index][sample]
        s.min_count[slot] = min(r.min_tokens, s.limit[slot])
        s.keys[slot] = self.keys[self.first_key[index] + sample]

    def shrink(self):
        """With nothing left to place, keep only as many rows as still run."""
        running = np.flatnonzero(self.slots.active)
        size = next((b for b in self.s.row_sizes if b >= len(running)), len(self.slots.token))
        if 0 < len(running) and size < len(self.slots.token):
            rows = np.concatenate([running, np.flatnonzero(~self.slots.active)])[:size].astype(np.int32)
            self.slots.take(rows)
            self.cache = rebase(self.s, self.cache, rows, 0, self.width)
            if self.fit(self.longest() + self.chunk_ahead()) < self.width:
                self.move(0)

    def fit(self, columns: int) -> int:
        return next(w for w in self.s.windows if w >= columns)

    def longest(self) -> int:
        return int(self.slots.used[self.slots.active].max(initial=0))

    def make_room(self, prompt: int):
        """Give the pool a window that fits the longest running row, new prompts, and some steps to come."""
        if self.cache is None:
            self.width, self.end = self.fit(prompt + self.chunk_ahead()), prompt
            sizes = (len(self.slots.token), self.width)
            self.cache = self.s.call("new_cache", sizes, *sizes)
        elif self.width - self.end < min(16, self.chunk_ahead()) or prompt > self.end:
            self.move(prompt)

    def chunk_ahead(self) -> int:
        """Steps to leave room for: a chunk, but no more than the longest response still allowed."""
        left = (self.slots.limit - self.slots.count)[self.slots.active]
        return min(self.s.chunk, max(int(left.max(initial=1)), 1))

    def move(self, prompt: int):
        """Set the clock back as far as the longest running row allows, and fit the window to that.

        Windows change one size at a time, so that few pairs of sizes are ever compiled.
        """
        end = max(self.longest(), prompt)
        shift, sizes = self.end - end, self.s.windows
        at, to = sizes.index(self.width), sizes.index(self.fit(end + self.chunk_ahead()))
        path = [sizes[i] for i in (range(at + 1, to + 1) if to >= at else range(at - 1, to - 1, -1))]
        for hop, window in enumerate(path or [self.width]):
            # columns are dropped before the window shrinks, and added only once it has grown
            now = hop == 0 if shift > 0 else hop == max(len(path) - 1, 0)
            self.cache = rebase(self.s, self.cache, None, shift if now else 0, window)
        self.end, self.width = end, sizes[to]

    def decode(self):
        s, sampler = self.slots, self.s
        begin = time.perf_counter()
        steps = min(sampler.chunk, self.width - self.end)
        refill_at = sampler.refill_at if self.queue or self.pending else self.shrink_at()
        sizes = (len(s.token), self.width, *self.kind)
        self.cache = self.cache.replace(end=jnp.int32(self.end))
        args = (self.params, self.cache, s.arguments(), self.knobs, np.int32(steps), np.int32(refill_at))
        self.cache, *out = sampler.call("decode", sizes, *args)
        self.sort()  # the last call's tokens, while this one runs
        tokens, logps, emitted = jax.device_get(out)
        ran = int(emitted.max(initial=0))
        self.end += ran
        self.stats.decode_calls += 1
        self.stats.steps += ran
        self.stats.slot_steps += ran * len(s.token)
        self.stats.seconds_decode += time.perf_counter() - begin
        self.record = (s.request.copy(), s.sample.copy(), emitted, tokens, logps)
        rows = np.flatnonzero(s.active)
        s.count[rows] += emitted[rows]
        s.used[rows] += emitted[rows]
        s.token[rows] = tokens[emitted[rows] - 1, rows]
        ended = np.isin(s.token[rows], sampler.eos)
        for slot in rows[ended]:
            self.finish[s.request[slot]][s.sample[slot]] = "eos"
        cut = ~ended & (s.count[rows] >= s.limit[rows])
        for slot in rows[cut]:
            self.finish[s.request[slot]][s.sample[slot]] = "length"
        over = ended | cut
        if self.watched:
            over |= self.watch(rows)
        s.request[rows[over]], s.used[rows[over]] = -1, 0

    def sort(self):
        """Append the tokens of the last decode call to their completions."""
        if self.record is None:
            return
        (request, sample, emitted, tokens, logps), self.record = self.record, None
        for slot in np.flatnonzero(request >= 0):
            n = emitted[slot]
            pieces = self.pieces[request[slot]][sample[slot]]
            pieces[0].append(tokens[:n, slot])
            pieces[1].append(logps[:n, slot])
            self.stats.tokens += int(n)

    def watch(self, rows):
        """Stop sequences and the caller's callback; bool per row, True where the completion ends here."""
        s, over = self.slots, np.zeros(len(rows), bool)
        self.sort()
        for j, slot in enumerate(rows):
            index, sample = int(s.request[slot]), int(s.sample[slot])
            pieces = self.pieces[index][sample]
            new = len(pieces[0][-1])
            request = self.requests[index]
            begun = request.prompt[len(request.prompt) - request.done :]  # a stop sequence may lie across the cut
            tokens = np.concatenate([begun, *pieces[0]])
            cut = _first_stop(tokens, new, request.stop)
            if cut is not None:
                drop = len(tokens) - cut
                for part in pieces:
                    part[-1] = part[-1][: new - drop]
                self.stats.tokens -= int(drop)
            stop = self.on_tokens is not None and self.on_tokens(index, sample, pieces[0][-1])
            if cut is not None or stop:
                ends_with_eos = len(pieces[0][-1]) and pieces[0][-1][-1] in self.s.eos
                self.finish[index][sample] = "eos" if ends_with_eos else "stop"
                over[j] = True
        return over

    def shrink_at(self) -> int:
        """Finished rows after which a smaller pool is worth a copy; more than there are means never."""
        running = int(self.slots.active.sum())
        smaller = [b for b in self.s.row_sizes if b < len(self.slots.token)]
        return running - smaller[-1] if smaller and running > smaller[-1] else running + 1

    def results(self) -> list[list[Completion]]:
        self.sort()

        def join(parts, dtype):
            return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)

        return [
            [
                Completion(join(tokens, np.int32), join(logps, np.float32), finish)
                for (tokens, logps), finish in zip(pieces, finishes, strict=True)
            ]
            for pieces, finishes in zip(self.pieces, self.finish, strict=True)
        ]


def _check(sampler, i: int, r) -> np.ndarray:
    """The limits of request i. Raises ValueError naming it."""
    limits = r.limits
    low, high = (limits.min(), limits.max()) if len(limits) else (1, 1)
    given, most = len(r.prompt) - r.done, sampler.max_tokens - r.done
    if not 1 <= given <= sampler.max_prompt or not 1 <= low <= high <= most:
        begun = f", {r.done} of them drawn already" if r.done else ""
        raise ValueError(
            f"request {i}: prompt of {len(r.prompt)}{begun} and limit of {low if low < 1 else high} tokens; the "
            f"sampler takes prompts of 1..{sampler.max_prompt} and limits of 1..{most}"
        )
    tokens = np.asarray(r.prompt)
    if tokens.min() < 0 or tokens.max() >= sampler.config.vocab_size:
        raise ValueError(
            f"request {i}: prompt tokens outside the vocabulary, 0..{sampler.config.vocab_size - 1}"
        )
    if any(len(stop) == 0 for stop in r.stop):
        raise ValueError(f"request {i}: an empty stop sequence")
    return limits


def _first_stop(tokens, new: int, stops) -> int | None:
    """Length of the completion up to the end of the first stop sequence that ends in its last `new` tokens."""
    ends = []
    for stop in stops:
        first = max(len(tokens) - new - len(stop) + 1, 0)
        for at in range(first, len(tokens) - len(stop) + 1):
            if tuple(tokens[at : at + len(stop)]) == tuple(stop):
                ends.append(at + len(stop))
                break
    return min(ends, default=None)
