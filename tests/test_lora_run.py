"""A run that trains adapters: what it leaves behind, how it goes on, and who can read it."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl import train
from jaxrl.errors import UserError
from jaxrl.export import export
from jaxrl.runtime.manifest import read_manifest, step_paths
from jaxrl.runtime.metrics import read_metrics
from jaxrl.runtime.model_source import load_model
from models.lora import load_adapters
from tests.chaos import assert_same_run
from tests.tiny import tiny

LORA = {"model.lora.rank": 2, "model.lora.alpha": 4.0, "model.lora.base": "int8", "algorithm.kl_coef": 0.05,
        "batch.updates": 2, "optimizer.learning_rate": 2e-2, "checkpoint.every": 1, "checkpoint.keep": 9}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory, dial_model):
    """The directory of a run of three steps without a break."""
    run = tmp_path_factory.mktemp("straight")
    assert train.train(tiny(run, {**LORA, "steps": 3}, dial_model)) == 0
    return run


def test_checkpoints_hold_adapters_and_the_name_of_the_base(straight):
    for _, path in step_paths(straight / "checkpoints"):
        names = read_manifest(path)["arrays"]
        assert not [n for n in names if n.startswith("params/") and "_lora_" not in n]
        assert "params/layers/attn/q_lora_a" in names
        assert len(json.loads((path / "host.json").read_text())["base"]) == 16
    assert not (straight / "base").exists() and not (straight / "reference").exists()
    records = read_metrics(straight / "metrics.jsonl")
    assert 0 < 5 * records[1]["kl"] < records[3]["kl"]  # the base is the reference, from which the adapters move away


def test_a_run_that_was_cut_goes_on_bit_for_bit(straight, dial_model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for step in (2, 3):  # as if it had ended after the first
        shutil.rmtree(dict(step_paths(run / "checkpoints"))[step])
    assert train.train(tiny(run, {**LORA, "steps": 3}, dial_model)) == 0
    assert_same_run(run, straight)


def test_another_base_is_refused(straight, dial_model, tmp_path):
    run, other = tmp_path / "run", tmp_path / "model"
    shutil.copytree(straight, run)
    shutil.copytree(dial_model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"config.model.path={other}: not the weights that the adapters .* beside"):
        train.train(tiny(run, {**LORA, "steps": 4}, other))
    assert unchanged(run, straight)


def unchanged(run, straight) -> bool:
    """Whether a refused start left what describes the run as it was, so that the run can still be read."""
    files = "config.json", "model/adapter_config.json", "metrics.jsonl"
    return [(run / f).read_bytes() for f in files] == [(straight / f).read_bytes() for f in files]


@pytest.mark.parametrize("changed", [{"model.lora.alpha": 8.0}, {"model.lora.rslora": True}])
def test_another_factor_is_refused(straight, dial_model, tmp_path, changed):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    with pytest.raises(UserError, match=r"config.model.lora.alpha=.*: the adapters of .* with alpha=4.0, rslora=False"):
        train.train(tiny(run, {**LORA, "steps": 3, **changed}, dial_model))
    assert unchanged(run, straight)


def test_whoever_reads_the_run_gets_the_merged_model(straight, dial_model, tmp_path):
    """load_model and export, written out: the int8 base as it was trained beside, plus the adapters' products."""
    config, merged, _ = load_model(straight)
    before = load_model(dial_model)[1]
    export(str(straight), str(tmp_path / "whole"))
    again = load_model(tmp_path / "whole")[1]
    for a, b in zip(*map(jax.tree.leaves, (again, merged)), strict=True):
        np.testing.assert_array_equal(a, b)
    export(str(straight), str(tmp_path / "adapters"), adapters=True)
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        dial_model)
    lora, adapters = load_adapters(tmp_path / "adapters", config)
    assert (lora.rank, lora.scale) == (2, 2.0)
    w = np.float32(jax.numpy.asarray(before["layers"]["mlp"]["up"], jax.numpy.bfloat16))
    step = np.abs(w).max(1, keepdims=True) / 127
    a, b = (adapters["layers"]["mlp"][f"up_lora_{half}"] for half in "ab")
    assert np.abs(b).max() > 1e-3
    rounded = (merged["layers"]["mlp"]["up"] - 2.0 * a @ b) / step
    np.testing.assert_allclose(rounded, np.round(rounded), atol=1e-3)
    assert (np.abs(rounded - w / step) < 0.501).all()


def test_training_goes_on_from_exported_adapters(straight, dial_model, tmp_path):
    export(str(straight), str(tmp_path / "adapters"), adapters=True)
    changes = {"model.lora.path": str(tmp_path / "adapters"), "model.lora.base": "int8", "steps": 1}
    assert train.train(tiny(tmp_path / "run", changes, dial_model)) == 0
    first, last = (read_metrics(run / "metrics.jsonl") for run in (tmp_path / "run", straight))
    assert first[0]["eval/accuracy"] == last[-1]["eval/accuracy"]  # it begins where the other ended


@pytest.mark.slow
def test_a_warm_started_base_is_kept_beside_the_run(tmp_path):
    changes = {**LORA, "sft.steps": 6, "sft.full_steps": 3, "sft.warmup_steps": 2}
    assert train.train(tiny(tmp_path, {**changes, "steps": 1})) == 0
    assert (tmp_path / "base").is_dir()
    assert train.train(tiny(tmp_path, {**changes, "steps": 2})) == 0
    assert load_model(tmp_path)[1]["layers"]["attn"]["q"].shape == (1, 32, 32)
