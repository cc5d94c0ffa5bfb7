"""Inputs at the edge of the number format: every value and gradient stays finite and means what it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.correction import CORRECTIONS
from jaxrl.algorithms.inputs import LossInputs
from jaxrl.algorithms.kl import KL_KINDS, kl_estimate
from jaxrl.algorithms.losses import LOSSES
from tests.algorithms.harness import run_loss

# (logp, old_logp): equal, overflow up and down, far down, certain, impossible under either policy, under
# both.
PAIRS = [
    (-1.0, -1.0),
    (0.0, -1e4),
    (-1e4, 0.0),
    (-1e4, -1e4),
    (0.0, 0.0),
    (-np.inf, -1.0),
    (-1.0, -np.inf),
    (-np.inf, -np.inf),
    (-80.0, -1e-7),
    (-1e-7, -80.0),
]
names = pytest.mark.parametrize("name", LOSSES)
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


def _batch(logp, old, advantages, mask, ids=None):
    logp, old, advantages = (np.asarray(x, np.float64) for x in (logp, old, advantages))
    mask = np.asarray(mask, np.int32)
    ids = np.ones(mask.shape, np.int32) if ids is None else np.asarray(ids, np.int32)
    return {
        "logp": logp,
        "old_logp": old,
        "advantages": advantages,
        "response_mask": mask,
        "sequence_ids": ids,
    }


def _extreme_batch():
    """One row per pair and sign of the advantage (length 1), rows that mix all pairs, and a fully masked
    row.
    """
    logp, old = np.array(PAIRS).T
    n = len(PAIRS)
    rows = np.zeros((n + 3, n))
    logps, olds, advs, mask = rows.copy(), rows.copy(), rows.copy(), rows.copy()
    for i in range(n):
        logps[i, :2], olds[i, :2] = logp[i], old[i]
        advs[i, :2], mask[i, :2] = (3.0, -3.0), 1
    ids = np.ones(rows.shape)
    ids[:n] = np.arange(n)  # every token of the first rows is a sequence of its own
    for i, a in ((n, 2.0), (n + 1, -2.0), (n + 2, 1.0)):
        logps[i], olds[i], advs[i], mask[i] = logp, old, a, i < n + 2
    return _batch(logps, olds, advs, mask, ids)


@names
@dtypes
def test_extreme_log_probabilities_give_finite_values_and_gradients(name, dtype):
    batch = _extreme_batch()
    loss, grad, per_token, stats = run_loss(name, batch, dtype=dtype)
    assert np.isfinite(loss)
    assert np.all(np.isfinite(grad)) and np.any(grad)
    assert np.all(np.isfinite(per_token[batch["response_mask"] == 1]))
    assert all(np.isfinite(v) for v in stats.values()), stats
    assert not np.any(grad[batch["response_mask"] == 0])


@dtypes
@pytest.mark.parametrize("gate", [False, True])
def test_maspo_gate_at_extremes(dtype, gate):
    constants = {"differentiable_gate": gate, "sigma_high": 1e9, "alpha": 0.5}
    loss, grad, *_ = run_loss("maspo", _extreme_batch(), overrides=constants, dtype=dtype)
    assert np.isfinite(loss) and np.all(np.isfinite(grad))


@names
@dtypes
def test_nothing_to_learn_from_is_zero(name, dtype):
    """Empty masks and zero advantages: loss and gradient are exactly 0, counts do not divide by zero."""
    shape = (3, 5)
    rng = np.random.default_rng(0)
    logp, old = -rng.exponential(1, shape), -rng.exponential(1, shape)
    for adv, mask in ((np.ones(shape), np.zeros(shape)), (np.zeros(shape), np.ones(shape))):
        if name in ("dro", "kl_cov") and mask.any():
            old = logp  # they hold the policy near the old one even where nothing else is to be learned
        loss, grad, per_token, stats = run_loss(name, _batch(logp, old, adv, mask), dtype=dtype)
        assert loss == 0 and not np.any(grad)
        assert all(np.isfinite(v) for v in stats.values())


@names
def test_length_one_responses(name):
    """A response of one token is a sequence like any other: on-policy gradient -A."""
    logp = np.array([[-0.7], [-1.3]])
    batch = _batch(logp, logp, [[2.0], [-1.0]], [[1], [1]])
    _, grad, *_ = run_loss(name, batch, "token-mean")
    np.testing.assert_allclose(grad, [[-1.0], [0.5]], rtol=1e-9)


@names
@dtypes
def test_low_precision_inputs_are_computed_in_float32(name, dtype):
    """bfloat16 inputs give the float64 result of the same rounded inputs to float32 accuracy."""
    rng = np.random.default_rng(1)
    shape = (4, 12)
    rounded = [
        np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32), np.float64)
        for x in (-rng.exponential(1, shape), -rng.exponential(1, shape), rng.normal(size=shape))
    ]
    batch = _batch(*rounded, np.ones(shape))
    exact, found = run_loss(name, batch), run_loss(name, batch, dtype=dtype)
    np.testing.assert_allclose(found[0], exact[0], rtol=2e-5, atol=1e-5)
    # The gradient is returned in the dtype of logp.
    precision = 1e-5 if dtype == jnp.float32 else 8e-3
    np.testing.assert_allclose(found[1], exact[1], rtol=precision, atol=precision * np.abs(exact[1]).max())


def test_nan_in_a_response_token_is_not_hidden():
    batch = _batch([[np.nan, -1.0]], [[-1.0, -1.0]], [[1.0, 1.0]], [[1, 1]])
    assert np.isnan(run_loss("grpo", batch)[0])


@dtypes
@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_at_extremes(kind, dtype):
    logp, ref = (jnp.asarray(x, dtype) for x in np.array(PAIRS).T)
    for options in ({}, {"value_clamp": 0.0}, {"old_logp": ref}):
        value, grad = jax.value_and_grad(lambda x, o=options: jnp.sum(kl_estimate(x, ref, kind, **o)))(logp)
        assert np.isfinite(value) and np.all(np.isfinite(np.asarray(grad, np.float64)))


@dtypes
@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_at_extremes(name, dtype):
    logp, sampler = (jnp.asarray(x, dtype)[None] for x in np.array(PAIRS).T)
    mask, entry = jnp.ones(logp.shape, jnp.int32), CORRECTIONS[name]
    for ids in (jnp.ones(logp.shape, jnp.int32), jnp.arange(logp.shape[1])[None]):
        inputs = LossInputs(logp, logp, None, mask, ids, sampler_logp=sampler)
        weights, stats = entry.fn(inputs, entry.defaults)
        assert np.all(np.isfinite(weights)) and np.all(np.asarray(weights) >= 0)
        assert all(np.isfinite(v) for v in stats.values())
