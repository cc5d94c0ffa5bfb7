"""Budget forcing on a model whose bias makes it do what each case needs."""

import functools

import numpy as np
import pytest

from jaxrl.rollout.budget_forcing import Delimiters, generate_forced
from jaxrl.rollout.engine import Request, SamplingParams
from tests.rollout import tiny

END, WAIT, FINAL, NEWLINE = (20, 21), (30, 31), (40,), (50,)
D = Delimiters(END, FINAL, WAIT, NEWLINE)


@functools.cache
def shared():
    s = tiny.sampler(max_prompt=40, max_tokens=40, slots=8, chunk=8, window=96)
    return s, s.layout(tiny.params())


def forced(bias=(), samples=2, **options):
    s, params = shared()
    values = np.zeros(tiny.CONFIG.vocab_size, np.float32)
    for token, value in dict(bias).items():
        values[token] = value
    requests = [
        Request(np.array([9, 10], np.int32), samples, 1, 5),
        Request(np.array([60], np.int32), samples, 1, 6),
    ]
    options = dict(max_thinking=12, max_answer=4, seed=3, sampling=SamplingParams(bias=values)) | options
    return sum(generate_forced(s, params, requests, D, **options), [])


BAN = {t: -np.inf for t in (*tiny.EOS, 20)}  # never ends of itself


def test_maximum_cuts_thinking_and_asks_for_the_answer():
    for r in forced(BAN):
        assert r.cut and r.waits == 0 and r.answer == 4 and r.finish == "length"
        assert tuple(r.tokens[12:16]) == NEWLINE + END + FINAL and r.thinking == 16
        assert r.sampled.tolist() == [True] * 12 + [False] * 4 + [True] * 4
        assert (r.logprobs[~r.sampled] == 0).all() and (r.logprobs[r.sampled] < 0).all()


def test_minimum_takes_the_end_back_and_waits():
    for r in forced({3: 60.0}, ignore=2):  # always wants to end at once
        assert r.waits == 2 and not r.cut
        # ends at once; Wait; one token, held to it; Wait; one token; end; the answer ends at once
        assert tuple(r.tokens[:2]) == WAIT and tuple(r.tokens[3:5]) == WAIT and tuple(r.tokens[6:8]) == END
        assert r.tokens[8:].tolist() == [3] and r.finish == "eos" and r.answer == 1
        assert r.sampled.tolist() == [False] * 2 + [True] + [False] * 2 + [True] + [False] * 2 + [True]


def test_waits_stay_within_the_budget():
    for r in forced({3: 60.0}, ignore=50, max_thinking=8):
        assert len(r.tokens) - r.answer <= 8 + len(NEWLINE + END + FINAL)
        assert 1 < r.waits <= 4


def test_closing_by_itself_is_kept_as_sampled():
    bias = {t: -np.inf for t in range(300) if t not in (*END, 99)}
    responses = forced(bias, samples=8)
    closed = [r for r in responses if not r.cut]
    assert closed
    for r in closed:
        assert tuple(r.tokens[r.thinking - 2 : r.thinking]) == END and r.sampled.all()


def test_logprobs_are_those_of_a_full_pass():
    for r, prompt in zip(forced(BAN, samples=1), ([9, 10], [60]), strict=True):
        z = tiny.all_logits([*prompt, *r.tokens])[len(prompt) - 1 : -1].astype(np.float64)
        z[:, list(BAN)] = -np.inf
        logps = (z - np.log(np.exp(z).sum(-1, keepdims=True)))[np.arange(len(r.tokens)), r.tokens]
        np.testing.assert_allclose(r.logprobs[r.sampled], logps[r.sampled], atol=1e-5)


def test_segments_use_fresh_random_numbers_and_samples_differ():
    a, b, *_ = forced(BAN)
    assert not np.array_equal(a.tokens, b.tokens)
    again = forced(BAN)
    np.testing.assert_array_equal(a.tokens, again[0].tokens)


def test_after_a_shorter_wait_the_random_numbers_are_not_those_that_drew_the_end():
    """With them, the token after "Wait" would nearly always be the second one of the end that was taken back."""
    s, params = shared()
    bias = np.full(tiny.CONFIG.vocab_size, -np.inf, np.float32)
    bias[20:26] = 0
    sampling = SamplingParams(temperature=50.0, bias=bias)
    requests = [Request(np.array([9, 10], np.int32), 64, 1, key) for key in range(4)]
    drawn = generate_forced(s, params, requests, Delimiters(END, FINAL, (30,)), max_thinking=12, max_answer=4, ignore=1,
                            seed=3, sampling=sampling)  # fmt: skip
    after = [r.tokens[np.flatnonzero(r.tokens == 30)[0] + 1] for r in sum(drawn, []) if r.waits]
    assert len(after) > 50 and 0.05 < np.mean(np.array(after) == END[1]) < 0.35  # a sixth of six tokens


def test_errors():
    for options, match in (
        (dict(max_thinking=0), "max_thinking=0"),
        (dict(ignore=-1), "ignore=-1"),
        (dict(max_thinking=33), "max_thinking=33, 4 closing tokens and max_answer=4 are more than .* max_tokens=40"),
    ):
        with pytest.raises(ValueError, match=match):
            forced(**options)
    s, params = shared()
    with pytest.raises(ValueError, match="wait"):
        generate_forced(s, params, [], Delimiters(END), max_thinking=1, max_answer=1, ignore=1, seed=0)
