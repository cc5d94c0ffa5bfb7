"""Drawing one token per row: temperature, truncation and a two-level inverse CDF.

Random numbers: the key of a token depends on (seed, step, problem, sample, position) only, so a completion
does not depend on which slot, batch or chunk it was decoded in.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Blocks of the inverse CDF: running sums over 128 blocks, and over the V / 128 entries of one, are short enough for
# float32 to stay unbiased. The number is fixed, so that chips that share a vocabulary hold whole blocks, and no chip
# needs all logits.
BLOCKS = 128
_BISECTIONS = 32
_FAR = 200.0
LEAST_TEMPERATURE = 1e-30  # smaller ones are raised to this, which is as good as greedy


def sample_keys(seed, step, problem, sample):
    """uint32 [B, 2]: threefry key data of each row. seed, step: scalars; problem, sample: uint32 [B]."""

    def one(problem, sample):
        key = jax.random.key(seed, impl="threefry2x32")
        for part in (step, problem, sample):
            key = jax.random.fold_in(key, part)
        return jax.random.key_data(key)

    return jax.vmap(one)(problem, sample)


def uniforms(keys, position):
    """Two float32 uniforms in (0, 1] per row, [B, 2]. keys: uint32 [B, 2]; position: int32 [B]."""

    def one(key, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.bits(key, (2,), jnp.uint32)

    bits = jax.vmap(one)(keys, position)
    return ((bits >> 8) + 1).astype(jnp.float32) * 2.0**-24


def _first_at_least(weights, u):
    """int32 [B]: first index whose running sum reaches u * total. weights >= 0 [B, n]; u in (0, 1] [B].

    A parallel running sum is not quite monotone, because of rounding. An index of weight zero is replaced by the
    heaviest one, so that a token that was masked out can never be drawn.
    """
    total = jnp.cumsum(weights, axis=-1)
    index = jnp.sum(total < u[:, None] * total[:, -1:], axis=-1)
    index = jnp.minimum(index, weights.shape[-1] - 1).astype(jnp.int32)
    drawn = jnp.take_along_axis(weights, index[:, None], axis=-1)[:, 0]
    return jnp.where(drawn > 0, index, jnp.argmax(weights, axis=-1).astype(jnp.int32))


def inverse_cdf(weights, u):
    """Index drawn with probability proportional to weights; int32 [B].

    Two levels, a block and then an entry within it, each with its own uniform: one float32 running sum
    over 150k entries is biased, and one 24-bit uniform cannot reach small entries.

    Up to 128 entries are one block.

    Args:
      weights: float32 [B, V], not negative, not all zero in a row. u: float32 [B, 2] in (0, 1].
    """
    B, V = weights.shape
    count = BLOCKS if V > BLOCKS else 1
    blocks = jnp.pad(weights, ((0, 0), (0, -V % count))).reshape(B, count, -1)
    block = _first_at_least(blocks.sum(-1), u[:, 0])
    row = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return jnp.minimum(block * blocks.shape[-1] + _first_at_least(row, u[:, 1]), V - 1)


def _threshold(z, reaches):
    """Largest float32 threshold t [B, 1], by bisection, with reaches(t) true. reaches: monotone, true at -inf.

    Entries _FAR below the peak, of weight 0, are not told apart: a bias of -1e9 would leave no digits for the rest.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        ok = reaches(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    finite = jnp.where(jnp.isfinite(z), z, jnp.inf)
    low = jnp.maximum(jnp.min(finite, axis=-1, keepdims=True), jnp.max(z, axis=-1, keepdims=True) - _FAR)
    high = jnp.nextafter(jnp.max(z, axis=-1, keepdims=True), jnp.float32(jnp.inf))
    return jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))[0]


def truncate(z, weights, top_k, top_p, min_p):
    """Zero the weights outside top-k, then top-p, then min-p, in that order.

    Thresholds are found by bisection instead of a sort, so the work is a few passes over the vocabulary
    and shards over it. Ties at a threshold are all kept.

    Args:
      z: float32 [B, V] tempered logits. weights: float32 [B, V], exp(z - max z).
      top_k: int32 [B], 0 = off. top_p: float32 [B], 1 = off. min_p: float32 [B], 0 = off.
    """
    V = z.shape[-1]
    k = jnp.where(top_k > 0, top_k, V)[:, None]
    keep = z >= _threshold(z, lambda t: jnp.sum(z >= t, axis=-1, keepdims=True) >= k)
    weights = jnp.where(keep | (k >= V), weights, 0.0)
    goal = top_p[:, None] * weights.sum(-1, keepdims=True)
    mass = _threshold(z, lambda t: jnp.sum(jnp.where(z >= t, weights, 0.0), axis=-1, keepdims=True) >= goal)
    weights = jnp.where((z >= mass) | (top_p[:, None] >= 1), weights, 0.0)
    return jnp.where(weights >= min_p[:, None] * weights.max(-1, keepdims=True), weights, 0.0)


def draw(logits, u, temperature, *, top_k=None, top_p=None, min_p=None, allowed=None, record=False):
    """One token per row and its log-probability.

    Args:
      logits: float32 [B, V]. u: float32 [B, 2] from `uniforms`. temperature: float32 [B], at least 0; 0 is greedy.
      top_k, top_p, min_p: see `truncate`; all None skips truncation altogether.
      allowed: bool [V], tokens that may be drawn; None is all of them. record: return also what was kept.

    Returns:
      token: int32 [B]. logp: float32 [B], at most 0, under softmax(logits / temperature) over the whole vocabulary
      and *before* truncation, as the learner recomputes it; a greedy row reports temperature 1. With `record`
      {"kept", "least"}, both float32 [B] (see `kept_set`).
    """
    V, greedy = logits.shape[-1], temperature <= 0
    divisor = jnp.where(greedy, 1.0, jnp.maximum(temperature, LEAST_TEMPERATURE))
    peak = jnp.max(logits, axis=-1, keepdims=True)
    # subtract the peak first: logits divided by a temperature near zero lose their differences, or overflow, in float32
    z = (logits - peak) / divisor[:, None]
    weights = jnp.exp(z)
    log_total = jnp.log(jnp.sum(weights, axis=-1))
    choices, highest = logits, peak
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
        z, choices = jnp.where(allowed, z, -jnp.inf), jnp.where(allowed, logits, -jnp.inf)
        highest = jnp.max(choices, axis=-1, keepdims=True)
    if top_k is not None:
        weights = truncate(z, weights, top_k, top_p, min_p)
    # an argmax by comparison vectorises on CPU; the (value, index) reduction does not
    best = jnp.min(jnp.where(choices == highest, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)
    token = jnp.where(greedy, best, inverse_cdf(weights, u))
    if allowed is not None:  # if all allowed weights underflow, the likeliest allowed token
        drawn = jnp.take_along_axis(weights, token[:, None], axis=-1)[:, 0]
        token = jnp.where(drawn > 0, token, best)
    # not taken from z: if the peak met nothing but all logits, a CPU would write it out once for each of them
    picked = (jnp.take_along_axis(logits, token[:, None], axis=-1) - peak)[:, 0] / divisor
    if record:
        return token, picked - log_total, kept_set(z - log_total[:, None], weights)
    return token, picked - log_total


def kept_set(logp, weights):
    """Describes the set that a truncated draw kept: {"kept": the logarithm of its probability, "least": a probability
    that all its tokens reach and no other token does}, float32 [B] each; both 0 if nothing was cut off.

    top-k, top-p and min-p all keep the likeliest tokens, so that one threshold is the whole set. It lies half way (in
    logarithms) between the two tokens at the border, so that another rounding of the logits finds the same set.

    logp: float32 [B, V], -inf for tokens that may not be drawn. weights: float32 [B, V], 0 for those cut off.
    """
    inside = weights > 0
    mass = jnp.sum(jnp.where(inside, jnp.exp(logp), 0), axis=-1)
    lowest = jnp.min(jnp.where(inside, logp, jnp.inf), axis=-1)
    highest = jnp.max(jnp.where(inside, -jnp.inf, logp), axis=-1)
    cut = jnp.isfinite(highest)
    least = jnp.exp(jnp.where(cut, (lowest + highest) / 2, -jnp.inf))
    return {"kept": jnp.where(cut, jnp.minimum(jnp.log(mass), 0), 0), "least": least}
