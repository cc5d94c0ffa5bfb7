"""Entropy terms: the bonus, its adaptive coefficient, and entropy-shaped advantages. All combine with any loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.algorithms.inputs import compute_dtype


def entropy_bonus(entropy: jax.Array, coefficient: float | jax.Array) -> jax.Array:
    """Token loss -c H [R, T] to add to the policy loss before aggregation. entropy: [R, T] in nats, with gradient."""
    return -coefficient * entropy.astype(compute_dtype(entropy))


def adapt_coefficient(
    coefficient: float, entropy: float, target: float = 0.2, step: float = 0.005, maximum: float = 1.0
) -> float:
    """Skywork-OR1's adaptive bonus (2505.22312; TRL's constants): one step up below the target entropy, else one down.

    entropy: mean over the batch in nats. The result stays within [0, maximum]; the bonus itself is to be
    applied only while the entropy is at or below the target.
    """
    return min(max(coefficient + (step if entropy < target else -step), 0.0), maximum)


def entropy_advantages(advantages: jax.Array, entropy: jax.Array, alpha: float = 0.4, kappa: float = 2.0) -> jax.Array:
    """Entropy-Adv (2506.14758): A + min(alpha sg(H), |A| / kappa), so the sign of A never changes for kappa > 1.

    advantages, entropy (nats): [R, T]. No gradient flows through the result.
    """
    advantages = jax.lax.stop_gradient(advantages)
    entropy = jax.lax.stop_gradient(entropy)
    return advantages + jnp.minimum(alpha * entropy, jnp.abs(advantages) / kappa)
