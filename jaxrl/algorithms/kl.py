"""Estimates of KL(pi || reference) from sampled tokens, as a loss term or as part of the reward.

With x = log pi - log pi_ref of tokens sampled from pi:  k1 = x,  k2 = x^2 / 2,  k3 = exp(-x) + x - 1.
Differentiated on on-policy samples, E[grad k1] = 0, E[grad k2] = grad KL(pi || ref), E[grad k3] = grad KL(ref || pi).
So as a loss use k2, k3, or "k1+" / "k3+": the value of k1 / k3 with the gradient of k2 (straight-through).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.algorithms.inputs import LOGP_FLOOR, compute_dtype

KL_KINDS = ("k1", "k2", "k3", "k1+", "k3+")


def kl_estimate(
    logp: jax.Array,
    ref_logp: jax.Array,
    kind: str,
    value_clamp: float = 10.0,
    old_logp: jax.Array | None = None,
) -> jax.Array:
    """Token-wise KL estimate, same shape as logp, in the compute dtype; no gradient to ref_logp and old_logp.

    value_clamp: k3 is at most that, with zero gradient beyond, as in verl; 0 switches it off (the plain formula, TRL).
    k1 and k2 are not clamped. old_logp: multiplies the estimate by pi / pi_old, with gradient (TRL's
    use_bias_correction_kl, DeepSeek-V3.2). Aggregate the result like a loss; positions outside the response mask are
    not treated here. Raises ValueError for an unknown kind.
    """
    if kind not in KL_KINDS:
        raise ValueError(f"unknown KL estimator {kind!r}; valid: {', '.join(KL_KINDS)}")
    dtype = compute_dtype(logp)
    logp = jnp.maximum(logp.astype(dtype), LOGP_FLOOR)
    x = logp - jax.lax.stop_gradient(jnp.maximum(ref_logp.astype(dtype), LOGP_FLOOR))
    value = x
    if kind == "k2":
        value = x**2 / 2
    elif kind.startswith("k3"):
        negative = jnp.clip(-x, -20.0, 20.0)  # against overflow, as in verl
        value = jnp.maximum(jnp.expm1(negative) - negative, 0)
        if value_clamp > 0:
            value = jnp.minimum(value, value_clamp)
    if kind.endswith("+"):
        k2 = x**2 / 2
        value = jax.lax.stop_gradient(value) + k2 - jax.lax.stop_gradient(k2)
    if old_logp is None:
        return value
    old_logp = jax.lax.stop_gradient(jnp.maximum(old_logp.astype(dtype), LOGP_FLOOR))
    return value * jnp.exp(jnp.clip(logp - old_logp, -20.0, 20.0))
