"""The losses again, in float64 NumPy with gradients derived by hand, one unpacked sequence at a time.

Written from the formulas (no autodiff, no packing, no clamps that ordinary inputs do not reach), to be
compared with jaxrl.algorithms. `token_losses` gives the values; `gradient` gives d(sum_t w_t l_t) / d logp
for token weights w.
"""

import numpy as np


def _clip_pieces(rho, adv, low, high, dual):
    """(l, dl / d log rho) of PPO's pessimistic clip with bounds low, high and dual clip c."""
    unclipped, clipped = rho * adv, np.clip(rho, low, high) * adv
    take_clipped = clipped < unclipped
    objective = np.where(take_clipped, clipped, unclipped)
    slope = np.where(take_clipped, 0.0, rho * adv)
    if dual > 0:
        capped = (adv < 0) & (objective < dual * adv)
        objective, slope = np.where(capped, dual * adv, objective), np.where(capped, 0.0, slope)
    return -objective, -slope


def _bounds(name, old, h):
    if name in ("grpo", "dr_grpo", "dapo", "ppo"):
        return 1 - h["clip_low"], 1 + h["clip_high"]
    if name == "bapo":
        return h["low"], h["high"]
    q = np.exp(old)
    low = 0.5 + 0.5 * np.sqrt(np.maximum(1 - 4 * h["eps_low"] / q, 0))
    return low, np.minimum(0.5 + 0.5 * np.sqrt(1 + 4 * h["eps_high"] / q), h["ratio_max"])


def _maspo_gate(rho, old, adv, h):
    gate, sigma = np.ones_like(rho), np.full_like(rho, np.inf)
    for t in range(len(rho)):
        mass = h["sigma_base"] / np.exp(old[t]) ** h["alpha"]
        mass = min(max(mass, h["sigma_base"]), h["sigma_high"])
        if adv[t] > 0 and rho[t] > 1:
            risk = 1 + h["beta_high"] * adv[t]
        elif adv[t] < 0 and rho[t] < 1:
            risk = 1 / (1 - h["beta_low"] * adv[t])
        else:
            continue
        sigma[t] = mass * min(max(risk, h["risk_low"]), h["risk_high"])
        gate[t] = np.exp(-((rho[t] - 1) ** 2) / (2 * sigma[t] ** 2))
    return gate, sigma


def token_losses(name, seq, h, frozen=None):
    """Token losses [n] of one sequence {logp, old_logp, advantages}.

    frozen: the sequence at which stop-gradient factors are evaluated (default: the same), so that finite
    differences of this function are the method's gradient.
    """
    logp, old, adv = seq["logp"], seq["old_logp"], seq["advantages"]
    frozen = seq if frozen is None else frozen
    rho, rho_frozen = np.exp(logp - old), np.exp(frozen["logp"] - old)
    if name in ("grpo", "dr_grpo", "dapo", "ppo", "dac", "bapo"):
        return _clip_pieces(rho, adv, *_bounds(name, old, h), h["dual_clip"])[0]
    if name in ("gspo", "luspo", "gspo_token"):
        s = np.exp(np.mean(logp - old))
        if name == "gspo_token":
            s = np.exp(np.mean(frozen["logp"] - old)) * np.exp(logp - frozen["logp"])
        return -np.minimum(s * adv, np.clip(s, 1 - h["clip_low"], 1 + h["clip_high"]) * adv)
    if name == "gmpo":
        x = logp - old
        x = np.where(adv > 0, np.minimum(x, h["clip_high"]), np.maximum(x, -h["clip_low"]))
        return np.full_like(logp, -np.mean(adv) * np.exp(np.mean(x)))
    if name == "cispo":
        weight = np.clip(rho_frozen, 1 - h["clip_low"], 1 + h["clip_high"])
        if h["cap"] > 0:
            weight = np.minimum(rho_frozen, h["cap"])
        return -weight * adv * logp
    if name == "sapo":
        tau = np.where(adv > 0, h["tau_pos"], h["tau_neg"])
        return -adv * 4 / tau / (1 + np.exp(-tau * (rho - 1)))
    if name == "gpg":
        return -adv * logp
    if name == "maspo":
        gate, _ = _maspo_gate(rho if h["differentiable_gate"] else rho_frozen, old, adv, h)
        return -gate * rho * adv
    raise AssertionError(f"no reference for {name}")


def gradient(name, seq, h, w):
    """d(sum_t w_t l_t) / d logp [n], derived by hand."""
    logp, old, adv = seq["logp"], seq["old_logp"], seq["advantages"]
    rho, n = np.exp(logp - old), len(logp)
    if name in ("grpo", "dr_grpo", "dapo", "ppo", "dac", "bapo"):
        return w * _clip_pieces(rho, adv, *_bounds(name, old, h), h["dual_clip"])[1]
    if name in ("gspo", "luspo", "gspo_token"):
        s = np.exp(np.mean(logp - old))
        cut = np.where(adv > 0, s > 1 + h["clip_high"], s < 1 - h["clip_low"])
        slope = np.where(cut, 0.0, -s * adv)
        return w * slope if name == "gspo_token" else np.full(n, np.sum(w * slope) / n)
    if name == "gmpo":
        x = logp - old
        free = np.where(adv > 0, x < h["clip_high"], x > -h["clip_low"])
        value = token_losses(name, seq, h)
        return np.sum(w * value) / n * free
    if name == "cispo":
        weight = (
            np.minimum(rho, h["cap"]) if h["cap"] > 0 else np.clip(rho, 1 - h["clip_low"], 1 + h["clip_high"])
        )
        return -w * weight * adv
    if name == "sapo":
        tau = np.where(adv > 0, h["tau_pos"], h["tau_neg"])
        p = 1 / (1 + np.exp(-tau * (rho - 1)))
        return -w * adv * 4 * p * (1 - p) * rho
    if name == "gpg":
        return -w * adv
    if name == "maspo":
        gate, sigma = _maspo_gate(rho, old, adv, h)
        factor = 1 - rho * (rho - 1) / sigma**2 if h["differentiable_gate"] else 1.0
        return -w * gate * rho * adv * factor
    raise AssertionError(f"no reference for {name}")


def token_weights(sequences, aggregation, norm_length=1.0):
    """Weights w_t of the token losses in the aggregated loss: a list of [n] per sequence."""
    total, count = sum(len(s["logp"]) for s in sequences), len(sequences)
    weight = {
        "token-mean": lambda n: 1 / total,
        "seq-mean-token-mean": lambda n: 1 / (count * n),
        "seq-mean-token-sum": lambda n: 1 / count,
        "seq-mean-token-sum-norm": lambda n: 1 / (count * norm_length),
    }[aggregation]
    return [np.full(len(s["logp"]), weight(len(s["logp"]))) for s in sequences]


def bapo_bounds(sequences, h):
    """BAPO's search with Python numbers over all tokens: (low, high)."""
    rho = np.concatenate([np.exp(s["logp"] - s["old_logp"]) for s in sequences])
    adv = np.concatenate([s["advantages"] for s in sequences])

    def met(low, high):
        contribution = np.where(adv >= 0, np.minimum(rho, high), np.maximum(rho, low)) * adv
        positive, negative = contribution[contribution > 0].sum(), -contribution[contribution < 0].sum()
        return negative == 0 or positive / (positive + negative) >= h["target"]

    low, high = h["low"], h["high"]
    while not met(low, high) and low < h["low_max"] - 1e-9:
        low = min(low + h["low_step"], h["low_max"])
    while not met(low, high) and high < h["high_max"] - 1e-9:
        high = min(high + h["high_step"], h["high_max"])
    return low, high
