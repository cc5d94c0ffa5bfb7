"""Any page size, slots, replicas, capacity, group size, order and cancelling: a NumPy model of the device checks that
every row reads exactly its own tokens through its table, and that every response comes out whole."""

import jax
import numpy as np
import pytest

from jaxrl.rollout.engine import Request
from jaxrl.rollout.paged import WRITES, PagedCache
from tests.rollout import tiny


def token(problem: int, sample: int, count: int) -> int:
    """What a model of no weights draws: EOS about one time in twenty."""
    x = np.random.default_rng([problem, sample, count]).integers(8, 200)
    return tiny.EOS[0] if x % 20 == 0 else int(x)


class Device:
    """Stands in for the Runner: pages hold tokens, and decoding looks at all of a row's."""

    def __init__(self, requests: dict[int, Request], replicas: int, page: int, chunk: int):
        self.requests, self.replicas, self.page, self.chunk = requests, replicas, page, chunk

    def call(self, name, sizes, *args, **keywords):
        return getattr(self, name)(*args, **keywords)

    def keys(self, seed, step, problem, sample):
        return np.stack([problem, sample], axis=1).astype(np.uint32)

    def new_pages(self, count, local):
        self.pool = np.full((self.replicas, count // self.replicas, self.page), -1)
        return (None,)

    def prefill(self, params, tokens, lengths, arrays, *, first, size):
        old = np.full_like(tokens, -2) if arrays is None else arrays[0]
        assert np.all(old[:, first:] == -2) and np.all(old[:, :first] != -2)  # parts come in their order, once
        old[:, first : first + size] = tokens[:, first : first + size]
        return old, (old,)

    def write_pages(self, arrays, prompts, writes, local):
        for i, (row, at, to) in enumerate(zip(*writes, strict=True)):
            taken = prompts[0][row, at : at + self.page]
            self.pool[i // WRITES, to, : len(taken)] = taken
        return arrays

    def decode(self, params, cache, rows, settings, steps, refill_at):
        table, B = cache.table, len(rows.used)
        tokens, emitted = np.zeros((self.chunk, B), np.int32), np.zeros(B, np.int32)
        logps, own = np.zeros((self.chunk, B), np.float32), []
        for b in np.flatnonzero(rows.active):
            pool, (problem, sample) = self.pool[b * self.replicas // B], map(int, rows.keys[b])
            prompt, count = self.requests[problem].prompt, int(rows.count[b])
            whole = [*prompt, *(token(problem, sample, c) for c in range(count))]
            seen = pool[table[b]].ravel()[: rows.used[b]]
            np.testing.assert_array_equal(seen, whole[: rows.used[b]])
            assert rows.used[b] == len(whole) - 1 and rows.token[b] == whole[-1]
            for i in range(min(int(steps), rows.limit[b] - count)):
                position = rows.used[b] + i
                page = table[b, position // self.page]
                assert page > 0
                own.append((b * self.replicas // B, int(page), int(b)))
                pool[page, position % self.page] = whole[-1]
                whole.append(token(problem, sample, count + i))
                tokens[i, b], emitted[b] = whole[-1], i + 1
                if whole[-1] in tiny.EOS:
                    break
        writers = dict.fromkeys(own)
        assert len({(replica, page) for replica, page, _ in writers}) == len(writers)  # nobody writes another's page
        return cache, tokens, logps, emitted, {}


@pytest.mark.parametrize("seed", range(12))
def test_every_response_comes_out_whole_whatever_the_pages(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    replicas, page, chunk = int(rng.integers(1, 4)), int(rng.integers(1, 20)), int(rng.integers(1, 12))
    slots = replicas * int(rng.integers(1, 9))
    most = -(-(tiny.MAX_PROMPT + tiny.MAX_TOKENS) // page)
    capacity = int(rng.integers(most, 3 * most)) * page * replicas
    requests = {
        key: Request(rng.integers(8, 200, rng.integers(1, 41)).astype(np.int32), int(rng.integers(1, 9)),
                     int(rng.integers(1, 25)), key, expected=float(rng.integers(3)))
        for key in range(10)
    }
    engine = tiny.sampler(slots=slots, chunk=chunk, pages=page)
    device = Device(requests, replicas, page, chunk)
    sizes = dict(slots=slots, multiple=replicas, max_prompt=tiny.MAX_PROMPT, max_tokens=tiny.MAX_TOKENS, chunk=chunk)
    sizes["prefill_chunk"] = int(rng.choice([0, 5, 16, 40]))
    engine.runner, engine.cache = device, PagedCache(device, **sizes, window=16, page=page, tokens=capacity)
    monkeypatch.setattr(jax, "device_get", lambda tree: tree)
    tickets = {engine.submit(r, background=key > 7): key for key, r in requests.items()}
    gone = {int(rng.integers(10)): int(rng.integers(1, 5))}  # one is cancelled, after so many steps
    done, steps = {}, 0
    while engine.busy:
        steps += 1
        for event in engine.step(None):
            if event.completion is not None:
                done[tickets[event.ticket], event.sample] = event.completion
        for ticket in [t for t, key in tickets.items() if gone.get(key) == steps]:
            for sample, part in engine.cancel(ticket).items():
                done[tickets[ticket], sample] = part
    assert len(done) == sum(r.samples for r in requests.values())
    for (key, sample), completion in done.items():
        expected = [token(key, sample, c) for c in range(requests[key].max_tokens)]
        ends = [i + 1 for i, t in enumerate(expected) if t in tiny.EOS]
        whole = expected[: ends[0]] if ends else expected
        part = completion.finish == "partial"
        assert completion.tokens.tolist() == (whole[: completion.length] if part else whole)
    assert all(len(pool.free) == engine.cache.pages - 1 for pool in engine.cache.pools)
