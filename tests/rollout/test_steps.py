"""submit, step and cancel: requests may come and go at any time, and the tokens stay those of one quiet call."""

import dataclasses

import numpy as np
import pytest

from jaxrl.errors import UserError
from jaxrl.rollout.engine import Request, SamplingParams
from jaxrl.rollout.requests import decodable
from jaxrl.types import Completion
from models.tokenizers import VocabTokenizer
from tests.rollout import tiny
from tests.rollout.test_engine import baseline, shared


def drain(engine, params, tickets, check=True):
    """{(request index, sample): completion}, stepped to the end; tickets: {ticket: index}. check: all were seen."""
    out, seen = {}, {}
    while engine.busy:
        for event in engine.step(params):
            key = tickets[event.ticket], event.sample
            seen.setdefault(key, []).append(event.tokens)
            assert len(event.tokens) == len(event.logprobs) >= 1
            if event.completion is not None:
                assert key not in out
                if check:
                    np.testing.assert_array_equal(np.concatenate(seen[key]), event.completion.tokens)
                out[key] = event.completion
    return out


def same(out, expected):
    for (i, j), c in out.items():
        tiny.same([[c]], [[expected[i][j]]])


def test_requests_submitted_between_steps_are_those_of_one_call():
    engine, params = shared()
    todo, tickets, out = list(enumerate(tiny.requests())), {}, {}
    while todo or engine.busy:
        if todo:
            index, request = todo.pop()
            tickets[engine.submit(request, seed=11)] = index
        for event in engine.step(params):
            if event.completion is not None:
                out[tickets[event.ticket], event.sample] = event.completion
    assert len(out) == 18
    same(out, baseline())


def test_running_rows_do_not_wait_for_a_long_prompt():
    """A part of it a step, with decoding in between; cancelled on the way it leaves nothing behind."""
    engine = tiny.sampler(chunk=1, window=32, prefill_chunk=8)
    params, (short, long) = engine.layout(tiny.params()), (tiny.requests()[3], tiny.requests()[2])
    alone = [engine.generate(params, [r], seed=11)[0] for r in (short, long)]
    first, calls, out = engine.submit(short, seed=11), [], {}
    engine.step(params)
    for cancelled in (True, False):
        second = engine.submit(long, seed=11)
        while engine.busy and not (cancelled and len(calls) == 3):
            before = engine.stats.prefill_calls
            for event in engine.step(params):
                if event.completion is not None:
                    out[event.ticket, event.sample] = event.completion
            calls.append(engine.stats.prefill_calls - before)
        if cancelled:
            assert set(engine.cancel(second)) == {0, 1, 2} and not out and not engine._waiting
    assert calls[:3] == [1, 1, 1] and sum(calls[3:]) == 8 and calls[3:11] == [1] * 8  # 64 columns, 8 at a time
    tiny.same([[out[t, i] for i in range(3)] for t in (first, second)], alone)


def test_what_is_cancelled_ends_there_and_its_slot_serves_others():
    engine, params = shared()
    requests = [dataclasses.replace(tiny.requests()[i], samples=8, expected=9.0 - i) for i in (0, 3)]
    alone = [engine.generate(params, [r], seed=11)[0] for r in requests]
    tickets = {engine.submit(r, seed=11): i for i, r in enumerate(requests)}
    first, second = tickets
    events = engine.step(params)
    assert {e.ticket for e in events} == {first} and len(events) == 8  # eight slots, the second waits
    left = [e.sample for e in events if e.completion is None]
    one = engine.cancel(first, left[0])
    assert list(one) == left[:1] and one[left[0]].finish == "partial" and one[left[0]].length >= 1
    rest = engine.cancel(first)
    assert sorted(rest) == left[1:] and engine.cancel(first) == {} and engine.cancel(12345) == {}
    for sample, c in (one | rest).items():
        np.testing.assert_array_equal(c.tokens, alone[0][sample].tokens[: c.length])
    assert {(e.ticket, e.sample) for e in engine.step(params)} == {(second, j) for j in range(8)}
    out = drain(engine, params, tickets, check=False)
    assert sorted(out) == [(1, j) for j in range(8)]
    same(out, alone)
    assert engine.cache.rows == 0 and not engine.busy  # an engine at rest holds no cache


def test_waiting_samples_can_be_cancelled_too():
    engine, params = shared()
    requests = [dataclasses.replace(r, samples=8, expected=-i) for i, r in enumerate(tiny.requests()[:3])]
    tickets = [engine.submit(r, seed=11) for r in requests]
    engine.step(params)
    waiting = engine.cancel(tickets[1], 5)
    assert waiting[5].length == 0 and waiting[5].finish == "partial"
    assert len(engine.cancel(tickets[2])) == 8
    out = drain(engine, params, {t: i for i, t in enumerate(tickets)}, check=False)
    assert {j for i, j in out if i == 1} == {0, 1, 2, 3, 4, 6, 7} and not any(i == 2 for i, _ in out)


def test_slots_grow_again_for_what_comes_later():
    engine = tiny.sampler(slots=32, chunk=4, window=32)
    params = engine.layout(tiny.params())
    small = {engine.submit(tiny.requests()[0], seed=11): 0}
    engine.step(params)
    assert engine.cache.rows == 8
    small |= {engine.submit(dataclasses.replace(r, samples=3), seed=11): i for i, r in enumerate(tiny.requests()) if i}
    engine.step(params)
    assert engine.cache.rows == 32
    same(drain(engine, params, small, check=False), baseline())


def test_generate_refuses_to_lose_events_and_leaves_nothing_behind():
    engine, params = shared()
    ticket = engine.submit(tiny.requests()[0])
    with pytest.raises(ValueError, match="1 submitted requests are open"):
        engine.generate(params, tiny.requests(), seed=11)
    engine.cancel(ticket)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(params, tiny.requests(), seed=11, on_tokens=interrupt)
    assert not engine.busy
    tiny.same(engine.generate(params, tiny.requests(), seed=11), baseline())


def test_a_response_goes_on_after_forced_tokens():
    """Stopped at a condition, a tool's result put in, continued: as if the model had been given all of it."""
    engine, params = shared()
    sample, whole = max(enumerate(baseline()[0]), key=lambda pair: pair[1].length)
    request, forced = dataclasses.replace(tiny.requests()[0], samples=1, first_sample=sample), [50, 60, 70]
    ticket = engine.submit(request, seed=11)
    (event,) = engine.step(params)
    draft = engine.cancel(ticket)[0].head(5).forced(forced)
    assert draft.finish == "partial" and event.completion is None
    engine.submit(request.resumed(0, draft), seed=11)
    done = draft.joined(drain_one(engine, params))
    assert done.sampled.tolist() == [True] * 5 + [False] * 3 + [True] * (done.length - 8) and done.length > 8
    assert done.tokens[:5].tolist() == whole.tokens[:5].tolist() and done.tokens[5:8].tolist() == forced
    assert (done.logprobs[5:8] == 0).all() and (done.logprobs[done.sampled] < 0).all()
    # what follows is drawn with the key of its place in the response
    tokens = [*request.prompt, *done.tokens[:8]]
    for position in range(8, done.length):
        z = tiny.all_logits(tokens)[-1].astype(np.float64)
        weights = np.exp(z - z.max())
        token = tiny.pick(weights, tiny.uniforms(11, 0, request.key, sample, position))
        assert token == done.tokens[position]
        np.testing.assert_allclose(done.logprobs[position], np.log(weights[token] / weights.sum()), atol=1e-5)
        tokens.append(token)


def drain_one(engine, params):
    while engine.busy:
        for event in engine.step(params):
            if event.completion is not None:
                return event.completion


def test_heads_and_joins_keep_what_was_drawn():
    c = Completion(np.arange(4, dtype=np.int32), -np.ones(4, np.float32), "eos")
    assert c.head(2).tokens.tolist() == [0, 1] and c.head(2).sampled is None
    both = c.head(2).joined(c)
    assert both.tokens.tolist() == [0, 1, 0, 1, 2, 3] and both.finish == "eos" and both.sampled is None
    forced = c.forced([9]).joined(c)
    assert forced.sampled.tolist() == [True] * 4 + [False] + [True] * 4 and forced.logprobs[4] == 0
    assert forced.tokens.dtype == np.int32 and forced.logprobs.dtype == np.float32
    assert forced.head(5).sampled.tolist() == [True] * 4 + [False]


def test_rows_of_the_vocabulary_without_a_token_are_never_drawn():
    allowed = np.arange(tiny.CONFIG.vocab_size) < 150
    engine = tiny.sampler(chunk=8, window=32, allowed=allowed)
    params = engine.layout(tiny.params())
    requests = [dataclasses.replace(r, prompt=r.prompt % 140 + 8) for r in tiny.requests()[:2]]
    for sampling in (SamplingParams(), SamplingParams(0.0), SamplingParams(top_p=0.99)):
        for request, group in zip(requests, engine.generate(params, requests, seed=11, sampling=sampling), strict=True):
            for c in group:
                assert c.tokens.max() < 150
                z = tiny.all_logits([*request.prompt, *c.tokens])[len(request.prompt) - 1 : -1].astype(np.float64)
                logps = z - np.log(np.exp(z).sum(-1, keepdims=True))  # over all rows, as the learner's
                np.testing.assert_allclose(c.logprobs, logps[np.arange(c.length), c.tokens], atol=1e-5)
    bias = np.where(allowed, -np.inf, 0).astype(np.float32)
    with pytest.raises(ValueError, match="at least one token"):
        engine.generate(params, requests, seed=11, sampling=SamplingParams(bias=bias))


def test_which_tokens_can_be_decoded():
    tokenizer = VocabTokenizer(list("abcd"), {"eos": "d"}, "letters")
    assert decodable(tokenizer, 4) is None
    assert decodable(tokenizer, 6).tolist() == [True] * 4 + [False] * 2
    tokenizer.unused_ids = [1]
    assert decodable(tokenizer, 4).tolist() == [True, False, True, True]
    with pytest.raises(UserError, match="tokenizer letters has token ids up to 3, the model only 3 rows"):
        decodable(tokenizer, 3)


def test_requests_are_checked_when_submitted():
    engine, _ = shared()
    with pytest.raises(ValueError, match="prompt of 41"):
        engine.submit(Request(np.zeros(41, np.int32), 1, 1, 0))
    assert not engine.busy
