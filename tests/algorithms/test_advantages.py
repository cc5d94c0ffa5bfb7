"""Advantages against formulas written group by group, their special cases, and properties."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.algorithms.advantages import ADVANTAGES, advantages
from jaxrl.algorithms.hyper import Method, resolve
from jaxrl.rollouts import concat
from tests.algorithms.harness import make_group

quick = settings(max_examples=25, deadline=None, derandomize=True)
names = pytest.mark.parametrize("name", ADVANTAGES)
CENTRED = [n for n in ADVANTAGES if n != "reinforce_pp_baseline"]


def _run(name, rewards, ids, lengths=None, **constants):
    entry, hyper = resolve(ADVANTAGES, "advantage", name, constants)
    lengths = np.ones(len(rewards)) if lengths is None else lengths
    return entry.fn(SimpleNamespace(reward=rewards, group=ids, lengths=lengths, columns={}), hyper)


def _reference(name, rewards, ids, lengths):
    """Each method's formula, one group at a time; groups have at least two members here."""
    rewards, lengths = np.asarray(rewards, float), np.asarray(lengths, float)
    out = np.zeros(len(rewards))
    for g in set(ids):
        m = np.flatnonzero(np.asarray(ids) == g)
        r = rewards[m]
        if name == "grpo":
            out[m] = (r - r.mean()) / (np.sqrt(((r - r.mean()) ** 2).sum() / (len(r) - 1)) + 1e-6)
        elif name == "rloo":
            out[m] = [r[i] - np.delete(r, i).mean() for i in range(len(r))]
        elif name == "opo":
            out[m] = r - (lengths[m] * r).sum() / lengths[m].sum()
        else:
            out[m] = r - r.mean()
    if name == "gdpo":  # of one reward
        for g in set(ids):
            r = rewards[np.asarray(ids) == g]
            out[np.asarray(ids) == g] = (r - r.mean()) / (np.std(r, ddof=1) + 1e-4)
        return out / (np.std(out, ddof=1) + 1e-4)
    if name == "gpg":
        dead = sum(np.ptp(rewards[np.asarray(ids) == g]) == 0 for g in ids)
        out *= len(ids) / max(len(ids) - dead, 1)
    if name == "dler":
        out = out / (np.std(out, ddof=1) + 1e-6)
    if name == "reinforce_pp_baseline":
        tokens = np.repeat(out, lengths.astype(int))
        out = (out - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
    return out


@names
@quick
@given(seed=st.integers(0, 10**6))
def test_formula(name, seed):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(np.arange(5) * 7 - 3, rng.integers(2, 6, 5)))
    rewards, lengths = rng.choice([-0.5, 0.0, 0.3, 1.0], len(ids)), rng.integers(1, 30, len(ids))
    found = _run(name, rewards, ids, lengths)
    np.testing.assert_allclose(found, _reference(name, rewards, ids, lengths), rtol=1e-9, atol=1e-12)
    order = rng.permutation(len(ids))
    np.testing.assert_allclose(
        _run(name, rewards[order], ids[order], lengths[order]), found[order], atol=1e-12
    )


@pytest.mark.parametrize("name", CENTRED)
def test_equal_rewards_give_exactly_zero(name):
    """0.1 has no exact mean over 3: the decision is by comparison, not by the size of a rounding error."""
    rewards = np.array([0.1, 0.1, 0.1, 1.0, 0.0, 0.7, 0.7])
    found = _run(name, rewards, [0, 0, 0, 1, 1, 2, 2], [5, 1, 3, 2, 2, 9, 4])
    assert np.all(found[[0, 1, 2, 5, 6]] == 0) and found[3] > 0 > found[4]
    assert np.all(_run(name, np.full(4, 0.1), [0, 0, 0, 0]) == 0)


def test_nearly_equal_rewards_are_not_equal():
    found = _run("grpo", [0.1, 0.1 + 1e-15, 0.1], [0, 0, 0])
    assert np.all(found != 0)


@names
def test_group_of_one(name):
    """verl's convention by default (mean 0, std 1); "zero" takes the completion out."""
    rewards, ids = [0.8, 1.0, 0.0], [5, 1, 1]
    reward, zero = (_run(name, rewards, ids, singleton=s) for s in ("reward", "zero"))
    assert reward[0] > 0.3
    if name in CENTRED:
        assert zero[0] == 0
    alone = _run(name, [0.8, 0.8], [0, 1])  # nothing to normalise by
    assert np.all(np.abs(alone) <= 1)
    with pytest.raises(ValueError, match="singleton='none' must be one of reward, zero"):
        _run(name, rewards, ids, singleton="none")


def test_constants_of_verl_and_trl():
    rewards, ids = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.5]), [0, 0, 0, 1, 1, 1]
    std = np.std(rewards[:3], ddof=1)
    np.testing.assert_allclose(_run("grpo", rewards, ids)[0], (2 / 3) / (std + 1e-6), rtol=1e-12)
    np.testing.assert_allclose(_run("grpo", rewards, ids, eps=1e-4)[0], (2 / 3) / (std + 1e-4), rtol=1e-12)
    np.testing.assert_allclose(
        _run("grpo", rewards, ids, ddof=0)[0], (2 / 3) / (np.std(rewards[:3]) + 1e-6), rtol=1e-12
    )
    batch = np.std(rewards, ddof=1) + 1e-4
    np.testing.assert_allclose(
        _run("grpo", rewards, ids, eps=1e-4, scale="batch")[0], (2 / 3) / batch, rtol=1e-12
    )
    np.testing.assert_allclose(_run("grpo", rewards, ids, scale="none")[0], 2 / 3, rtol=1e-12)
    with pytest.raises(ValueError, match="scale='global' must be one of group, batch, none"):
        _run("grpo", rewards, ids, scale="global")
    with pytest.raises(ValueError, match="alpha='trl' must be one of paper, verl"):
        _run("gpg", rewards, ids, alpha="trl")


def test_gpg_counts_informative_samples_where_verl_counts_nonzero_rewards():
    rewards, ids = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(_run("gpg", rewards, ids)[:2], [1.5, -1.5])  # 6 / 2 * 0.5
    np.testing.assert_allclose(_run("gpg", rewards, ids, alpha="verl")[:2], [1.0, -1.0])  # 6 / 3 * 0.5
    np.testing.assert_allclose(_run("gpg", rewards, ids, f_norm=3.0)[:2], [0.5, -0.5])


@names
@pytest.mark.parametrize("rewards", [[0.0, 0.0], [1.0], [0.5, -0.5, 2.0]])
def test_small_batches_are_finite(name, rewards):
    for lengths in (np.zeros(len(rewards)), np.ones(len(rewards))):
        assert np.all(np.isfinite(_run(name, rewards, np.zeros(len(rewards), int), lengths)))


@names
def test_groups_leave_ungraded_completions_out(name):
    """Invalid completions get 0 and change no other completion's advantage."""
    full = [make_group([3, 5, 2], [1, 0, 0]), make_group([4, 4], [1, 0])]
    extra = [
        make_group([3, 9, 5, 2], [1, 1, 0, 0], valid=[True, False, True, True]),
        make_group([4, 4, 7], [1, 0, 1], valid=[True, True, False]),
        make_group([1, 1], [1, 0], valid=[False, False]),
    ]
    expected, found = advantages(concat(full), name), advantages(concat(extra), name)
    valid = concat(extra).valid
    np.testing.assert_allclose(found[valid], expected)
    np.testing.assert_array_equal(found[~valid], 0)
    assert advantages(concat([]), name).tolist() == []
    assert advantages(extra[2], name).tolist() == [0.0, 0.0]


def test_gdpo_tells_apart_what_a_sum_confounds():
    """TRL's code written out: two rewards of different scale, each normalised in its group, weighted, summed, and
    divided by the batch's spread. (1, 0) and (0, 1) have one sum, and not one advantage."""
    rng = np.random.default_rng(0)
    for over in ("responses", "tokens"):
        right, brief = rng.integers(0, 2, (5, 6)).astype(float), rng.random((5, 6)) * 100
        right[0], brief[1] = 1.0, 7.0  # groups without spread in one of them
        lengths = rng.integers(1, 20, 30)
        total = np.zeros((5, 6))
        for values, weight in ((right, 1.0), (brief, 0.5)):
            for g in range(5):
                std = values[g].std(ddof=1)
                total[g] += weight * (values[g] - values[g].mean()) / (std + 1e-4)
        expected = (total - total.mean()).ravel() / (total.std(ddof=1) + 1e-4)
        if over == "tokens":
            tokens = np.repeat(total.ravel(), lengths)
            expected = (total.ravel() - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-4)
        columns = {"reward/correct": right.ravel(), "weight/correct": np.ones(30), "reward/brief": brief.ravel(),
                   "weight/brief": np.full(30, 0.5), "waits": np.arange(30)}  # fmt: skip
        entry, hyper = resolve(ADVANTAGES, "advantage", "gdpo", {"over": over})
        record = SimpleNamespace(reward=np.zeros(30), group=np.repeat(range(5), 6), lengths=lengths, columns=columns)
        np.testing.assert_allclose(entry.fn(record, hyper), expected, rtol=1e-9, atol=1e-12)
    columns = {"reward/a": np.array([1.0, 0.0, 0.0, 0.0]), "reward/b": np.array([0.0, 1.0, 1.0, 0.0])}
    record = SimpleNamespace(reward=sum(columns.values()), group=np.zeros(4, int), lengths=np.ones(4), columns=columns)
    entry, hyper = resolve(ADVANTAGES, "advantage", "gdpo")
    found = entry.fn(record, hyper)
    assert found[0] > found[1] == found[2] > found[3]
    plain = ADVANTAGES["grpo"].fn(record, ADVANTAGES["grpo"].defaults)
    assert plain[0] == plain[1] == plain[2]
    # the scale of a reward is not its weight
    larger = SimpleNamespace(**vars(record) | {"columns": columns | {"reward/b": columns["reward/b"] * 1000}})
    np.testing.assert_allclose(entry.fn(larger, hyper), found, rtol=1e-3)


def test_an_advantage_may_be_one_a_token(monkeypatch):
    group = make_group([1, 3, 2], [1, 1, 0], valid=[True, False, True])
    by_token = lambda rollouts, hyper: np.arange(len(rollouts.tokens)) + 1.0  # noqa: E731
    monkeypatch.setitem(ADVANTAGES, "by_token", Method(by_token))
    assert advantages(group, "by_token").tolist() == [1, 0, 0, 0, 2, 3]
    monkeypatch.setitem(ADVANTAGES, "wrong", Method(lambda rollouts, hyper: np.zeros(7)))
    with pytest.raises(ValueError, match=r"'wrong' must return \[2\], one a response, or \[3\].*not \[7\]"):
        advantages(group, "wrong")
