"""What must not matter to a loss: padding, packing, order, micro-batches; and identities between losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.algorithms.aggregation import AGGREGATIONS
from jaxrl.algorithms.inputs import LossInputs
from jaxrl.algorithms.losses import LOSSES
from jaxrl.algorithms.segments import count_sequences, run_index, sequence_mean, sequence_sum
from tests.algorithms.harness import ROWS, WIDTH, count, pack, random_sequences, run_loss

quick = settings(max_examples=6, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
lengths = st.lists(st.integers(1, 20), min_size=2, max_size=9)
aggregations = st.sampled_from(AGGREGATIONS)
names = pytest.mark.parametrize("name", LOSSES)


def _one_per_row(sequences):
    return pack(sequences, [[i] for i in range(len(sequences))], None)


def _by_sequence(grad, places):
    return [grad[r, where] for r, where in (places[i] for i in sorted(places))]


def _assert_same(name, aggregation, sequences, batch, places):
    """The batch gives the loss and gradients of one padded row per sequence."""
    plain, plain_places = _one_per_row(sequences)
    expected = run_loss(name, plain, aggregation, norm_length=11.0)
    found = run_loss(name, batch, aggregation, norm_length=11.0)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-10, atol=1e-12)
    pairs = zip(_by_sequence(found[1], places), _by_sequence(expected[1], plain_places), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
    for k in expected[3]:
        np.testing.assert_allclose(found[3][k], expected[3][k], rtol=1e-10, err_msg=k)


@names
@quick
@given(seed=seeds, lengths=lengths, aggregation=aggregations)
def test_packing_padding_prompts_and_order_do_not_matter(name, seed, lengths, aggregation):
    """Any split of any order of the sequences into packed rows, with prompts and junk between, equals
    padded rows.
    """
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng, lengths)
    order, rows, room = rng.permutation(len(sequences)), [[]], WIDTH
    for i in order:
        need = len(sequences[i]["logp"]) + 3
        if need > room or rng.random() < 0.2:
            rows.append([])
            room = WIDTH
        rows[-1].append(int(i))
        room -= need
    _assert_same(name, aggregation, sequences, *pack(sequences, rows, rng))


@names
@quick
@given(seed=seeds, lengths=lengths, aggregation=aggregations)
def test_micro_batches_add_up(name, seed, lengths, aggregation):
    """Loss, gradient and statistics of a split, with global counts, sum to those of the whole."""
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng, lengths)
    batch, _ = pack(sequences, [[i] for i in range(len(sequences))], rng)
    options = {"aggregation": aggregation, "counts": count(batch), "norm_length": 7.0}
    whole = run_loss(name, batch, **options)
    options["whole"] = batch
    cut = int(rng.integers(1, len(sequences)))
    parts = [
        run_loss(name, {k: v[s] for k, v in batch.items()}, **options) for s in (np.s_[:cut], np.s_[cut:])
    ]
    np.testing.assert_allclose(parts[0][0] + parts[1][0], whole[0], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), whole[1], rtol=1e-10, atol=1e-15)
    for k in whole[3]:
        np.testing.assert_allclose(parts[0][3][k] + parts[1][3][k], whole[3][k], rtol=1e-10, err_msg=k)


@names
@quick
@given(seed=seeds, lengths=lengths)
def test_masked_positions_may_hold_anything(name, seed, lengths):
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng, lengths)
    batch, _ = pack(sequences, [[i] for i in range(len(sequences))], rng)
    clean = run_loss(name, batch)
    junk = rng.choice([np.nan, np.inf, -np.inf, 1e30], batch["logp"].shape)
    dirty = {
        k: np.where(batch["response_mask"] == 0, junk, v) if v.dtype == float else v for k, v in batch.items()
    }
    found = run_loss(name, dirty)
    assert found[0] == clean[0]
    np.testing.assert_array_equal(found[1], clean[1])


@quick
@given(seed=seeds, lengths=lengths)
def test_gspo_token_equals_gspo(seed, lengths):
    """In value always, in gradient because the advantage is one number per sequence."""
    batch, _ = _one_per_row(random_sequences(np.random.default_rng(seed), lengths))
    for clip in (3e-4, 0.2):
        constants = {"clip_low": clip, "clip_high": clip}
        a, b = (run_loss(n, batch, overrides=constants) for n in ("gspo", "gspo_token"))
        np.testing.assert_allclose(a[0], b[0], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(a[2], b[2], rtol=1e-12)
        np.testing.assert_allclose(a[1], b[1], rtol=1e-10, atol=1e-15)


@quick
@given(seed=seeds, lengths=lengths)
def test_maspo_with_a_wide_gate_is_the_unclipped_policy_gradient(seed, lengths):
    batch, _ = _one_per_row(random_sequences(np.random.default_rng(seed), lengths))
    open_gate = {"sigma_base": 1e9, "sigma_high": 1e12}
    unclipped = {"clip_low": 1e9, "clip_high": 1e9}
    a, b = run_loss("maspo", batch, overrides=open_gate), run_loss("dapo", batch, overrides=unclipped)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-12, atol=1e-18)


@quick
@given(seed=seeds, lengths=lengths)
def test_identities_between_losses(seed, lengths):
    """Special cases that must coincide: LUSPO is |y| GSPO; DAPO, PPO and BAPO are one clip; SAPO is flat at
    tau -> 0.
    """
    sequences = random_sequences(np.random.default_rng(seed), lengths)
    batch, _ = _one_per_row(sequences)
    clip = {"clip_low": 0.002, "clip_high": 0.003}
    gspo = run_loss("gspo", batch, overrides=clip)[2]
    n = batch["response_mask"].sum(1)
    np.testing.assert_allclose(
        run_loss("luspo", batch, overrides=clip)[0], np.mean(n * gspo[:, 0]), rtol=1e-10, atol=1e-14
    )
    dapo = run_loss("dapo", batch)
    ppo = run_loss("ppo", batch, overrides={"clip_high": 0.28, "dual_clip": 0.0})
    fixed = {"low": 0.8, "low_max": 0.8, "high": 1.28, "high_max": 1.28, "dual_clip": 0.0}
    bapo = run_loss("bapo", batch, overrides=fixed)
    assert dapo[0] == ppo[0]
    np.testing.assert_allclose(bapo[0], dapo[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(bapo[1], dapo[1], rtol=1e-12, atol=1e-18)
    loose = run_loss("dapo", batch, "seq-mean-token-mean", {"clip_low": 1e9, "clip_high": 1e9})
    flat = run_loss("sapo", batch, overrides={"tau_pos": 1e-6, "tau_neg": 1e-6})
    np.testing.assert_allclose(flat[1], loose[1], rtol=1e-5, atol=1e-12)


@quick
@given(seed=seeds)
def test_sequence_reductions(seed):
    """run_index, sequence_sum, sequence_mean, count_sequences against loops, for any ids (repeats across
    runs too).
    """
    rng = np.random.default_rng(seed)
    ids = np.repeat(rng.integers(-2, 3, (ROWS, WIDTH // 4)), 4, axis=1).astype(np.int32)
    mask, x = rng.integers(0, 2, ids.shape), rng.normal(size=ids.shape)
    with jax.enable_x64(True):
        index, total, mean, number = _reductions(ids, mask, x)
    runs = 0
    for r in range(ROWS):
        starts = [0, *(i for i in range(1, WIDTH) if ids[r, i] != ids[r, i - 1]), WIDTH]
        for k, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
            assert np.all(index[r, a:b] == k)
            np.testing.assert_allclose(total[r, a:b], x[r, a:b].sum(), atol=1e-12)
            chosen = x[r, a:b][mask[r, a:b] == 1]
            np.testing.assert_allclose(mean[r, a:b], chosen.mean() if len(chosen) else 0, atol=1e-12)
            runs += len(chosen) > 0
    assert number == runs


@jax.jit
def _reductions(ids, mask, x):
    mask = jnp.asarray(mask, x.dtype)
    return run_index(ids), sequence_sum(x, ids), sequence_mean(x, mask, ids), count_sequences(mask, ids)


@pytest.mark.parametrize("name", ["dapo", "gspo", "gmpo", "maspo", "bapo"])
def test_vmap_over_batches(name):
    """A loss under vmap equals the loss on each batch."""
    batches = [_one_per_row(random_sequences(np.random.default_rng(s), [3, 5, 8]))[0] for s in range(2)]
    entry = LOSSES[name]
    order = ("logp", "old_logp", "advantages", "response_mask", "sequence_ids")
    with jax.enable_x64(True):
        stacked = LossInputs(*(jnp.asarray(np.stack([b[k] for b in batches])) for k in order))
        together = jax.jit(jax.vmap(lambda x: entry.fn(x, entry.defaults)[0]))(stacked)
    fixed = {} if entry.prepare is None else {"low_step": 0.0, "high_step": 0.0}
    for batch, found in zip(batches, together, strict=True):
        mask = batch["response_mask"] == 1
        expected = run_loss(name, batch, overrides=fixed)[2]
        np.testing.assert_allclose(np.asarray(found)[mask], expected[mask], rtol=1e-12, atol=1e-14)
