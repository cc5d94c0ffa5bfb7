"""A result belongs to what was evaluated, by content."""

import json
import sys

import pytest

from jaxrl.errors import UserError
from jaxrl.evaluation.identity import model_identity, reward_identity
from jaxrl.runtime import manifest


def hf(path, weights=b"w", template="t"):
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(weights)
    (path / "config.json").write_text("{}")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return path


def test_weights_and_template_replaced_at_the_same_path_are_another_model(tmp_path):
    first = model_identity(hf(tmp_path / "m"), None)
    assert model_identity(hf(tmp_path / "elsewhere"), None) == first
    other = model_identity(hf(tmp_path / "m", weights=b"v"), None)
    assert other["weights"] != first["weights"] and other["tokenizer"] == first["tokenizer"]
    other = model_identity(hf(tmp_path / "m", template="u"), None)
    assert other["weights"] == first["weights"] and other["tokenizer"] != first["tokenizer"]


def test_a_checkpoint_is_known_by_its_manifest(tmp_path):
    hf(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    found = []
    for content in ("a", "b"):
        path = manifest.step_path(tmp_path / "checkpoints", 7)
        path.mkdir(parents=True, exist_ok=True)
        (path / manifest.MANIFEST).write_text(content)
        found.append(model_identity(tmp_path, 7)["weights"])
    assert found[0] != found[1]


def test_an_edited_reward_is_another_reward(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_reward_xyz.py").write_text("def f(*a, **k): return 1.0\n")
    first = reward_identity("own_reward_xyz:f")
    (tmp_path / "own_reward_xyz.py").write_text("def f(*a, **k): return 0.0\n")
    sys.modules.pop("own_reward_xyz", None)
    assert reward_identity("own_reward_xyz:f") != first
    with pytest.raises(UserError, match="no module 'nowhere_xyz'"):
        reward_identity("nowhere_xyz:f")
