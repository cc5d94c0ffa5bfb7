"""The paged cache: the completions of the dense one for any page, schedule and capacity; pages are never lost."""

import dataclasses

import numpy as np
import pytest

from jaxrl.errors import UserError
from jaxrl.rollout.engine import Engine
from models.config import LayerKind
from tests.rollout import tiny
from tests.rollout.test_engine import baseline
from tests.rollout.test_steps import drain, same


def paged(**options):
    engine = tiny.sampler(**(dict(chunk=8, pages=8) | options))
    return engine, engine.layout(tiny.params())


def watch(engine: Engine) -> list[int]:
    """Checks before every decode call that no page has two owners but a prompt's; returns the pages in use then."""
    cache, decode, in_use = engine.cache, engine.cache.decode, []

    def checked(params, rows, *args):
        for replica, pool in enumerate(cache.pools):
            own = [cache.table[r, : cache.held[r]] for r in range(cache.rows) if cache._replica(r) == replica]
            held = np.bincount(np.concatenate(own), minlength=cache.pages)
            np.testing.assert_array_equal(held, pool.holders)
            assert held[0] == 0 and sorted([*np.flatnonzero(held), *pool.free]) == list(range(1, cache.pages))
        for r in np.flatnonzero(rows.active):  # what a row writes to is its own
            assert cache.pools[cache._replica(r)].holders[cache.table[r, rows.used[r] // cache.page]] == 1
        in_use.append(int(sum((pool.holders > 0).sum() for pool in cache.pools)))
        return decode(params, rows, *args)

    cache.decode = checked
    return in_use


@pytest.mark.parametrize(
    "options",
    [
        dict(pages=8, window=32),
        pytest.param(dict(pages=1, slots=3, chunk=5), marks=pytest.mark.slow),
        pytest.param(dict(pages=64, slots=1, chunk=24, cache_tokens=64), marks=pytest.mark.slow),  # one whole response
        dict(pages=3, slots=16, cache_tokens=90, chunk=7),
        dict(pages=5, slots=4, cache_tokens=90, chunk=7, prefill_chunk=12),
    ],
    ids=str,
)
def test_same_completions_as_the_dense_cache(options):
    engine, params = paged(**options)
    watch(engine)
    tiny.same(engine.generate(params, tiny.requests(), seed=11), baseline())
    assert engine.stats.tokens == sum(c.length for group in baseline() for c in group)


WINDOWED = dataclasses.replace(tiny.CONFIG, layer_kinds=(LayerKind(1e4, window=9), LayerKind(1e4)))


def windowed(**options):
    sizes = dict(max_prompt=tiny.MAX_PROMPT, max_tokens=tiny.MAX_TOKENS, slots=8)
    engine = Engine(WINDOWED, tiny.EOS, **sizes | options)
    return engine, engine.layout(tiny.params())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(pages=4, chunk=8, window=32), marks=pytest.mark.slow),
        pytest.param(dict(pages=1, slots=3, chunk=5), marks=pytest.mark.slow),
        dict(pages=3, slots=16, cache_tokens=90, chunk=7, prefill_chunk=12),  # rows that wait come back
        dict(pages=8, cache="int8", chunk=8, window=32),
        dict(pages=64, chunk=24),  # a ring that holds everything
    ],
    ids=str,
)
def test_layers_with_a_window_hold_no_more_and_say_the_same(options):
    dense, params = windowed(chunk=8, window=32, cache=options.get("cache", "same"))
    expected = dense.generate(params, tiny.requests(), seed=11)
    assert any(not np.array_equal(a.tokens, b.tokens) for x, y in zip(expected, baseline(), strict=True)
               for a, b in zip(x, y, strict=True))  # the window matters
    engine, params = windowed(**options)
    watch(engine)
    sizes, new_pages = [], engine.runner.programs.new_pages
    engine.runner.programs = engine.runner.programs._replace(
        new_pages=lambda *counts: sizes.append(counts) or new_pages(*counts))
    tiny.same(engine.generate(params, tiny.requests(), seed=11), expected, atol=1e-4)
    everything, local = sizes[0]
    page, chunk, slots = engine.cache.page, engine.chunk, engine.slots
    most = -(-(tiny.MAX_PROMPT + tiny.MAX_TOKENS) // page)
    assert local == 1 + slots * min(most, (9 + chunk - 2) // page + 2)
    if page < 8 and "cache_tokens" not in options:
        assert local < everything


def test_the_youngest_wait_when_pages_run_out_and_lose_nothing():
    engine, params = paged(pages=3, slots=16, cache_tokens=90, chunk=7)
    in_use = watch(engine)
    requests = [dataclasses.replace(r, samples=8) for r in tiny.requests()[:1]] + tiny.requests()[1:]
    tiny.same(engine.generate(params, requests, seed=11)[1:], baseline()[1:])
    assert engine.stats.waits > 0 and max(in_use) <= 30
    assert engine.stats.tokens == sum(c.length for group in engine.generate(params, requests, seed=11) for c in group)


def test_samples_share_the_pages_of_their_prompt():
    engine, params = paged(pages=4)
    in_use = watch(engine)
    request = dataclasses.replace(tiny.requests()[2], samples=8)  # 40 tokens of prompt: 9 full pages, 3 tokens behind
    engine.submit(request, seed=11)
    engine.step(params)
    assert in_use == [9 + 8 * 3]  # and each the page that the prompt ends in and those of 8 steps to come


def test_cancelled_samples_give_their_pages_back():
    engine, params = paged(pages=8, cache_tokens=128)
    watch(engine)
    tickets = {engine.submit(r, seed=11): i for i, r in enumerate(tiny.requests())}
    ended = sum(event.completion is not None for event in engine.step(params))
    stopped = next(iter(tickets))
    begun = engine.cancel(stopped)
    assert set(begun) == {0, 1, 2}
    rest = drain(engine, params, tickets, check=False)
    assert len(rest) == 15 - ended
    same(rest, baseline())
    request = tiny.requests()[tickets[stopped]]
    for sample, part in begun.items():  # and go on from there, as partial rollouts do
        (done,) = engine.generate(params, [request.resumed(sample, part)], seed=11)[0]
        whole = np.concatenate([part.tokens, done.tokens])
        np.testing.assert_array_equal(whole, baseline()[tickets[stopped]][sample].tokens)


def test_int8_pages_hold_what_the_int8_dense_cache_does():
    dense = tiny.sampler(chunk=8, window=32, cache="int8")
    expected = dense.generate(dense.layout(tiny.params()), tiny.requests(), seed=11)
    engine, params = paged(pages=8, cache="int8", cache_tokens=200)
    tiny.same(engine.generate(params, tiny.requests(), seed=11), expected, atol=1e-4)


def test_nothing_compiles_after_warmup():
    engine, params = paged(pages=16, cache_tokens=160, prefill_chunk=24)
    engine.warmup(params)
    known = set(engine.shapes)
    tiny.same(engine.generate(params, tiny.requests(), seed=11), baseline())
    assert set(engine.shapes) == known


def test_a_capacity_that_holds_no_whole_response_is_refused():
    with pytest.raises(UserError, match="config.sampling.cache_tokens=40 is 5 pages of 8 tokens .* at least 64"):
        paged(cache_tokens=40)
