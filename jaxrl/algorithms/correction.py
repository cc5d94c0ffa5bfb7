"""Weights for the mismatch between the sampler that drew the tokens and the learner that scores them.

w_t = pi_old^learner / pi^sampler, always without gradient; the learner multiplies the token loss by the weight. Off
("none") by default: sampler and learner share one forward here. `mismatch_stats` is meant to be logged always.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.algorithms.hyper import Flag, Method, Number
from jaxrl.algorithms.inputs import LossInputs, guarded
from jaxrl.algorithms.segments import sequence_mean, sequence_sum


def _log_weight(tokens: LossInputs):
    return tokens.old_logp - tokens.sampler_logp


def _weight(log_weight, hyper):
    return jnp.exp(jnp.clip(log_weight, -hyper["log_clamp"], hyper["log_clamp"]))


def _finish(tokens, weights, changed):
    weights = weights * tokens.mask
    stats = {
        "weight": jnp.sum(weights),
        "weight_changed": jnp.sum(changed * tokens.mask),
        "weight_zero": jnp.sum((weights == 0) * tokens.mask),
    }
    return weights, stats


def none(inputs: LossInputs, hyper):
    """Weight 1 for every response token."""
    tokens = guarded(inputs)
    return _finish(tokens, tokens.mask, jnp.zeros_like(tokens.mask))


def token_tis(inputs: LossInputs, hyper):
    """Token truncated importance sampling: min(w_t, cap)."""
    tokens = guarded(inputs)
    weight = _weight(_log_weight(tokens), hyper)
    return _finish(tokens, jnp.minimum(weight, hyper["cap"]), weight > hyper["cap"])


def sequence_tis(inputs: LossInputs, hyper):
    """Sequence truncated importance sampling: min(prod_t w_t, cap) on every token of the sequence."""
    tokens = guarded(inputs)
    weight = _weight(sequence_sum(_log_weight(tokens), tokens.segment_ids), hyper)
    return _finish(tokens, jnp.minimum(weight, hyper["cap"]), weight > hyper["cap"])


def sequence_mask(inputs: LossInputs, hyper):
    """Masked importance sampling: prod_t w_t inside [low, high], else 0, on every token of the sequence."""
    tokens = guarded(inputs)
    weight = _weight(sequence_sum(_log_weight(tokens), tokens.segment_ids), hyper)
    outside = (weight < hyper["low"]) | (weight > hyper["high"])
    return _finish(tokens, jnp.where(outside, 0, weight), outside)


def geometric_mask(inputs: LossInputs, hyper):
    """Geometric rejection: weight 1, but 0 for sequences with exp(mean_t log w_t) outside [low, high]."""
    tokens = guarded(inputs)
    weight = _weight(sequence_mean(_log_weight(tokens), tokens.mask, tokens.segment_ids), hyper)
    outside = (weight < hyper["low"]) | (weight > hyper["high"])
    return _finish(tokens, jnp.where(outside, 0, jnp.ones_like(weight)), outside)


def icepop(inputs: LossInputs, hyper):
    """IcePop (Ring-1T, 2510.18855): w_t inside [low, high], else 0, token by token."""
    tokens = guarded(inputs)
    weight = _weight(_log_weight(tokens), hyper)
    outside = (weight < hyper["low"]) | (weight > hyper["high"])
    return _finish(tokens, jnp.where(outside, 0, weight), outside)


_DROP = {"drop_rejected": Flag(False)}
_GUARDED = {"log_clamp": Number(20.0, 0, 80, above=True), **_DROP}  # exp(80) is finite in float32
_CAPPED = {"cap": Number(2.0, 0, above=True), **_GUARDED}


def _between(low: float, high: float) -> dict:
    return {"low": Number(low), "high": Number(high), **_GUARDED}


# fn(inputs, hyper) -> (weights [R, T], sums over response tokens: weight, weight_changed (truncated or zeroed),
# weight_zero); of the inputs (LossInputs) they see old_logp, sampler_logp, mask and segment_ids.
# Every entry has "drop_rejected": see `effective_mask`.
CORRECTIONS: dict[str, Method] = {
    "none": Method(none, _DROP),
    "token_tis": Method(token_tis, _CAPPED),
    "sequence_tis": Method(sequence_tis, _CAPPED),
    "sequence_mask": Method(sequence_mask, _between(0.0, 3.0), ordered=[("low", "high")]),
    "geometric_mask": Method(geometric_mask, _between(0.999, 1.001), ordered=[("low", "high")]),
    "icepop": Method(icepop, _between(0.5, 5.0), ordered=[("low", "high")]),
}


def effective_mask(response_mask: jax.Array, weights: jax.Array, hyper: dict) -> jax.Array:
    """The mask [R, T] of the tokens that denominators count; hyper["drop_rejected"] removes tokens of weight 0 from it.

    False (default, as TRL): rejected tokens stay in the denominator, so rejection makes the step smaller. True (as
    slime argues): they are removed.
    """
    return response_mask * (weights > 0) if hyper["drop_rejected"] else response_mask


def mismatch_stats(inputs: LossInputs) -> dict[str, jax.Array]:
    """How far sampler and learner disagree: {"logprob_diff": sum over response tokens of |difference|,
    "logprob_diff_max": the largest (combine micro-batches by maximum, not by sum)}, in nats.
    """
    tokens = guarded(inputs)
    difference = jnp.abs(_log_weight(tokens)) * tokens.mask
    return {"logprob_diff": jnp.sum(difference), "logprob_diff_max": jnp.max(difference, initial=0.0)}
