"""The record of a batch as a property: parts, sums and plain arrays hold every response as it was."""

import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl import rollouts as records
from jaxrl.batch import MiniBatch, fill_in, make_batches, with_advantages, with_kl_penalty
from jaxrl.learner.packing import PackSettings, pack
from jaxrl.rollouts import PER_RESPONSE, PER_TOKEN, WORDS, Prompt, Rollouts, concat, from_sequences
from jaxrl.runtime import distributed
from jaxrl.runtime.config import base_config
from jaxrl.types import Completion, Problem

quick = settings(max_examples=40, deadline=None, derandomize=True)
sizes = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), max_size=6)  # lengths, group by group


def make(lengths, seed=0, first=0):
    """Rollouts with groups of responses of these lengths, everything else random."""
    rng, n, total = np.random.default_rng([seed, first]), sum(map(len, lengths)), sum(map(sum, lengths))
    prompts = [Prompt(Problem(f"p{first + i}", "q", "1", budget=i or None, mode="exact", info={"x": [i, "é"]}),
                      rng.integers(0, 9, i + 1).astype(np.int32), len(g), first + i, i) for i, g in enumerate(lengths)]
    group = np.repeat(np.arange(len(lengths)), [len(g) for g in lengths]).astype(np.int64)
    return Rollouts(
        prompts=tuple(prompts),
        offsets=np.concatenate([[0], np.cumsum(sum(lengths, []), dtype=np.int64)]).astype(np.int64),
        group=group,
        tokens=rng.integers(0, 99, total).astype(np.int32),
        logprobs=rng.choice(np.array([1e-45, -0.0, np.nan, -np.inf, 1 / 3], np.float32), total),
        sampled=rng.random(total) < 0.5,
        version=rng.integers(0, 3, total).astype(np.int32),
        sample=np.concatenate([np.zeros(0), *map(np.arange, map(len, lengths))]).astype(np.int32),
        correct=rng.random(n).astype(np.float32),
        reward=rng.random(n).astype(np.float32),
        valid=rng.random(n) < 0.7,
        finish=rng.choice(np.array(["eos", "length", "partial"], object), n),
        outcome=rng.choice(np.array(["correct", "wrong", ""], object), n),
        columns={"waits": rng.integers(0, 9, n)},
        token_columns={"entropy": rng.random(total)},
    )


def responses(r):
    """What is known of each response, one tuple each, from plain indexing."""
    out = []
    for i in range(len(r)):
        tokens = slice(r.offsets[i], r.offsets[i + 1])
        flat = [getattr(r, k)[tokens].tobytes() for k in PER_TOKEN] + [r.token_columns["entropy"][tokens].tobytes()]
        single = [getattr(r, k)[i].item() if k in PER_RESPONSE else getattr(r, k)[i] for k in (*PER_RESPONSE, *WORDS)]
        prompt = r.prompts[r.group[i]]
        where = prompt.problem.id, str(prompt.problem), prompt.tokens.tobytes(), prompt.samples, prompt.position
        out.append((*where, *flat, *single, int(r.columns["waits"][i])))
    return out


def check(r):
    """The types of the record, and that no group is empty."""
    assert all(getattr(r, k).dtype == dtype for k, dtype in (PER_TOKEN | PER_RESPONSE).items())
    assert len(r.offsets) == len(r) + 1 and r.offsets[-1] == len(r.tokens)
    assert set(r.group.tolist()) == set(range(r.num_groups))


@quick
@given(sizes, st.randoms(use_true_random=False))
def test_any_choice_of_responses_in_any_order(lengths, random):
    r = make(lengths)
    index = random.sample(range(len(r)), random.randint(0, len(r)))
    part = r.take(index)
    check(part)
    assert responses(part) == [responses(r)[i] for i in index]
    assert part.group.tolist() == [list(dict.fromkeys(r.group[index])).index(g) for g in r.group[index]]
    keep = np.isin(np.arange(len(r)), index)
    assert responses(r.where(keep)) == [responses(r)[i] for i in sorted(index)]


@quick
@given(sizes, sizes, st.integers(0, 8))
def test_parts_come_together_and_apart(a, b, n):
    left, right = make(a), make(b, first=100)
    both = concat([left, right])
    check(both)
    assert responses(both) == responses(left) + responses(right)
    first, rest = both.split_groups(n)
    check(first)
    assert first.num_groups == min(n, both.num_groups) and responses(first) + responses(rest) == responses(both)
    back = list(range(both.num_groups))[::-1]
    assert responses(both.take_groups(back).take_groups(back)) == responses(both)
    if len(left) and len(right):
        lacks = concat([left.replace(columns={}), right])  # a column that one part does not have is 0 there
        assert lacks.columns["waits"].tolist() == [0] * len(left) + right.columns["waits"].tolist()


@quick
@given(sizes)
def test_plain_arrays_hold_every_bit(lengths):
    r, buffer = make(lengths), io.BytesIO()
    np.savez(buffer, **r.to_arrays())
    back = Rollouts.from_arrays(dict(np.load(io.BytesIO(buffer.getvalue()))))  # no pickles
    check(back)
    assert responses(back) == responses(r)
    assert responses(Rollouts.from_arrays(r.to_arrays(prompts=False), r.prompts)) == responses(r)
    assert [p.tokens.dtype for p in back.prompts] == [np.int32] * r.num_groups


@quick
@given(sizes)
def test_statistics_of_groups_are_those_of_their_valid_responses(lengths):
    r = make(lengths)
    least, most = r.group_range(r.reward)
    for g in range(r.num_groups):
        values = [float(r.reward[i]) for i in range(len(r)) if r.group[i] == g and r.valid[i]]
        assert r.group_count()[g] == len(values)
        assert (least[g], most[g]) == ((min(values), max(values)) if values else (np.inf, -np.inf))
        mean = r.group_mean(r.reward)[g]
        assert mean == pytest.approx(np.mean(values)) if values else np.isnan(mean)
    assert r.token_sum(r.sampled).tolist() == [sum(x) for x in r.split_tokens(r.sampled)]


def test_continuing_adds_tokens_at_the_ends_of_unfinished_responses():
    r = make([[2, 0, 3], [0, 1]]).replace(finish=np.array(["partial", "partial", "eos", "partial", "eos"], object))
    new = [
        Completion(np.array([7, 8]), np.array([-1.0, -2.0]), "eos"),
        Completion(np.array([], int), np.array([]), "partial"),
        Completion(np.array([5, 6, 7]), np.array([-1.0, -2.0, -3.0]), "length", np.array([True, False, True])),
    ]
    out = r.extend(new, step=9, limit=4)
    check(out)
    assert out.finish.tolist() == ["eos", "partial", "eos", "partial", "eos"]  # three of four tokens: goes on
    before, after = r.split_tokens(), out.split_tokens()
    assert [a.tolist() for a in after] == [[*before[0], 7, 8], [], [*before[2]], [5, 6, 7], [*before[4]]]
    assert out.split_tokens(out.version)[3].tolist() == [9] * 3
    assert out.split_tokens(out.version)[0].tolist() == [*r.version[:2], 9, 9]
    assert out.split_tokens(out.sampled)[3].tolist() == [True, False, True]
    assert out.split_tokens(out.sampled)[0][-2:].tolist() == [True, True]
    assert r.extend(new, step=9, limit=3).finish[3] == "length"


# ---- batches


class Scores:
    """A learner whose score of every response token is a number that belongs to the parameters."""

    def score(self, params, data, reference=False):
        return jnp.asarray(params * data.response_mask)


def settings_of(updates, epochs):
    c = base_config()
    c.batch.updates, c.batch.epochs, c.sampling.max_prompt, c.sampling.max_tokens = updates, epochs, 8, 8
    c.algorithm.kl_in_reward, c.algorithm.kl_coef, c.algorithm.kl_kind = True, 0.1, "k1"
    c.algorithm.advantage = "dr_grpo"
    return c


def test_kl_in_the_reward_is_that_of_each_response_and_packs_nothing_more():
    r = make([[3, 1, 2], [4, 2], [1, 1]]).replace(logprobs=np.zeros(14, np.float32), sampled=np.ones(14, bool))
    c = settings_of(updates=2, epochs=2)
    batches = make_batches(r, c, step=0)
    assert len(batches) == 4
    shaped = with_kl_penalty(r, batches, c, Scores(), params=np.float32(-1.0), reference=np.float32(-1.5))
    expected = np.where(r.valid, r.reward - 0.1 * 0.5 * r.lengths, r.reward)  # k1: log pi - log pi_ref, 0.5 a token
    np.testing.assert_allclose(shaped.reward, expected, rtol=1e-6)
    advantage = with_advantages(shaped, c)
    for data, packing, index in fill_in(batches, advantage):
        want = np.repeat(advantage.columns["advantage"][index], r.lengths[index])
        np.testing.assert_allclose(packing.collect(data.advantages), want, rtol=1e-6)
    c.algorithm.kl_in_reward = False
    assert with_kl_penalty(r, batches, c, None, params=None, reference=None) is r


def test_hosts_add_up_the_kl_of_their_own_rows(monkeypatch):
    """Two hosts that hold one of two shards each come to what one host comes to, bit for bit."""
    r, c = make([[3, 1, 2], [4, 2], [1, 1]]), settings_of(updates=2, epochs=1)
    r = r.replace(sampled=np.ones(14, bool), valid=np.ones(7, bool))
    c.sampling.max_prompt, c.sampling.max_tokens, c.batch.row_tokens = 3, 4, 8  # rows enough for both shards
    models = dict(params=np.float32(-1.0), reference=np.float32(-1.5))
    alone = with_kl_penalty(r, make_batches(r, c, 0, 2), c, Scores(), **models)
    sent = []
    monkeypatch.setattr(distributed, "allgather_arrays", lambda mine: sent.append(mine) or [mine])
    batches = [make_batches(r, c, 0, 2, [shard]) for shard in range(2)]
    for mine in batches:
        with_kl_penalty(r, mine, c, Scores(), **models)
    assert sorted(np.concatenate([x["index"] for x in sent])) == list(range(7))
    assert all(len(x["index"]) == len(x["kl"]) < 7 for x in sent)
    monkeypatch.setattr(distributed, "allgather_arrays", lambda mine: sent)
    for mine in batches:
        np.testing.assert_array_equal(with_kl_penalty(r, mine, c, Scores(), **models).reward, alone.reward)


@quick
@given(sizes, st.integers(1, 3))
def test_merge_puts_shares_back_in_order(lengths, hosts):
    r = make(lengths) if lengths else records.begin([])
    shares = [range(h, r.num_groups, hosts) for h in range(hosts)]
    back = records.merge([r.take_groups(s) for s in shares], shares)
    check(back)
    assert responses(back) == responses(r) and [p.position for p in back.prompts] == [p.position for p in r.prompts]


def test_every_epoch_visits_every_valid_response_once():
    r = make([[3, 1, 2], [4, 2], [1, 1]])
    batches = make_batches(r, settings_of(updates=2, epochs=3), step=5)
    for epoch in range(3):
        seen = np.concatenate([b.index for b in batches[2 * epoch : 2 * epoch + 2]])
        assert sorted(seen) == np.flatnonzero(r.valid).tolist()
    assert make_batches(r.replace(valid=np.zeros(len(r), bool)), settings_of(2, 3), 5) == []


def test_an_advantage_a_token_reaches_its_token():
    r = from_sequences([[1], [2]], [[4, 5], [6]])
    data, packing = pack(r, np.zeros(2), PackSettings(8, 8))
    (batch,) = fill_in([MiniBatch(data, packing, np.array([1, 0])[::-1])], r.replace(
        token_columns={"advantage": np.array([1.0, 2.0, 3.0])}))  # fmt: skip
    assert packing.collect(batch.data.advantages).tolist() == [1, 2, 3]


def test_begun_prompts_have_no_tokens_and_the_record_is_frozen():
    r = records.begin(Prompt(Problem(str(i), "", ""), np.zeros(1, np.int32), 3, i) for i in range(2))
    check(r)
    assert r.unfinished.all() and r.sample.tolist() == [0, 1, 2] * 2 and len(r.tokens) == 0
    assert r.identity == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        r.reward = None
