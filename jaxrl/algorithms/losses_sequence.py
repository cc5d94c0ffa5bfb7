"""Losses on one ratio per sequence: GSPO, GSPO-token, LUSPO (GSPO with another aggregation), GMPO.

Each writes its sequence loss at every token of the sequence, so that seq-mean-token-mean gives the mean over
sequences; the reductions run over segment ids, so packed and padded rows give the same values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.algorithms.inputs import LossInputs, guarded, token_stats
from jaxrl.algorithms.segments import sequence_mean


def _sequence_clip(tokens, ratio, hyper):
    low, high = 1 - hyper["clip_low"], 1 + hyper["clip_high"]
    adv = tokens.advantages
    plain, clipped = -ratio * adv, -jnp.clip(ratio, low, high) * adv
    stats = token_stats(tokens, ratio, (adv < 0) & (ratio < low), (adv > 0) & (ratio > high))
    return jnp.where(clipped > plain, clipped, plain), stats


def _sequence_ratio(tokens, hyper):
    """s_i = exp(mean_t log rho_t) at each token; the exponent is capped at log_ratio_clamp (verl: 10)."""
    mean = sequence_mean(tokens.log_ratio, tokens.mask, tokens.segment_ids)
    return jnp.exp(jnp.minimum(mean, hyper["log_ratio_clamp"]))


def gspo_loss(inputs: LossInputs, hyper):
    """GSPO (2507.18071 eq. 5-7): l_i = max(-s_i A, -clip(s_i, 1 - low, 1 + high) A), s_i = exp(mean_t log rho).

    The advantage may vary within a sequence (then each token has its own l). hyper:
    clip_low, clip_high, log_ratio_clamp. Clip counts are tokens of clipped sequences.
    """
    tokens = guarded(inputs)
    return _sequence_clip(tokens, _sequence_ratio(tokens, hyper), hyper)


def gspo_token_loss(inputs: LossInputs, hyper):
    """GSPO-token (2507.18071 eq. 13-14): the ratio sg[s_i] pi_t / sg[pi_t], equal in value to GSPO's.

    With one advantage per sequence its gradient equals GSPO's as well; with token advantages each token is
    credited with its own. Arguments as `gspo_loss`.
    """
    tokens = guarded(inputs)
    sequence = jax.lax.stop_gradient(_sequence_ratio(tokens, hyper))
    ratio = sequence * jnp.exp(tokens.logp - jax.lax.stop_gradient(tokens.logp))
    return _sequence_clip(tokens, ratio, hyper)


def gmpo_loss(inputs: LossInputs, hyper):
    """GMPO (2507.20673): -A_i exp(mean_t x_t), x_t = log rho clipped in log space on the side its sign of A pushes to.

        x = min(log rho, high) for A > 0,   x = max(log rho, -low) for A < 0,   x = 0 for A = 0

    A_i is the mean token advantage. hyper: clip_low, clip_high (in log space), log_ratio_clamp.
    """
    tokens = guarded(inputs)
    adv, log_ratio = tokens.advantages, tokens.log_ratio
    clip_high = (adv > 0) & (log_ratio > hyper["clip_high"])
    clip_low = (adv < 0) & (log_ratio < -hyper["clip_low"])
    clipped = jnp.where(clip_high, hyper["clip_high"], jnp.where(clip_low, -hyper["clip_low"], log_ratio))
    clipped = jnp.clip(jnp.where(adv == 0, 0, clipped), -hyper["log_ratio_clamp"], hyper["log_ratio_clamp"])
    ratio = jnp.exp(sequence_mean(clipped, tokens.mask, tokens.segment_ids))
    loss = -sequence_mean(adv, tokens.mask, tokens.segment_ids) * ratio
    return loss, token_stats(tokens, ratio, clip_low, clip_high)
