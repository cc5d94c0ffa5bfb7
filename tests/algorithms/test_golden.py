"""Every vector of $JAXRL_SHARED/golden, whatever its files, variants, seeds, shapes and parameters.

Driven by index.json alone: a variant is recognised by the parameters it lists, never by its name. A variant
that is not understood, or an output array that no variant accounts for, is a failure, not a skip.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrl.algorithms.advantages import ADVANTAGES
from jaxrl.algorithms.hyper import resolve
from jaxrl.algorithms.length import LENGTH_REWARDS, LengthInputs
from jaxrl.algorithms.metrics import pass_at_k
from jaxrl.algorithms.selection import dropped, select, thresholds
from jaxrl.rollouts import concat
from tests.algorithms import golden_losses
from tests.algorithms.harness import make_group
from tests.shared import shared_path


def _load_index():
    try:
        return json.loads((shared_path("golden") / "index.json").read_text())
    except pytest.skip.Exception as skipped:
        pytest.skip(str(skipped), allow_module_level=True)


FILES = _load_index()["files"]
OUTPUTS = ("loss__", "grad__", "kl__", "adv__", "kept__", "kept_infquantile__", "thresholds__", "reward")


def _arrays(file):
    with np.load(shared_path("golden") / file) as z:
        return {k: z[k] for k in z.files}


def _kind(v):
    """What a variant is about, from the parameters it lists; None if it is none of the known kinds."""
    if "kl_penalty" in v:
        return "kl"
    if "sigma_base" in v or "loss_type" in v or "compute_policy_loss" in v.get("function", ""):
        return "loss"
    if v.get("function", "").startswith(("compute_", "advantage block")) and "rewards" in v:
        return "advantage"
    if {"low", "high", "max", "kept"} <= set(v):
        return "lspo"
    if v.get("family") in ("arora_zanette", "kimi_k1.5", "dapo_soft_overlong"):
        return "length"
    if "mode" in v and {"alpha", "formula_alpha", "code_alpha"} & set(v):
        return "lcpo"
    return None


def _cases(*kinds):
    return [(f, n) for f, e in FILES.items() for n, v in e.get("variants", {}).items() if _kind(v) in kinds]


@pytest.mark.parametrize("file", FILES)
def test_everything_in_the_index_is_understood(file):
    variants, arrays = FILES[file].get("variants", {}), _arrays(file)
    unknown = {n: v for n, v in variants.items() if _kind(v) is None}
    assert not unknown, f"no test knows how to check {unknown}"
    if not variants:
        assert "pass_at_k" in arrays, f"{file} lists no variants and holds no pass_at_k"
        return
    for name in arrays:
        if name in variants or not name.startswith(OUTPUTS) or name.startswith("rewards"):
            continue
        assert any(name.split("__", 1)[1].startswith(v) for v in variants), f"nothing checks {file}:{name}"


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("file", "variant"), _cases("loss", "kl"))
def test_losses(file, variant, dtype):
    parameters, z = FILES[file]["variants"][variant], _arrays(file)
    loss, grad, extras = golden_losses.evaluate(parameters, z, dtype)
    expected, slope = float(z[f"loss__{variant}"]), z.get(f"grad__{variant}")
    scale = max(1.0, abs(expected))
    loss_tolerance, grad_tolerance = (1e-6, 1e-7) if dtype == np.float64 else (5e-6, 5e-6)
    assert abs(loss - expected) <= loss_tolerance * scale
    if slope is not None:
        assert np.abs(grad - slope).max() <= grad_tolerance * np.abs(slope).max()
    if f"kl__{variant}" in z:
        mask = z["response_mask"] != 0
        np.testing.assert_allclose(
            extras["kl"][mask], z[f"kl__{variant}"][mask], **golden_losses.KL_TOLERANCE[dtype]
        )
    for name, n in golden_losses.expected_counts(parameters, z).items():
        assert extras[name] == n, name


ADVANTAGE_OF = {
    "compute_grpo_outcome_advantage": ("grpo", {}),
    "compute_rloo_outcome_advantage": ("rloo", {}),
    "compute_reinforce_plus_plus_baseline_outcome_advantage": ("reinforce_pp_baseline", {}),
    "compute_opo_outcome_advantage": ("opo", {}),
    "compute_gpg_outcome_advantage": ("gpg", {"alpha": "verl"}),
}


@pytest.mark.parametrize(("file", "variant"), _cases("advantage"))
def test_advantages(file, variant):
    v, z = FILES[file]["variants"][variant], _arrays(file)
    if "scale_rewards" in v:
        name, constants = "grpo", {"eps": 1e-4, "scale": v["scale_rewards"]}
    else:
        name, constants = ADVANTAGE_OF[v["function"]]
        if v.get("norm_adv_by_std_in_grpo") is False:
            name = "dr_grpo"
        if "f_norm" in v:
            constants = {**constants, "f_norm": v["f_norm"]}
    entry, hyper = resolve(ADVANTAGES, "advantage", name, constants)
    case = v["rewards"]
    lengths = (z["response_mask"] != 0).sum(1)
    record = SimpleNamespace(reward=z[f"rewards__{case}"], group=z[f"group_id__{case}"], lengths=lengths, columns={})
    found = entry.fn(record, hyper)
    # verl's whitening divides by count + 1e-8.
    tolerance = 1e-7 if name == "reinforce_pp_baseline" else 1e-12
    np.testing.assert_allclose(found, z[f"adv__{variant}"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("file", "variant"), _cases("lspo"))
def test_lspo(file, variant):
    v, z = FILES[file]["variants"][variant], _arrays(file)
    case = variant.rsplit("__", 1)[0]
    lengths, correct = z[f"lengths__{case}"], z[f"acc__{case}"]
    rollouts = concat([make_group(n, c, name=str(i)) for i, (n, c) in enumerate(zip(lengths, correct, strict=True))])
    fractions = {k: v[k] for k in ("low", "high", "max")}
    for quantile, expected in (("linear", f"kept__{variant}"), ("inf", f"kept_infquantile__{variant}")):
        if expected not in z:
            continue
        keep, reason = select(rollouts, "accuracy+lspo", {"lspo": {**fractions, "quantile": quantile}})
        alone, _ = select(rollouts, "lspo", {"lspo": {**fractions, "quantile": quantile}})
        np.testing.assert_array_equal(rollouts.group_any(keep), z[expected])
        assert (keep == alone).all() and (keep == rollouts.per_response(z[expected])).all()  # whole groups
        counts = dropped(rollouts, reason)
        assert z[expected].sum() + sum(counts.values()) == rollouts.num_groups
        filtered = sum(n for word, n in counts.items() if word.startswith("accuracy/"))
        assert filtered == (~z[f"survivors__{case}"]).sum()
    survivors = z[f"mean_len__{case}"][z[f"survivors__{case}"]]
    if len(survivors):
        found = thresholds(survivors, tuple(fractions.values()), "linear")
        np.testing.assert_allclose(found, z[f"thresholds__{variant}"], rtol=1e-14)


@pytest.mark.parametrize(("file", "variant"), _cases("lcpo"))
def test_lcpo(file, variant):
    v, z = FILES[file]["variants"][variant], _arrays(file)
    mode, flags = v["mode"].split(",")[0], v.get("flags", "")
    if mode == "exact":
        numerator, _, denominator = str(v["alpha"]).partition("/")
        name, constants = "lcpo_exact", {"alpha": float(numerator) / float(denominator or 1)}
    else:
        assert mode == "max", mode
        added = "multiplier_reward=False" in flags or "ADDED" in v["mode"]
        name = "lcpo_max"
        constants = {
            "alpha": v["formula_alpha"] if "formula_alpha" in v else v["code_alpha"] / 2,
            "delta": v.get("formula_delta", 0.5),
            "combine": "add" if added else "multiply",
        }
    entry, hyper = resolve(LENGTH_REWARDS, "length reward", name, constants)
    found = entry.fn(LengthInputs(z["correct"], z["n_y"], 10**6, budgets=z["n_gold"], modes=mode), hyper)
    np.testing.assert_allclose(found, z[variant], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("file", "variant"), _cases("length"))
def test_length_rewards(file, variant):
    v, z = FILES[file]["variants"][variant], _arrays(file)
    case = variant.split("__", 1)[0]
    lengths = z[f"lengths__{case}"]
    n = len(lengths)
    correct = z.get(f"correct__{case}", np.zeros(n))
    truncated = z[f"has_eos__{case}"] == 0 if f"has_eos__{case}" in z else np.zeros(n, bool)

    def reward(name, **constants):
        entry, hyper = resolve(LENGTH_REWARDS, "length reward", name, constants)
        return entry.fn(LengthInputs(correct, lengths, 10**6, truncated=truncated), hyper)

    checked = 0
    if v["family"] == "arora_zanette":
        found = {f"reward__{variant}": reward("arora", alpha=v["alpha"])}
    elif v["family"] == "kimi_k1.5":
        found = {f"reward__{variant}": reward("kimi") - correct}
    else:
        found = {}
        for name in (k for k in z if k.startswith("reward_") and k.split("__", 1)[1].startswith(variant)):
            source, rest = name.removeprefix("reward_").split("__", 1)
            factor = float(rest.removeprefix(variant).removeprefix("_factor") or 1)
            assert source in ("trl", "verl", "openrlhf"), source
            found[name] = reward(
                "overlong", max_length=v["l_max"], cache=v["l_cache"], factor=factor, floor=source != "verl"
            )
    for name, value in found.items():
        np.testing.assert_allclose(value, z[name], rtol=1e-12, atol=1e-12, err_msg=name)
        checked += 1
    assert checked


def test_pass_at_k():
    files = [f for f in FILES if not FILES[f].get("variants")]
    if not files:
        pytest.skip("no pass@k vectors in this set")
    for file in files:
        z = _arrays(file)
        found = [pass_at_k(int(n), int(c), int(k)) for n, c, k in zip(z["n"], z["c"], z["k"], strict=True)]
        np.testing.assert_allclose(found, z["pass_at_k"], rtol=1e-12, atol=1e-12)
