"""Groups sampled over several calls, cut anywhere: the tokens of an uncut sample, and nothing lost."""

import numpy as np
import pytest

from jaxrl import rollouts as records
from jaxrl.collect import requests
from jaxrl.rollouts import Prompt, Rollouts
from jaxrl.types import Problem
from tests.rollout import tiny
from tests.rollout.test_engine import shared

LIMIT = 24
PROBLEM = Problem("p", "q", "1", budget=3, mode="max", info={"a": [1]})


def begun(count=4, samples=3):
    return records.begin(Prompt(PROBLEM, r.prompt, samples, 10 + i, 2) for i, r in enumerate(tiny.requests()[:count]))


def call(rollouts, budget, step, background=None):
    """Both records after one call of the sampler."""
    s, params = shared()
    both = rollouts, records.begin([]) if background is None else background
    asked = [requests(r, LIMIT, budget, {}) for r in both]
    out = s.generate(params, sum(asked, []), seed=5, step=step, background=len(asked[1]))
    pieces, n = [c for group in out for c in group], int(rollouts.unfinished.sum())
    assert len(pieces) == n + both[1].unfinished.sum()
    return both[0].extend(pieces[:n], step, LIMIT), both[1].extend(pieces[n:], step, LIMIT)


def uncut():
    rollouts, _ = call(begun(), 0, 2)
    assert not rollouts.unfinished.any() and set(rollouts.finish) == {"eos", "length"}
    return rollouts


def same(a, b):
    """The same tokens, log-probs but for rounding, finishes; tokens whose draw was close may not differ either."""
    assert a.finish.tolist() == b.finish.tolist() and a.tokens.tolist() == b.tokens.tolist()
    assert a.offsets.tolist() == b.offsets.tolist()
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("budget", [5, 23])
def test_pieces_are_the_uncut_sample(budget):
    rollouts, calls = begun(), 0
    while rollouts.unfinished.any():
        before = rollouts.lengths
        rollouts, _ = call(rollouts, budget, 2 + calls)
        assert (rollouts.lengths - before <= budget).all()
        calls += 1
    assert calls == -(-LIMIT // budget)
    same(rollouts, uncut())
    for version, n in zip(rollouts.split_tokens(rollouts.version), rollouts.lengths, strict=True):
        assert version.tolist() == [2 + i // budget for i in range(n)]  # the step that drew it


def test_begun_in_the_background_and_finished_later_is_the_same():
    whole, _ = call(begun(6), 0, 2)
    front, behind = begun(6).split_groups(1)
    first, ahead = call(front, 0, 2, behind)
    same(first, whole.split_groups(1)[0])
    assert ahead.unfinished.any() and len(ahead.tokens)
    ahead, _ = call(ahead, 0, 3)
    same(ahead, whole.split_groups(1)[1])


def test_through_arrays_with_every_bit():
    rollouts, _ = call(begun(), 5, 2)
    back = Rollouts.from_arrays(rollouts.to_arrays())
    assert back.prompts[0].problem == PROBLEM and back.prompts[0].tokens.dtype == np.int32
    a, b = (call(r, 0, 3)[0] for r in (rollouts, back))
    for name in ("tokens", "logprobs", "version", "offsets", "sampled", "sample"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name
    assert a.finish.tolist() == b.finish.tolist()
    assert set(a.version) == {2, 3} and ((a.version == 2).sum() == len(rollouts.tokens))


def test_a_group_without_tokens_is_prefilled_once():
    rollouts = begun(1)
    (request,) = requests(rollouts, LIMIT, 0, {"p": 7.0})
    assert (request.samples, request.max_tokens, request.expected, request.done) == (3, LIMIT, 7.0, 0)
    rollouts, _ = call(rollouts, 5, 2)
    later = requests(rollouts, LIMIT, 4, {"p": 7.0})
    assert len(later) == rollouts.unfinished.sum() > 0 and all(r.samples == 1 and r.max_tokens == 4 for r in later)
    prompt = len(rollouts.prompts[0].tokens)
    assert all(r.expected == 12 and r.step == 2 and len(r.prompt) == prompt + r.done for r in later)
    assert [r.first_sample for r in later] == rollouts.sample[rollouts.unfinished].tolist()
