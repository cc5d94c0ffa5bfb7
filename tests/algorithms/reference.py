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
    if name in ("dppo_tv", "dppo_kl"):
        return -adv * np.minimum(rho_frozen, h["ratio_max"]) * ~_dppo_outside(name, frozen["logp"], old, adv, h) * logp
    if name == "vespo":
        return -_vespo_phi(frozen["logp"] - old, adv, h) * adv * logp
    if name == "dro":
        return -adv * logp + h["beta"] / 2 * (logp - old) ** 2
    if name == "clip_cov":
        kept = ~_left_out(frozen, h)
        return kept * _clip_pieces(rho, adv, 1 - h["clip_low"], 1 + h["clip_high"], 0.0)[0]
    if name == "kl_cov":
        return -rho * adv + h["kl_coef"] * np.abs(logp - old) * _held(frozen, h)
    raise AssertionError(f"no reference for {name}")


def _dppo_outside(name, logp, old, adv, h):
    p, q = np.exp(logp), np.exp(old)
    if name == "dppo_tv":
        return np.where(adv > 0, p - q > h["high"], q - p > h["low"])
    divergence = q * np.log(q / p) + (1 - q) * np.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return np.where(adv > 0, (divergence > h["high"]) & (p > q), (divergence > h["low"]) & (p < q))


def _vespo_phi(log_ratio, adv, h):
    w = np.exp(np.sum(log_ratio))
    k, slope = np.where(adv >= 0, h["k_pos"], h["k_neg"]), np.where(adv >= 0, h["lambda_pos"], h["lambda_neg"])
    return w**k * np.exp(slope * (1 - w))


def _cov(seq, h):
    return (seq["advantages"] - h["advantage_mean"]) * (seq["logp"] - h["logp_mean"])


def _held(seq, h):
    return _cov(seq, h) >= h["least"]


def _in_the_band(seq, h):
    rho, adv, cov = np.exp(seq["logp"] - seq["old_logp"]), seq["advantages"], _cov(seq, h)
    clipped = np.where(adv > 0, rho > 1 + h["clip_high"], (adv < 0) & (rho < 1 - h["clip_low"]))
    return ~clipped & (cov > h["cov_low"]) & (cov < h["cov_high"])


def _left_out(seq, h):
    def mix(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = ((x ^ (x >> shift)) * factor) % 2**32
        return x ^ (x >> 16)

    a, b = (int(v) for v in (2654435761, 2**32))
    keys = [(int(np.round(o * 4096)) * a + int(np.round(v * 4096))) % b
            for o, v in zip(seq["old_logp"], seq["advantages"], strict=True)]  # fmt: skip
    return _in_the_band(seq, h) & (np.array([(mix(k) >> 8) / 2**24 for k in keys]) < h["share"])


def prepared(name, sequences, h):
    """The constants that a loss takes from the whole mini-batch."""
    if name == "bapo":
        low, high = bapo_bounds(sequences, h)
        return h | {"low": low, "high": high}
    if name not in ("clip_cov", "kl_cov"):
        return h
    every = {k: np.concatenate([s[k] for s in sequences]) for k in ("logp", "old_logp", "advantages")}
    h = h | {"advantage_mean": every["advantages"].mean(), "logp_mean": every["logp"].mean()}
    count = max(int(h["ratio"] * len(every["logp"]) + 1e-4), 1) if h["ratio"] else 0
    if name == "kl_cov":
        return h | {"least": np.sort(_cov(every, h))[-count] if count else np.inf}
    return h | {"share": count / max(_in_the_band(every, h).sum(), 1)}


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
    if name in ("dppo_tv", "dppo_kl"):
        return -w * adv * np.minimum(rho, h["ratio_max"]) * ~_dppo_outside(name, logp, old, adv, h)
    if name == "vespo":
        return -w * _vespo_phi(logp - old, adv, h) * adv
    if name == "dro":
        return w * (h["beta"] * (logp - old) - adv)
    if name == "clip_cov":
        return w * ~_left_out(seq, h) * _clip_pieces(rho, adv, 1 - h["clip_low"], 1 + h["clip_high"], 0.0)[1]
    if name == "kl_cov":
        return w * (h["kl_coef"] * np.sign(logp - old) * _held(seq, h) - rho * adv)
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
