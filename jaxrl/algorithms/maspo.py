"""MASPO (2602.17550): a soft gate on the ratio instead of a clip, wide for rare tokens, narrow for likely ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.algorithms.hyper import Flag, Number
from jaxrl.algorithms.inputs import LossInputs, guarded, token_ratio, token_stats

# Published constants (released code); alpha 0.5 is recommended for 1.5B models, sigma_base 1, 2 or 3.
MASPO = {
    "sigma_base": Number(1.0, 0, above=True),
    "alpha": Number(0.3),
    "beta_high": Number(0.03),
    "beta_low": Number(0.03),
    "sigma_high": Number(10.0, 0, above=True),
    "risk_low": Number(0.1, 0, above=True),
    "risk_high": Number(10.0, 0, above=True),
    "log_ratio_clamp": Number(20.0, 0, 80, above=True),
    "differentiable_gate": Flag(False),
}


def maspo_gate(ratio: jax.Array, old_logp: jax.Array, advantages: jax.Array, hyper: dict):
    """Gate F in [0, 1], its width sigma, and where it acts (bool), all of the common shape of the arguments.

        sigma = clip(sigma_base / pi_old^alpha, sigma_base, sigma_high) * risk
        risk  = clip(1 + beta_high A, risk_low, risk_high)        for A > 0
                clip(1 / (1 - beta_low A), risk_low, risk_high)   for A < 0
        F     = exp(-(rho - 1)^2 / (2 sigma^2))  if (rho - 1) A > 0,  else 1

    The gate acts only on movement further in the direction that the advantage pushes. The upper bound of the mass term
    is applied before the risk factor, as in the released code (so sigma can exceed sigma_high).
    """
    mass = hyper["sigma_base"] * jnp.exp(jnp.minimum(-hyper["alpha"] * old_logp, 80.0))  # 80: finite in float32
    mass = jnp.minimum(jnp.maximum(mass, hyper["sigma_base"]), hyper["sigma_high"])
    risk_pos = 1 + hyper["beta_high"] * jnp.maximum(advantages, 0)
    risk_neg = 1 / (1 - hyper["beta_low"] * jnp.minimum(advantages, 0))
    sigma = mass * jnp.clip(jnp.where(advantages > 0, risk_pos, risk_neg), hyper["risk_low"], hyper["risk_high"])
    gated = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
    # Double where: outside the gated region the exponent is replaced before exp, so its gradient is exactly 0.
    scaled = jnp.where(gated, (ratio - 1) / sigma, 0)
    return jnp.exp(-0.5 * scaled**2), sigma, gated


def maspo_loss(inputs: LossInputs, hyper):
    """-F rho A with F detached (as released), or differentiated too if hyper["differentiable_gate"].

    Constants: MASPO. Detached, the gradient is F rho A grad log pi and never reverses sign.
    Differentiable, it is multiplied by 1 - rho (rho - 1) / sigma^2 in the gated region, which is negative for rho
    beyond (1 + sqrt(1 + 4 sigma^2)) / 2. Extra sums: gate (F) and gated (tokens with F < 1).
    """
    tokens = guarded(inputs)
    ratio = token_ratio(tokens, hyper)
    gate, _, gated = maspo_gate(ratio, tokens.old_logp, tokens.advantages, hyper)
    if not hyper["differentiable_gate"]:
        gate = jax.lax.stop_gradient(gate)
    return -tokens.advantages * (gate * ratio), token_stats(tokens, ratio, gate=gate, gated=gated)
