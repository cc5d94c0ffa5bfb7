"""KL estimators, sampler/learner corrections and entropy terms against NumPy formulas and exact
expectations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.algorithms.correction import CORRECTIONS, effective_mask, mismatch_stats
from jaxrl.algorithms.entropy import entropy_advantages, entropy_bonus
from jaxrl.algorithms.hyper import resolve
from jaxrl.algorithms.inputs import LossInputs
from jaxrl.algorithms.kl import KL_KINDS, kl_estimate

quick = settings(max_examples=25, deadline=None, derandomize=True)
FORMULA = {"k1": lambda x: x, "k2": lambda x: x**2 / 2, "k3": lambda x: np.exp(-x) + x - 1}
SLOPE = {"k1": lambda x: np.ones_like(x), "k2": lambda x: x, "k3": lambda x: 1 - np.exp(-x)}


@pytest.mark.parametrize("kind", KL_KINDS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_kl_value_and_gradient(kind, dtype):
    """Values of k1, k2, k3; gradients of the same, and of k2 for the straight-through kinds."""
    rng = np.random.default_rng(0)
    logp, ref = -rng.exponential(1, 50), -rng.exponential(1, 50)
    x = logp - ref
    base, slope = kind.rstrip("+"), "k2" if kind.endswith("+") else kind
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == np.float64 else {"rtol": 1e-5, "atol": 1e-5}
    with jax.enable_x64(dtype == np.float64):
        a, b = jnp.asarray(logp, dtype), jnp.asarray(ref, dtype)
        value, pull = jax.vjp(lambda a, b: kl_estimate(a, b, kind, value_clamp=0.0), a, b)
        grad, ref_grad = pull(jnp.ones_like(a))
        np.testing.assert_allclose(value, FORMULA[base](x), **tolerance)
        np.testing.assert_allclose(grad, SLOPE[slope](x), **tolerance)
        assert not np.any(ref_grad)


@quick
@given(*[st.lists(st.floats(-30, 0), min_size=8, max_size=8)] * 2)
def test_k3_is_never_negative(logp, ref):
    for clamp in (0.0, 10.0):
        value = np.asarray(kl_estimate(jnp.asarray(logp), jnp.asarray(ref), "k3", value_clamp=clamp))
        assert np.all(value >= 0)
    assert np.all(value <= 10)


@pytest.mark.parametrize(
    ("kind", "direction"),
    [("k1", None), ("k2", "reverse"), ("k3", "forward"), ("k1+", "reverse"), ("k3+", "reverse")],
)
def test_expected_gradients(kind, direction):
    """Exact expectation over a categorical: E[grad k1] = 0, E[grad k2] = grad KL(pi, ref), E[grad k3] =
    grad KL(ref, pi).
    """
    rng = np.random.default_rng(1)
    logits, ref_logits = rng.normal(0, 0.4, 6), rng.normal(0, 0.4, 6)
    with jax.enable_x64(True):
        logits, ref = jnp.asarray(logits), jax.nn.log_softmax(jnp.asarray(ref_logits))

        def surrogate(z):
            logp = jax.nn.log_softmax(z)
            return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * kl_estimate(logp, ref, kind))

        def divergence(z):
            logp = jax.nn.log_softmax(z)
            reverse, forward = jnp.exp(logp) * (logp - ref), jnp.exp(ref) * (ref - logp)
            return jnp.sum({"reverse": reverse, "forward": forward, None: 0 * reverse}[direction])

        np.testing.assert_allclose(jax.grad(surrogate)(logits), jax.grad(divergence)(logits), atol=1e-12)


def test_kl_clamps_and_ratio_correction():
    logp, ref = jnp.array([-1.0, -8.0, -0.5]), jnp.array([-1.0, -1.0, -0.1])
    value, grad = jax.value_and_grad(lambda a: jnp.sum(kl_estimate(a, ref, "k3")))(logp)
    x = np.array([0.0, -7.0, -0.4])
    k3 = np.exp(-x) + x - 1
    np.testing.assert_allclose(value, np.minimum(k3, 10).sum(), rtol=1e-5)
    np.testing.assert_allclose(grad, [0, 0, 1 - np.exp(0.4)], rtol=1e-5, atol=1e-6)
    old = jnp.array([-1.2, -7.0, -0.7])
    ratio = np.exp(np.asarray(logp) - np.asarray(old))
    value, grad = jax.value_and_grad(
        lambda a: jnp.sum(kl_estimate(a, ref, "k3", value_clamp=0.0, old_logp=old))
    )(logp)
    np.testing.assert_allclose(value, (ratio * k3).sum(), rtol=1e-5)
    np.testing.assert_allclose(grad, ratio * (k3 + 1 - np.exp(-x)), rtol=1e-5, atol=1e-5)
    assert not np.any(jax.grad(lambda o: jnp.sum(kl_estimate(logp, ref, "k3", old_logp=o)))(old))
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'; valid: k1, k2"):
        kl_estimate(logp, ref, "k4")


def _old_and_sampler(old, sampler, mask, ids=None):
    """What corrections look at."""
    return LossInputs(old, old, None, mask, ids, sampler_logp=sampler)


def _weights(name, log_weight, ids=None, mask=None, **constants):
    entry, hyper = resolve(CORRECTIONS, "correction", name, constants)
    log_weight = jnp.asarray([log_weight], jnp.float32)
    ids = jnp.ones(log_weight.shape, jnp.int32) if ids is None else jnp.asarray([ids])
    mask = jnp.ones(log_weight.shape, jnp.int32) if mask is None else jnp.asarray([mask])
    weights, stats = entry.fn(_old_and_sampler(log_weight - 1, jnp.full_like(log_weight, -1.0), mask, ids), hyper)
    return np.asarray(weights[0]), {k: float(v) for k, v in stats.items()}


def test_token_corrections():
    log = np.log([0.4, 1.0, 3.0, 6.0])
    np.testing.assert_allclose(_weights("none", log)[0], [1, 1, 1, 1])
    weights, stats = _weights("token_tis", log, mask=[1, 1, 1, 0])
    np.testing.assert_allclose(weights, [0.4, 1.0, 2.0, 0.0], rtol=1e-6)
    assert (stats["weight_changed"], stats["weight_zero"]) == (1, 0)
    np.testing.assert_allclose(stats["weight"], 3.4, rtol=1e-6)
    weights, stats = _weights("icepop", log)
    np.testing.assert_allclose(weights, [0.0, 1.0, 3.0, 0.0], rtol=1e-6)
    assert stats["weight_zero"] == 2
    np.testing.assert_allclose(_weights("icepop", log, low=0.3, high=7.0)[0], np.exp(log), rtol=1e-6)


def test_sequence_corrections_use_the_whole_response():
    """Products over runs of ids; the band and cap act on the product, geometric masking on its per-token
    mean.
    """
    log, ids = np.log([2.0, 2.0, 0.5, 0.5, 1.0]), [1, 1, 2, 2, 3]
    np.testing.assert_allclose(_weights("sequence_tis", log, ids)[0], [2, 2, 0.25, 0.25, 1], rtol=1e-6)
    np.testing.assert_allclose(
        _weights("sequence_tis", log, ids, cap=9.0)[0], [4, 4, 0.25, 0.25, 1], rtol=1e-6
    )
    np.testing.assert_allclose(_weights("sequence_mask", log, ids)[0], [0, 0, 0.25, 0.25, 1], rtol=1e-6)
    np.testing.assert_allclose(_weights("sequence_mask", log, ids, low=0.5)[0], [0, 0, 0, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(_weights("geometric_mask", log, ids)[0], [0, 0, 0, 0, 1])
    np.testing.assert_allclose(_weights("geometric_mask", log, ids, low=0.5, high=1.9)[0], [0, 0, 1, 1, 1])
    np.testing.assert_allclose(
        _weights("sequence_tis", log, ids, mask=[1, 0, 1, 1, 1])[0], [2, 0, 0.25, 0.25, 1], rtol=1e-6
    )


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_carry_no_gradient_and_are_one_without_mismatch(name):
    entry = CORRECTIONS[name]
    logp, mask, ids = (
        -jnp.arange(1.0, 7.0).reshape(2, 3),
        jnp.ones((2, 3), jnp.int32),
        jnp.ones((2, 3), jnp.int32),
    )
    weights, stats = entry.fn(_old_and_sampler(logp, logp, mask, ids), entry.defaults)
    np.testing.assert_array_equal(weights, 1)
    assert float(stats["weight_changed"]) == 0
    total = lambda a, b: jnp.sum(entry.fn(_old_and_sampler(a, b, mask, ids), entry.defaults)[0])  # noqa: E731
    grads = jax.grad(total, (0, 1))(logp, logp - 0.1)
    assert not np.any(grads[0]) and not np.any(grads[1])


def test_rejected_tokens_leave_the_denominator_only_if_asked():
    mask, weights = jnp.array([[1, 1, 1, 0]]), jnp.array([[1.0, 0.0, 2.0, 0.0]])
    np.testing.assert_array_equal(effective_mask(mask, weights, {"drop_rejected": False}), [[1, 1, 1, 0]])
    np.testing.assert_array_equal(effective_mask(mask, weights, {"drop_rejected": True}), [[1, 0, 1, 0]])


def test_mismatch_is_measured_on_response_tokens():
    old, sampler = jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[-1.5, -1.0, np.nan]])
    stats = mismatch_stats(_old_and_sampler(old, sampler, jnp.array([[1, 1, 0]])))
    np.testing.assert_allclose([stats["logprob_diff"], stats["logprob_diff_max"]], [1.5, 1.0])


def test_entropy_terms():
    entropy = jnp.array([[0.5, 2.0, 4.0, 4.0]])
    value, grad = jax.value_and_grad(lambda h: jnp.sum(entropy_bonus(h, 0.01)))(entropy)
    np.testing.assert_allclose(value, -0.105, rtol=1e-6)
    np.testing.assert_allclose(grad, -0.01 * np.ones((1, 4)), rtol=1e-6)
    advantages = jnp.array([[1.0, 1.0, -1.0, 0.0]])
    np.testing.assert_allclose(entropy_advantages(advantages, entropy, 0.4, 2.0), [[1.2, 1.5, -0.5, 0.0]], rtol=1e-6)
    assert not np.any(jax.grad(lambda h: jnp.sum(entropy_advantages(advantages, h, 0.4, 2.0)))(entropy))
