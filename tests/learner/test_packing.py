"""Packing as a property of its output: nothing lost, nothing mixed, shapes few, waste small."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.batch import most_rows
from jaxrl.errors import UserError
from jaxrl.learner.packing import PackSettings, capacity_bucket, fill, pack, plan, sizes
from jaxrl.rollouts import from_sequences
from jaxrl.runtime.config import base_config


def sequences(lengths, seed=0):
    """(rollouts, advantages) with recognisable content; lengths: pairs (prompt, response)."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 1000, p) for p, _ in lengths]
    responses = [rng.integers(1000, 2000, n) for _, n in lengths]
    advantages, logprobs = rng.normal(size=len(lengths)), [rng.normal(size=n) for _, n in lengths]
    return from_sequences(prompts, responses, logprobs), advantages


pairs = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 44)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(pairs, st.sampled_from([64, 96]), st.sampled_from([64, 128, 500]), st.sampled_from([1, 2, 4]))
def test_every_sequence_comes_back_whole(lengths, row, micro_tokens, shards):
    rollouts, advantages = sequences(lengths)
    batch, packing = pack(rollouts, advantages, PackSettings(row, micro_tokens, shards))
    M, R, T = packing.shape
    assert batch.tokens.shape == (M, R, T) and R % shards == 0 and T == row
    assert M & (M - 1) == 0 and M // 2 < batch.num_micro <= M
    assert R == shards or R * T <= micro_tokens
    assert not batch.segment_ids[batch.num_micro :].any()
    tokens, segments, positions = (getattr(batch, k).reshape(M * R, T) for k in ("tokens", "segment_ids", "positions"))
    seen = np.zeros((M * R, T), int)
    for i, response in enumerate(rollouts.split_tokens()):
        prompt, index = rollouts.prompts[i].tokens, packing.index[packing.offsets[i] : packing.offsets[i + 1]]
        row, begin = divmod(index[0] - len(prompt), T)
        end = begin + len(prompt) + len(response)
        assert (index == row * T + np.arange(begin + len(prompt), end)).all()
        np.testing.assert_array_equal(tokens[row, begin:end], np.concatenate([prompt, response]))
        np.testing.assert_array_equal(positions[row, begin:end], np.arange(end - begin))
        assert len(set(segments[row, begin:end])) == 1 and segments[row, begin] > 0
        assert begin == 0 or segments[row, begin - 1] == segments[row, begin] - 1  # contiguous, counting up
        seen[row, begin:end] += 1
    assert (seen == (segments > 0)).all()
    assert seen.sum() == sum(p + n for p, n in lengths)
    assert batch.num_tokens == sum(n for _, n in lengths) == batch.response_mask.sum()
    assert batch.num_sequences == len(lengths)
    assert (packing.collect(batch.sampler_logprobs) == rollouts.logprobs).all()
    assert (packing.collect(batch.advantages) == np.float32(rollouts.per_token(advantages))).all()
    assert (packing.collect(packing.spread(rollouts.tokens)) == rollouts.tokens).all()
    assert (batch.advantages[batch.response_mask == 0] == 0).all()
    per_shard = batch.response_mask.reshape(M, shards, -1).sum(-1)
    assert per_shard.max() <= batch.capacity <= R // shards * T


def test_forced_tokens_and_ungraded_responses_are_read_but_not_trained_on():
    rollouts, advantages = sequences([(3, 6), (2, 5), (4, 4)])
    sampled = np.ones(15, bool)
    sampled[[2, 3, 7]] = False
    rollouts = rollouts.replace(sampled=sampled, valid=np.array([True, True, False]))
    batch, packing = pack(rollouts, advantages, PackSettings(32, 64))
    trained = packing.collect(batch.response_mask)
    assert trained.tolist() == [1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0]
    assert batch.num_tokens == 8 == batch.response_mask.sum() and batch.num_sequences == 2
    assert (packing.collect(batch.tokens) == rollouts.tokens).all()  # the policy conditions on all of them


@settings(max_examples=60, deadline=None)
@given(pairs, st.sampled_from([(1, [0]), (4, [2]), (4, [0, 3]), (8, [1, 2, 5])]), st.booleans(), st.integers(0, 9))
def test_a_host_that_packs_its_own_rows_has_what_one_that_packs_all_has_there(lengths, shards, share, seed):
    """Hosts agree without looking at each other's tokens: a plan is made of one number a response."""
    (shards, own), rng = shards, np.random.default_rng(seed)
    r, advantages = sequences(lengths, seed)
    r = r.replace(group=np.sort(rng.integers(0, len(r), len(r))), valid=rng.random(len(r)) < 0.8,
                  sampled=rng.random(len(r.tokens)) < 0.8)  # fmt: skip
    how = PackSettings(96, 400, shards, share_prompts=share)
    whole, everything = pack(r, advantages, how)
    packing = plan(sizes(r), how, own)
    mine = r.take(packing.responses)
    part = fill(packing, mine, advantages[packing.responses], how)
    depth = whole.tokens.shape[1] // shards
    rows = np.concatenate([np.arange(depth * s, depth * (s + 1)) for s in own])
    for name, value in vars(whole).items():
        if np.ndim(value) == 3:
            np.testing.assert_array_equal(value[:, rows], getattr(part, name), name)
        else:
            assert value == getattr(part, name), name
    assert (packing.collect(part.tokens) == mine.tokens).all()
    for name in ("num_micro", "num_tokens", "capacity", "tokens", "context", "waste", "waste_to_longest"):
        assert getattr(packing, name) == getattr(everything, name)


@pytest.mark.parametrize("share", [False, True])
def test_the_plan_counts_tokens_and_what_they_see(share):
    r = from_sequences([np.ones(5), np.ones(3)], [np.ones(n) for n in (4, 7, 2, 6, 9)], group=np.array([0, 0, 0, 1, 1]))
    batch, packing = pack(r, np.ones(5), PackSettings(48, 96, share_prompts=share))
    live = batch.segment_ids > 0
    assert packing.tokens == live.sum() and packing.context == pytest.approx((batch.positions[live] + 1).mean())


def test_stale_is_what_an_older_version_drew():
    rollouts, advantages = sequences([(3, 4), (2, 3)])
    rollouts = rollouts.replace(version=np.array([3, 3, 4, 5, 5, 5, 5], np.int32))
    batch, packing = pack(rollouts, advantages, PackSettings(32, 64), step=5)
    assert packing.collect(batch.stale).tolist() == [1, 1, 1, 0, 0, 0, 0] and batch.stale.sum() == 3
    assert not pack(rollouts, advantages, PackSettings(32, 64))[0].stale.any()


def test_an_advantage_a_token():
    rollouts, _ = sequences([(3, 4), (2, 3)])
    batch, packing = pack(rollouts, np.arange(7), PackSettings(32, 64))
    assert packing.collect(batch.advantages).tolist() == [*range(7)] and batch.advantages.sum() == 21


def lspo_like(prompts, group, longest, seed):
    """Log-normal response lengths, the middle and the very longest prompts removed as LSPO does."""
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(np.log(longest / 4), 0.6, 3 * prompts).clip(1, longest)
    low, high, most = np.quantile(mean, [0.3, 0.65, 0.95])
    mean = mean[(mean <= low) | ((mean >= high) & (mean <= most))][:prompts]
    response = np.rint(mean[:, None] * rng.lognormal(0, 0.4, (len(mean), group))).clip(1, longest).astype(int)
    prompt = np.repeat(rng.integers(longest // 40, longest // 10, len(mean)), group)
    return list(zip(prompt, response.ravel(), strict=True))


@pytest.mark.parametrize("prompts, group, longest, micro, shards", [
    (128, 16, 4096, 32768, 8), (64, 8, 2048, 8192, 1), (64, 8, 3072, 8192, 1), (256, 8, 3072, 65536, 16)])
def test_waste_on_lspo_batches_is_below_five_percent(prompts, group, longest, micro, shards):
    for seed in range(3):
        lengths = lspo_like(prompts, group, longest, seed)
        row = -(-max(p + n for p, n in lengths) // 1024) * 1024  # 3072: 4096, prompts included
        _, packing = pack(*sequences(lengths), PackSettings(row, micro, shards))
        print(f"{prompts} x {group}, answers up to {longest}, rows of {row}: waste {packing.waste:.1%}, padded to the "
              f"longest {packing.waste_to_longest:.1%}")
        assert packing.waste < 0.05
        assert packing.waste_to_longest > 0.5  # what packing saves: padding to the longest wastes most


def test_response_tokens_are_dealt_evenly_over_shards():
    lengths = lspo_like(64, 8, 1024, seed=3)
    batch, packing = pack(*sequences(lengths), PackSettings(1280, 8 * 4 * 1280, 8))
    assert packing.shape[1] == 32 and batch.num_micro > 1
    per_shard = batch.response_mask[: batch.num_micro].reshape(-1, packing.shape[1] // 8 * packing.shape[2]).sum(1)
    assert per_shard.std() < 0.1 * per_shard.mean()


def test_packing_is_deterministic_and_indifferent_to_what_does_not_matter():
    lengths = lspo_like(16, 4, 256, seed=5)
    a, b = (pack(*sequences(lengths), PackSettings(320, 1280))[0] for _ in range(2))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert a.capacity == b.capacity


@pytest.mark.parametrize("lengths, message", [
    ([], "no sequences"),
    ([(3, 4), (0, 5)], "sequence 1 has an empty"),
    ([(3, 0)], "sequence 0 has an empty"),
    ([(3, 4), (20, 45)], "row_tokens: rows of 64 tokens cannot hold a sequence of 65"),
])
def test_bad_sequences_are_one_line(lengths, message):
    with pytest.raises(UserError, match=message) as error:
        pack(*sequences(lengths), PackSettings(64, 64))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompts, group, longest, micro, shards", [(64, 8, 3072, 8192, 1), (32, 8, 1024, 16384, 1),
                                                                    (128, 8, 2048, 32768, 8)])
def test_few_shapes(prompts, group, longest, micro, shards):
    """A run's batches meet few (shape, capacity), each one compilation of the learner: 20 steps whose answers also
    get longer on the way, from a third to the limit."""
    shapes = set()
    for seed in range(20):
        lengths = lspo_like(prompts, group, longest, seed)
        lengths = [(p, max(1, n * (10 + seed) // 30)) for p, n in lengths]
        row = -(-longest * 5 // 4 // 128) * 128
        batch, packing = pack(*sequences(lengths), PackSettings(row, micro, shards, prompts * group))
        shapes.add((packing.shape, batch.capacity))
    assert len(shapes) <= 4


def test_micro_batches_of_any_batch_are_as_many_as_the_most_rows_need():
    for n in (1, 7, 40):
        batch, packing = pack(*sequences([(3, 20)] * n), PackSettings(32, 4 * 4 * 32, most_rows=40))
        assert packing.shape == (10, 4, 32) and batch.num_micro == -(-n // 4)


@settings(max_examples=60, deadline=None)
@given(pairs, st.integers(64, 300))
def test_most_rows_is_a_bound(lengths, row):
    config = base_config()
    config.sampling.max_prompt, config.sampling.max_tokens, config.batch.row_tokens = 20, 44, row
    rows = pack(*sequences(lengths), PackSettings(row, row))[0].num_micro  # of one row each
    assert rows <= most_rows(config, len(lengths))
    most = len(lengths) * [(20, 44)]
    assert pack(*sequences(most), PackSettings(row, row))[0].num_micro == most_rows(config, len(lengths))


def test_capacity_buckets():
    assert capacity_bucket(1, 1600) == 400 and capacity_bucket(401, 1600) == 800 and capacity_bucket(1600, 1600) == 1600
    assert capacity_bucket(5, 5) == 5
