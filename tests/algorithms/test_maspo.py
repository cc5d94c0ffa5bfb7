"""MASPO's gate: its published table, its shape, and what differentiating it would change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.inputs import LossInputs
from jaxrl.algorithms.losses import LOSSES
from jaxrl.algorithms.maspo import maspo_gate, maspo_loss

# rho, pi_old, A, sigma, F, F * rho for alpha .3, beta .03, sigma_base 1, all clamps on; sigma None where
# ungated.
TABLE = [
    (1.5, 0.9, 1.0, 1.06308, 0.895291, 1.342936),
    (1.5, 0.01, 1.0, 4.10050, 0.992593, 1.488890),
    (3.0, 0.5, 2.0, 1.305013, 0.309018, 0.927053),
    (3.0, 1e-4, 2.0, 10.6, 0.982358, 2.947073),
    (10.0, 1e-6, 1.0, 10.3, 0.682665, 6.826648),
    (0.5, 0.9, -1.0, 1.002051, 0.882948, 0.441474),
    (0.1, 0.9, -2.0, 0.973692, 0.652345, 0.0652345),
    (0.1, 0.01, -2.0, 3.755728, 0.971696, 0.0971696),
    (0.5, 0.9, 1.0, None, 1.0, 0.5),
    (5.0, 0.5, -1.0, None, 1.0, 5.0),
]


def _gate(rho, pi_old, advantage, **constants):
    """(F, sigma, gated) in float64."""
    with jax.enable_x64(True):
        args = (jnp.asarray(x, jnp.float64) for x in (rho, np.log(pi_old), advantage))
        return tuple(np.asarray(x) for x in maspo_gate(*args, {**LOSSES["maspo"].defaults, **constants}))


def _loss_and_slope(rho, pi_old, advantage, **constants):
    """Token losses and d loss / d logp at ratio rho, float64 arrays [n]."""
    with jax.enable_x64(True):
        old = jnp.log(jnp.broadcast_to(jnp.asarray(pi_old, jnp.float64), np.shape(rho)))
        logp = old + jnp.log(jnp.asarray(rho, jnp.float64))
        adv, ones = (
            jnp.broadcast_to(jnp.asarray(advantage, jnp.float64), logp.shape),
            jnp.ones(logp.shape, jnp.int32),
        )

        def total(x):
            inputs = LossInputs(x[None], old[None], adv[None], ones[None], ones[None])
            loss = maspo_loss(inputs, {**LOSSES["maspo"].defaults, **constants})[0]
            return jnp.sum(loss), loss[0]

        (_, loss), slope = jax.value_and_grad(total, has_aux=True)(logp)
        return np.asarray(loss), np.asarray(slope)


@pytest.mark.parametrize(("rho", "pi_old", "advantage", "sigma", "gate", "weighted"), TABLE)
def test_published_table(rho, pi_old, advantage, sigma, gate, weighted):
    found, width, gated = _gate(rho, pi_old, advantage)
    np.testing.assert_allclose(found, gate, rtol=2e-6)
    np.testing.assert_allclose(found * rho, weighted, rtol=2e-6)
    assert gated == (sigma is not None)
    if sigma is not None:
        np.testing.assert_allclose(width, sigma, rtol=5e-6)
    loss, slope = _loss_and_slope(np.array([rho]), pi_old, advantage)
    np.testing.assert_allclose(loss, [-advantage * weighted], rtol=2e-6)
    np.testing.assert_allclose(slope, loss, rtol=1e-12)  # detached: d(F rho A)/dlogp = F rho A


@pytest.mark.parametrize(
    ("sigma", "best", "peak"), [(1, 1.618, 1.3367), (2, 2.562, 1.889), (4, 4.531, 3.069), (10, 10.51, 6.687)]
)
def test_weighted_ratio_peaks_where_it_should(sigma, best, peak):
    """rho F(rho) is largest at (1 + sqrt(1 + 4 sigma^2)) / 2."""
    rho = np.linspace(1, 30, 290001)
    constants = {"alpha": 0.0, "beta_high": 0.0, "sigma_base": float(sigma), "sigma_high": 100.0}
    value = rho * _gate(rho, 0.5, 1.0, **constants)[0]
    np.testing.assert_allclose(rho[np.argmax(value)], (1 + np.sqrt(1 + 4 * sigma**2)) / 2, atol=2e-4)
    np.testing.assert_allclose(rho[np.argmax(value)], best, rtol=5e-4)
    np.testing.assert_allclose(value.max(), peak, rtol=5e-4)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
def test_detached_gate_never_reverses_and_differentiable_gate_does_beyond_the_peak(sigma):
    """The update direction: with A > 0 a token's log-probability must not be pushed down. Detached, it
    never is. With the gradient of the gate included it is, beyond rho* = (1 + sqrt(1 + 4 sigma^2)) / 2.
    """
    peak = (1 + np.sqrt(1 + 4 * sigma**2)) / 2
    constants = {"alpha": 0.0, "beta_high": 0.0, "beta_low": 0.0, "sigma_base": sigma, "sigma_high": 100.0}
    rho = np.concatenate([np.linspace(0.05, peak - 1e-3, 200), np.linspace(peak + 1e-3, 3 * peak, 200)])
    beyond = rho > peak
    _, detached = _loss_and_slope(rho, 0.5, 1.0, **constants)
    _, full = _loss_and_slope(rho, 0.5, 1.0, differentiable_gate=True, **constants)
    assert np.all(detached < 0)
    assert np.all(full[~beyond] < 0) and np.all(full[beyond] > 0)
    gated = rho > 1
    np.testing.assert_allclose(full[gated], (detached * (1 - rho * (rho - 1) / sigma**2))[gated], rtol=1e-10)
    np.testing.assert_array_equal(full[~gated], detached[~gated])
    for differentiable in (
        False,
        True,
    ):  # A < 0: rho (rho - 1) < 0 in the gated region, so neither form reverses
        _, slope = _loss_and_slope(rho, 0.5, -1.0, differentiable_gate=differentiable, **constants)
        assert np.all(slope > 0)


def test_gate_is_continuous_with_zero_slope_at_one_and_acts_on_one_side():
    for advantage in (1.0, -1.0):
        rho = 1 + 1e-5 * np.array([-2, -1, 0, 1, 2])
        gate, _, gated = _gate(rho, 0.3, advantage)
        np.testing.assert_allclose(gate, 1, atol=1e-9)
        np.testing.assert_array_equal(gated, advantage * (rho - 1) > 0)


def test_bounds_of_sigma_and_of_the_negative_gate():
    rng = np.random.default_rng(0)
    pi, adv = np.exp(-rng.exponential(3, 2000)), rng.normal(0, 50, 2000)
    _, sigma, _ = _gate(rng.uniform(0, 3, 2000), pi, adv)
    assert sigma.min() >= 0.1 and sigma.max() <= 10 * 10
    gate, *_ = _gate(rng.uniform(0, 1, 2000), pi, -np.abs(rng.normal(0, 1e-9, 2000)))
    assert gate.min() >= np.exp(-0.5) - 1e-9
    rare, likely = _gate(2.0, 1e-3, 1.0)[1], _gate(2.0, 0.9, 1.0)[1]
    assert rare > likely
