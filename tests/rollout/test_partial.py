"""Groups sampled over several calls, cut anywhere: the tokens of an uncut sample, and nothing lost."""

import dataclasses
import json

import numpy as np
import pytest

from jaxrl.rollout import partial
from jaxrl.types import Problem
from tests.rollout import tiny
from tests.rollout.test_engine import shared

LIMIT = 24
PROBLEM = Problem("p", "q", "1", budget=3, mode="max", info={"a": [1]})


def begun(count=4, samples=3):
    prompts = [r.prompt for r in tiny.requests()[:count]]
    return [partial.begin(10 + i, 2, PROBLEM, p, samples) for i, p in enumerate(prompts)]


def call(groups, budget, step, background=()):
    """Both lists of groups after one call of the sampler."""
    s, params = shared()
    requests = [[r for g in gs for r in partial.requests(g, LIMIT, budget, 0.0)] for gs in (groups, background)]
    out = s.generate(params, sum(requests, []), seed=5, step=step, background=len(requests[1]))
    pieces = iter([c for group in out for c in group])
    result = [[partial.extend(g, pieces, LIMIT) for g in gs] for gs in (groups, background)]
    assert next(pieces, None) is None
    return result


def uncut():
    groups, _ = call(begun(), 0, 2)
    assert not any(g.running for g in groups)
    assert {c.finish for g in groups for c in g.completions} == {"eos", "length"}
    return groups


def same(a, b):
    tiny.same([g.completions for g in a], [g.completions for g in b])


@pytest.mark.parametrize("budget", [5, 23])
def test_pieces_are_the_uncut_sample(budget):
    groups, calls = begun(), 0
    while any(g.running for g in groups):
        before = [c.length for g in groups for c in g.completions]
        groups, _ = call(groups, budget, 2 + calls)
        after = [c.length for g in groups for c in g.completions]
        assert all(b - a <= budget for a, b in zip(before, after, strict=True))
        calls += 1
    assert calls == -(-LIMIT // budget)
    same(groups, uncut())


def test_begun_in_the_background_and_finished_later_is_the_same():
    whole, _ = call(begun(6), 0, 2)
    first, ahead = call(begun(6)[:1], 0, 2, begun(6)[1:])
    same(first, whole[:1])
    assert any(g.running for g in ahead) and any(g.drawn for g in ahead)
    assert [g.running for g in ahead] == [sum(c.finish == "partial" for c in g.completions) for g in ahead]
    ahead, _ = call(ahead, 0, 3)
    same(ahead, whole[1:])


def test_through_json_with_every_bit():
    groups, _ = call(begun(), 5, 2)
    groups = [dataclasses.replace(g, completions=partial.aged(g.completions)) for g in groups]
    back = [partial.from_json(json.loads(json.dumps(partial.to_json(g)))) for g in groups]
    for a, b in zip(groups, back, strict=True):
        assert (a.position, a.step, a.problem, a.running) == (b.position, b.step, b.problem, b.running)
        assert a.prompt.dtype == b.prompt.dtype and a.prompt.tobytes() == b.prompt.tobytes()
        for c, d in zip(a.completions, b.completions, strict=True):
            assert c.tokens.tobytes() == d.tokens.tobytes() and c.logprobs.tobytes() == d.logprobs.tobytes()
            assert (c.finish, c.stale) == (d.finish, d.stale) and c.stale == c.length > 0
    for a, b in zip(call(groups, 0, 3)[0], call(back, 0, 3)[0], strict=True):
        for c, d in zip(a.completions, b.completions, strict=True):
            assert c.tokens.tobytes() == d.tokens.tobytes() and c.logprobs.tobytes() == d.logprobs.tobytes()
            assert c.stale == d.stale <= 5


def test_a_group_without_tokens_is_prefilled_once():
    (group,) = begun(1)
    (request,) = partial.requests(group, LIMIT, 0, 7.0)
    assert (request.samples, request.max_tokens, request.expected, request.done) == (3, LIMIT, 7.0, 0)
    (group,), _ = call([group], 5, 2)
    later = partial.requests(group, LIMIT, 4, 7.0)
    assert len(later) == group.running and all(r.samples == 1 and r.max_tokens == 4 for r in later)
    assert all(r.expected == 12 and r.step == 2 and len(r.prompt) == len(group.prompt) + r.done for r in later)
    assert np.all([r.first_sample == i for r, i in zip(later, later_indices(group), strict=True)])


def later_indices(group):
    return [i for i, c in enumerate(group.completions) if c.finish == "partial"]
