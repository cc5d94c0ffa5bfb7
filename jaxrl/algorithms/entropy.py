"""Entropy terms: the bonus and entropy-shaped advantages. All combine with any loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.algorithms.inputs import compute_dtype


def entropy_bonus(entropy: jax.Array, coefficient: float | jax.Array) -> jax.Array:
    """Token loss -c H [R, T] to add to the policy loss before aggregation. entropy: [R, T] in nats, with gradient."""
    return -coefficient * entropy.astype(compute_dtype(entropy))


def entropy_advantages(advantages: jax.Array, entropy: jax.Array, alpha: float, kappa: float) -> jax.Array:
    """Entropy-Adv (2506.14758): A + min(alpha sg(H), |A| / kappa), so the sign of A never changes for kappa > 1.

    advantages, entropy (nats): [R, T]. No gradient flows through the result.
    """
    advantages = jax.lax.stop_gradient(advantages)
    entropy = jax.lax.stop_gradient(entropy)
    return advantages + jnp.minimum(alpha * entropy, jnp.abs(advantages) / kappa)
