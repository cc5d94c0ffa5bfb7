"""Which of our losses, with which constants and counts, a variant of the golden index describes."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.algorithms.aggregation import aggregate
from jaxrl.algorithms.kl import kl_estimate
from tests.algorithms.harness import run_loss

KL_NAME = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
KL_TOLERANCE = {np.float64: {"rtol": 1e-12, "atol": 1e-12}, np.float32: {"rtol": 1e-5, "atol": 1e-6}}
TRL_AGGREGATION = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}


def _batch(z):
    ids = np.ones_like(z["response_mask"])
    return {k: z[k] for k in ("logp", "old_logp", "advantages", "response_mask")} | {"sequence_ids": ids}


def _kl(z, kind, dtype, aggregation, counts, norm=1.0, **options):
    """Aggregated KL, its gradient and the token values."""
    with jax.enable_x64(dtype == np.float64):
        logp, ref = (jnp.asarray(z[k], dtype) for k in ("logp", "ref_logp"))
        mask, ids = jnp.asarray(z["response_mask"]), jnp.ones(z["logp"].shape, jnp.int32)
        options = {k: jnp.asarray(v, dtype) if k == "old_logp" else v for k, v in options.items()}

        def value(logp):
            kl = kl_estimate(logp, ref, kind, **options)
            return aggregate(kl, mask, ids, aggregation, *counts, norm), kl

        (loss, kl), grad = jax.value_and_grad(value, has_aux=True)(logp)
        return float(loss), np.asarray(grad, np.float64), np.asarray(kl, np.float64)


def _verl(v, z):
    """(loss name, constants, aggregation) of a verl variant."""
    family = v.get("family") or v["function"].rsplit("compute_policy_loss_", 1)[1]
    if family == "vanilla":
        return (
            "ppo",
            {k: v[k] for k in ("clip_low", "clip_high")} | {"dual_clip": v.get("dual_clip_c") or 0.0},
            v["agg"],
        )
    if family == "gspo":
        return "gspo_token", {k: v[k] for k in ("clip_low", "clip_high")}, v["agg"]
    if family == "cispo":
        return "cispo", {k: v[k] for k in ("clip_low", "clip_high")}, v["agg"]
    if family == "sapo":
        return "sapo", {k: v[k] for k in ("tau_pos", "tau_neg")}, v["agg"]
    if family == "gpg":
        return "gpg", {}, v["agg"]
    if family == "gmpo":
        constants = {"clip_low": v["clip_low_log"], "clip_high": v["clip_high_log"]}
        return "gmpo", constants, "seq-mean-token-mean"
    raise AssertionError(f"unknown loss family {family!r} in {v}")


def _trl(v):
    kind = v["loss_type"]
    assert kind in TRL_AGGREGATION, f"unknown TRL loss type in {v}"
    aggregation = TRL_AGGREGATION[kind]
    if kind == "cispo":
        return "cispo", {"cap": v["eps_hi"]}, aggregation
    if kind == "sapo":
        return "sapo", {"tau_pos": v["tp"], "tau_neg": v["tn"]}, aggregation
    constants = {"clip_low": v["eps_lo"], "clip_high": v["eps_hi"]}
    if v.get("level", "token") == "sequence":
        assert not v.get("delta"), f"delta at sequence level is not covered: {v}"
        return "gspo", constants, aggregation
    delta = v.get("delta") or 0.0
    assert not delta or delta > 1 + v["eps_hi"], f"delta is dual clip only beyond 1 + eps_hi: {v}"
    return "ppo", constants | {"dual_clip": delta}, aggregation


def evaluate(v, z, dtype):
    """(loss, grad, extras) of a variant: extras are the loss's stats, or the token values of a KL term."""
    rows, width = z["logp"].shape
    mask = z["response_mask"] != 0
    tokens, filled = int(mask.sum()), int(mask.any(1).sum())
    if "kl_penalty" in v:
        kind = KL_NAME[v["kl_penalty"].rstrip("+")] + ("+" if v["kl_penalty"].endswith("+") else "")
        loss, grad, kl = _kl(z, kind, dtype, v["agg"], (tokens, filled))
        return loss, grad, {"kl": kl}
    if "sigma_base" in v:
        constants = {k: v[k] for k in ("sigma_base", "alpha", "sigma_high", "risk_low", "risk_high")}
        constants |= {"beta_high": v["beta_pos"], "beta_low": v["beta_neg"]}
        constants |= {"differentiable_gate": not v.get("gate_detached", True)}
        name, aggregation, sequences, norm = "maspo", v["agg"], filled, v.get("loss_scale_factor") or width
        if aggregation == "seq-mean-token-sum-norm":
            sequences = 1  # the fork divides by the width alone
    elif "loss_type" in v:
        (name, constants, aggregation), sequences, norm = _trl(v), rows, v["L"]
    else:
        (name, constants, aggregation), sequences = _verl(v, z), filled
        norm = v.get("loss_scale_factor") or width
    batch = _batch(z)
    loss, grad, _, stats = run_loss(name, batch, aggregation, constants, (tokens, sequences), norm, dtype)
    if v.get("beta"):
        options = {"value_clamp": 0} | ({"old_logp": z["old_logp"]} if v.get("bias_kl") else {})
        penalty, slope, _ = _kl(z, "k3", dtype, aggregation, (tokens, sequences), norm, **options)
        loss, grad = loss + v["beta"] * penalty, grad + v["beta"] * slope
    return loss, grad, stats


def expected_counts(v, z):
    """Statistics that the index gives for a variant, under our names."""
    counts = v.get("branch_counts", {})
    if v.get("family") == "vanilla":
        return {
            ours: counts[k]
            for k, ours in (("clip_low", "clip_low"), ("clip_high", "clip_high"), ("dual", "dual_clip"))
            if k in counts
        }
    if "gated_pos" in counts:
        return {"gated": counts["gated_pos"] + counts["gated_neg"]}
    return {}
