"""The update step against the same mathematics written out plainly: one sequence at a time, full softmax, no packing.

The optimizer is SGD with momentum and rate 1, so that the first update's change of the parameters is the gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.learner.packing import PackSettings, pack
from jaxrl.learner.state import Optimizer, init_state
from jaxrl.learner.update import PER_TOKEN, Objective, build_programs, place_batch
from jaxrl.rollouts import from_sequences
from jaxrl.runtime.mesh import make_mesh
from models.config import DecoderConfig
from models.decoder import Decoder, init_params, logits

CONFIG = DecoderConfig(29, 16, 24, 2, 4, 2, 8, qk_norm=True, tie_embeddings=True, model_type="qwen3", init_std=0.3)
SGD = Optimizer(optax.sgd(1.0, momentum=0.9), lambda step: jnp.float32(1.0) + step)
FULL = Objective(
    loss="dapo", temperature=0.8, kl_coef=0.1, kl_kind="k3", kl_value_clamp=0.05, kl_unbiased=True, entropy_coef=0.05,
    correction="token_tis", correction_hyper={"cap": 1.1})



@functools.cache
def mesh():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@functools.cache
def programs(objective_index: int):
    return build_programs(CONFIG, mesh(), SGD, OBJECTIVES[objective_index])


ICEPOP = dict(correction="icepop", correction_hyper={"low": 0.8, "high": 1.2, "drop_rejected": True})
OBJECTIVES = [
    FULL, Objective(on_policy=True), Objective(), Objective(loss="bapo", loss_hyper={"target": 0.35}, **ICEPOP),
    Objective(on_policy=True, aggregation="seq-mean-token-sum-norm", norm_length=7.0, entropy_advantage=(0.3, 3.0),
              **ICEPOP),
]


@functools.cache
def data():
    """Ten sequences with made-up old, sampler and reference log-probs near the model's own."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 29, rng.integers(2, 9)) for _ in range(10)]
    responses = [rng.integers(1, 29, rng.integers(1, 20)) for _ in range(10)]
    own = np.asarray(jax.jit(plain_logprobs)(params(), *padded(prompts, responses))[0])
    own = [x[len(p) : len(p) + len(r)] for x, p, r in zip(own, prompts, responses, strict=True)]
    old, sampler, reference = ([x + 0.3 * rng.normal(size=len(x)) for x in own] for _ in range(3))
    return prompts, responses, rng.normal(size=10), old, sampler, reference


@functools.cache
def params():
    return init_params(CONFIG, jax.random.key(3))


def padded(prompts, values, fill=None):
    """values of each response (numbers or arrays) at its place in [10, 32] rows of one sequence each.

    Without `fill`, values are the responses and the prompts are written too: the tokens, and the response mask."""
    out, mask = np.zeros((len(prompts), 32), np.int32 if fill is None else np.float32), np.zeros((len(prompts), 32))
    for i, (p, v) in enumerate(zip(prompts, values, strict=True)):
        n = len(data()[1][i] if fill is not None else v)
        out[i, : len(p)] = p if fill is None else fill
        out[i, len(p) : len(p) + n], mask[i, len(p) : len(p) + n] = v, 1
    return (out, mask) if fill is None else out


def plain_logprobs(p, tokens, mask, temperature=0.8):
    """(log-probs, entropies) [10, 32] of the responses: one sequence a row, no segments, the whole softmax."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = Decoder(CONFIG).apply({"params": p}, tokens, positions)
    log_p = jax.nn.log_softmax(logits(p, hidden) / temperature)[:, :-1]
    logp = jnp.take_along_axis(log_p, tokens[:, 1:, None], 2)[..., 0]
    pad = lambda x: jnp.pad(x, ((0, 0), (1, 0))) * mask  # noqa: E731
    return pad(logp), pad(-jnp.sum(jnp.exp(log_p) * log_p, 2))


def plain_data():
    """tokens, mask, advantages, old, sampler, reference: [10, 32] each."""
    prompts, responses, *values = data()
    return *padded(prompts, responses), *(padded(prompts, v, fill=0) for v in values)


def batch_of(row_tokens=64, micro_tokens=12 * 64, keep=slice(None)):
    prompts, responses, advantages, old, sampler, reference = (x[keep] for x in data())
    rollouts = from_sequences(prompts, responses, sampler)
    batch, packing = pack(rollouts, np.array(advantages), PackSettings(row_tokens, micro_tokens))
    old, reference = (packing.spread(np.concatenate(x)) for x in (old, reference))
    return batch.replace(old_logprobs=old, ref_logprobs=reference), packing


def update(index, batch, state=None):
    """(gradient, metrics, state) of one update from the fixed parameters."""
    state = init_state(CONFIG, SGD, mesh(), params=jax.tree.map(jnp.copy, params())) if state is None else state
    before = jax.tree.map(np.array, state.params)
    state, metrics = programs(index).update(state, place_batch(batch, mesh()))
    return jax.tree.map(lambda a, b: a - np.array(b), before, state.params), jax.device_get(metrics), state


def close(got, want, tolerance=2e-5):
    """Trees agree relative to the norm of the whole: what rounding may do to a sum over tokens."""
    scale = float(optax.tree.norm(want))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.abs(np.float64(a) - np.float64(b)).max() < tolerance * scale, jax.tree_util.keystr(path)


def plain_objective(p):
    """FULL, written out: (loss, statistics)."""
    tokens, mask, a, old, sampler, reference = plain_data()
    logp, entropy = plain_logprobs(p, tokens, mask)
    ratio = jnp.exp(logp - old)
    loss = -jnp.minimum(ratio * a, jnp.clip(ratio, 1 - 0.2, 1 + 0.28) * a)
    weight = np.minimum(np.exp(old - sampler), 1.1)
    kl = jnp.exp(reference - logp) - (reference - logp) - 1
    kl = jnp.where(kl < 0.05, kl, 0.05) * jnp.exp(logp - old)
    mean = lambda x: jnp.sum(x * mask) / mask.sum()  # noqa: E731
    stats = {
        "kl": mean(kl), "entropy": mean(entropy), "logprob_diff/mean": mean(np.abs(old - sampler)),
        "clip_fraction/low": mean((ratio < 0.8) & (a < 0)), "clip_fraction/high": mean((ratio > 1.28) & (a > 0)),
        "correction/weight": mean(weight), "ratio/mean": mean(ratio), "ratio/max": jnp.max(ratio * mask),
        "logprob_diff/max": np.abs(old - sampler).max(),
    }
    return mean(weight * loss + 0.1 * kl - 0.05 * entropy), stats


def test_loss_gradient_and_metrics_match_the_plain_form():
    got, metrics, _ = update(0, batch_of()[0])
    (loss, expected), gradient = jax.jit(jax.value_and_grad(plain_objective, has_aux=True))(params())
    close(got, gradient)
    expected |= {"loss": loss, "grad_norm": optax.tree.norm(gradient), "nonfinite": 0, "lr": 1.0}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=2e-5, abs=1e-6), name
    assert expected["clip_fraction/low"] > 0 and expected["clip_fraction/high"] > 0  # both bounds are reached


def one_per_row():
    """The same ten sequences without packing: each alone in a row, padded to the longest."""
    parts = [batch_of(row_tokens=32, micro_tokens=32, keep=slice(i, i + 1))[0] for i in range(10)]
    rows = {k: np.concatenate([getattr(b, k) for b in parts], axis=1) for k in PER_TOKEN}
    return parts[0].replace(**rows, num_tokens=np.float32(sum(b.num_tokens for b in parts)),
                            num_sequences=np.float32(10), capacity=320)


def test_the_cut_into_rows_and_micro_batches_does_not_matter():
    """One micro-batch of packed rows, several, one sequence a row, and rows in another order and with more capacity."""
    whole, packing = batch_of()
    assert packing.shape == (1, 3, 64) and whole.segment_ids.max() > 1
    want, metrics, _ = update(0, whole)
    several, packing = batch_of(row_tokens=32, micro_tokens=2 * 32)
    assert whole.num_micro == 1 and several.num_micro > 2 and packing.shape[0] > several.num_micro
    shuffled = whole.replace(**{k: getattr(whole, k)[:, [2, 0, 1]] for k in PER_TOKEN})
    for other in (several, one_per_row(), shuffled):
        got, other_metrics, _ = update(0, other)
        close(got, want, 2e-6)
        for name in metrics:
            assert other_metrics[name] == pytest.approx(float(metrics[name]), rel=1e-5, abs=1e-6), name


def test_exactly_one_update_needs_no_score():
    """on_policy equals scoring first: at ratio 1 the loss is -A and its gradient -A grad logp."""
    batch, packing = batch_of()
    want, metrics, _ = update(1, batch)
    scored, entropy = programs(2).score(params(), place_batch(batch, mesh()))
    plain = jax.jit(plain_logprobs, static_argnums=3)(params(), *plain_data()[:2], 1.0)[0]
    responses = np.split(packing.collect(scored), packing.offsets[1:-1])
    for got, row, prompt in zip(responses, plain, data()[0], strict=True):
        np.testing.assert_allclose(got, row[len(prompt) : len(prompt) + len(got)], atol=1e-5)
    assert not np.asarray(scored)[batch.response_mask == 0].any()
    got, _, _ = update(2, batch.replace(old_logprobs=np.asarray(scored)))
    close(got, want, 2e-6)
    assert metrics["ratio/mean"] == metrics["ratio/max"] == 1 and metrics["policy/old_kl"] == 0
    assert metrics["entropy"] == pytest.approx(np.asarray(entropy).sum() / batch.num_tokens, rel=1e-5)


@pytest.mark.parametrize("index", [1, 2], ids=["one update", "scored"])
def test_stale_tokens_take_the_log_probs_under_which_they_were_drawn(index):
    prompts, responses, a, old, sampler, _ = data()
    stale = [0, *map(len, responses[1:9]), len(responses[9]) // 2]  # fresh, older, and one that was continued
    version = np.concatenate([np.arange(len(r)) >= s for r, s in zip(responses, stale, strict=True)])
    rollouts = from_sequences(prompts, responses, sampler, version=version.astype(np.int32) + 6)
    batch, packing = pack(rollouts, np.array(a), PackSettings(64, 12 * 64), step=7)
    batch = batch.replace(old_logprobs=packing.spread(np.concatenate(old)))
    got, metrics, _ = update(index, batch)
    tokens, mask, a, old, sampler, _ = plain_data()
    drawn_before = padded(prompts, [np.arange(len(r)) < s for r, s in zip(responses, stale, strict=True)], fill=0)

    def plain(p):  # the "grpo" loss of Objective(), the mean over sequences of their means over tokens
        logp = plain_logprobs(p, tokens, mask, 1.0)[0]
        fresh = jax.lax.stop_gradient(logp) if index == 1 else old
        ratio = jnp.exp(logp - jnp.where(drawn_before > 0, sampler, fresh))
        loss = -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a)
        return jnp.mean(jnp.sum(loss * mask, 1) / mask.sum(1)), jnp.sum(ratio * mask) / mask.sum()

    (loss, ratio), want = jax.jit(jax.value_and_grad(plain, has_aux=True))(params())
    close(got, want)
    assert metrics["loss"] == pytest.approx(float(loss), rel=2e-5)
    assert metrics["ratio/mean"] == pytest.approx(float(ratio), rel=2e-5) != 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_update_changes_nothing_but_the_counters(bad):
    good, _ = batch_of()
    spoilt = good.replace(advantages=np.where(good.response_mask > 0, bad, 0).astype(np.float32))
    _, _, state = update(1, good)
    compiled = programs(1).update._cache_size()
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    pointer = state.params["embed"]["embedding"]
    _, metrics, after = update(1, spoilt, state)
    assert pointer.is_deleted()  # donated
    assert metrics["nonfinite"] == 1 and not np.isfinite(metrics["loss"] + metrics["grad_norm"])
    for a, b in zip(jax.tree.leaves((after.params, after.opt_state)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), b.view(np.uint8))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (1, 1, 1)
    _, metrics, after = update(1, good, after)
    assert metrics["nonfinite"] == 0 and metrics["lr"] == 2.0  # the schedule counts applied updates
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 0)
    assert programs(1).update._cache_size() == compiled  # one shape, one compilation


def test_whole_batch_preparation_and_rejected_tokens_leaving_the_denominator():
    """BAPO's bounds come from the whole mini-batch, and with drop_rejected the token count is that of the kept ones:
    both must not depend on the cut into micro-batches, and the loss must be the plain one."""
    batch, _ = batch_of()
    got, metrics, _ = update(3, batch)
    split, _, _ = update(3, batch_of(row_tokens=32, micro_tokens=2 * 32)[0])
    close(split, got, 2e-6)
    low, high = metrics["policy/bound_low"], metrics["policy/bound_high"]
    assert (low, high) == pytest.approx((0.9, 1.75))  # what tests.algorithms.reference.bapo_bounds finds in this data

    def plain(p):
        tokens, mask, a, old, sampler, _ = plain_data()
        ratio = jnp.exp(plain_logprobs(p, tokens, mask, 1.0)[0] - old)
        loss = jnp.maximum(-ratio * a, -jnp.clip(ratio, low, high) * a)
        loss = jnp.where(a < 0, jnp.minimum(loss, -3.0 * a), loss)
        weight = np.exp(old - sampler) * mask
        weight = np.where((weight < 0.8) | (weight > 1.2), 0, weight)
        return jnp.sum(weight * loss) / (weight > 0).sum()

    loss, want = jax.jit(jax.value_and_grad(plain))(params())
    assert metrics["loss"] == pytest.approx(float(loss), rel=2e-5)
    close(got, want)


def test_the_only_update_rejects_by_its_own_log_probs_and_takes_the_objectives_settings():
    """No log-probs were scored before: rejection takes the current ones, and sequences without a token left are not
    counted. Aggregation, its length and the entropy-shaped advantages are those of the objective."""
    batch, _ = batch_of()
    got, metrics, _ = update(4, batch.replace(old_logprobs=np.zeros_like(batch.old_logprobs)))
    tokens, mask, a, _, sampler, _ = plain_data()

    def plain(p):
        logp, entropy = plain_logprobs(p, tokens, mask, 1.0)
        weight = jnp.exp(jax.lax.stop_gradient(logp) - sampler) * mask
        weight = jnp.where((weight < 0.8) | (weight > 1.2), 0, weight)
        shaped = a + jnp.minimum(0.3 * jax.lax.stop_gradient(entropy), jnp.abs(a) / 3.0)
        ratio = jnp.exp(logp - jax.lax.stop_gradient(logp))
        count = (weight.max(1) > 0).sum()
        return -jnp.sum(weight * ratio * shaped) / (7.0 * count), count

    (loss, count), want = jax.jit(jax.value_and_grad(plain, has_aux=True))(params())
    assert 0 < count < 10  # some sequences lose all their tokens
    assert metrics["loss"] == pytest.approx(float(loss), rel=2e-5)
    close(got, want)


def test_rejected_tokens_do_not_change_the_weight_of_the_balance_loss():
    config = DecoderConfig(29, 16, 24, 2, 4, 2, 8, qk_norm=True, tie_embeddings=True, model_type="qwen3_moe",
                           init_std=0.3, num_experts=4, experts_per_token=2, expert_size=16)  # fmt: skip
    rng, sgd = np.random.default_rng(0), Optimizer(optax.sgd(1.0), lambda step: jnp.float32(1.0))
    rows = from_sequences(*(list(rng.integers(1, 29, (8, n))) for n in (4, 10)), [np.full(10, -3.0)] * 8)
    batch, _ = pack(rows, np.zeros(8), PackSettings(32, 64))
    kept = np.arange(batch.old_logprobs.size).reshape(batch.old_logprobs.shape) % 10 == 0
    batch = batch.replace(old_logprobs=batch.sampler_logprobs + np.where(kept, 0, 5).astype(np.float32))
    objective = Objective(balance_coef=1.0, correction="icepop", correction_hyper={"drop_rejected": True})
    state = init_state(config, sgd, mesh(), params=init_params(config, jax.random.key(3)))
    _, metrics = build_programs(config, mesh(), sgd, objective).update(state, place_batch(batch, mesh()))
    assert metrics["correction/weight_zero"] > 0.5
    assert metrics["loss"] == pytest.approx(float(metrics["moe/balance_loss"]), rel=1e-5)
