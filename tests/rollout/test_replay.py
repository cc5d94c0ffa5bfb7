"""The scheduler without a model calls what the engine calls, shape by shape, for the lengths that the engine drew."""

import dataclasses

import numpy as np
import pytest

from jaxrl.rollout.replay import log_normal, replay
from tests.rollout import tiny


@pytest.mark.parametrize(("slots", "chunk"), [pytest.param(3, 4, marks=pytest.mark.slow), (8, 16)])
def test_calls_are_those_of_the_engine(slots, chunk, monkeypatch):
    sizes = dict(max_prompt=tiny.MAX_PROMPT, max_tokens=tiny.MAX_TOKENS, slots=slots, chunk=chunk, window=16)
    engine, calls = tiny.sampler(**sizes), []
    run = engine.runner.call

    def call(name, shape, *args, **kwargs):
        if name in ("prefill", "decode"):
            calls.append((name, *shape[:2]))
        return run(name, shape, *args, **kwargs)

    monkeypatch.setattr(engine.runner, "call", call)
    requests = [dataclasses.replace(r, max_tokens=tiny.MAX_TOKENS) for r in tiny.requests()]
    done = engine.generate(engine.layout(tiny.params()), requests, seed=0)
    lengths = [[c.length for c in group] for group in done]
    found = replay(lengths, [len(r.prompt) for r in requests], **sizes)
    assert [(c.program, c.rows, c.columns) for c in found.calls if c.program in ("prefill", "decode")] == calls
    for name in ("tokens", "steps", "slot_steps", "decode_calls", "prefill_calls", "prefill_tokens"):
        assert getattr(found.stats, name) == getattr(engine.stats, name), name


def test_one_wave_lasts_as_long_as_its_longest_answer():
    lengths = np.array([[10, 100], [30, 200]])
    sizes = dict(chunk=16, window=16, max_prompt=8, max_tokens=256)
    wave = replay(lengths, [8, 8], slots=4, **sizes)
    assert wave.stats.steps == 200 and wave.stats.tokens == lengths.sum()
    assert wave.contexts == sum(8 * n + n * (n - 1) // 2 for n in lengths.ravel())  # 7 cached, and the token itself
    assert wave.read > wave.contexts
    two = replay(lengths, [8, 8], slots=1, **sizes)
    assert two.stats.steps == lengths.sum() and max(c.active for c in two.of("decode")) == 1


def test_lengths_are_cut_at_the_limit():
    lengths = log_normal((200, 16), 1000, 0.25, 0.9)
    assert lengths.min() >= 1 and lengths.max() == 1000 and np.median(lengths) == pytest.approx(250, rel=0.05)


def test_pages_read_each_rows_own_blocks_and_hold_more_rows_in_the_same_tokens():
    lengths = log_normal((32, 8), 1024, 0.25, 0.75, seed=1)
    sizes = dict(chunk=64, window=64, max_prompt=64, max_tokens=1024)
    dense = replay(lengths, [60] * 32, slots=32, **sizes)
    paged = replay(lengths, [60] * 32, slots=80, page=32, tokens=dense.largest, **sizes)
    assert paged.stats.tokens == dense.stats.tokens == lengths.sum() and paged.largest <= 1.01 * dense.largest
    assert paged.contexts == dense.contexts and paged.read < 1.6 * paged.contexts < dense.read
    assert paged.stats.steps < 0.6 * dense.stats.steps
