"""A model argument means the same parameters whether it names a Hugging Face directory or a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.errors import UserError
from jaxrl.runtime.checkpoint import Checkpointer
from jaxrl.runtime.model_source import checkpoint_steps, is_run, load_model
from models.config import DecoderConfig, to_hf
from models.decoder import abstract_params
from models.tokenizers import vocab_tokenizer
from models.weights import save_params

CONFIG = DecoderConfig(6, 8, 12, 2, 2, 1, 4, tie_embeddings=True)
TOKENIZER = vocab_tokenizer(["<pad>", ".", "a", "b", "c", "d"], ".", "<pad>")


def parameters(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes, _ = abstract_params(CONFIG)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), shapes)


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(to_hf(CONFIG)))
    TOKENIZER.save(tmp_path / "model")
    with Checkpointer(tmp_path / "checkpoints", keep_last=5) as saver:
        for step in (2, 4):
            state = {"params": parameters(step), "opt": {"mu": jnp.zeros(3)}, "key": jax.random.key(0)}
            saver.save(step, state, {})
    return tmp_path


def test_huggingface_directory(tmp_path):
    save_params(tmp_path, parameters(0), CONFIG, TOKENIZER)
    config, params, tokenizer = load_model(tmp_path)
    assert (config, tokenizer.encode("abd.")) == (CONFIG, [2, 3, 5, 1])
    assert not is_run(tmp_path) and checkpoint_steps(tmp_path) == []
    assert_same(params, parameters(0))


def test_run_directory_newest_and_chosen_checkpoint(run):
    config, params, tokenizer = load_model(run)
    (run / "checkpoints" / "00000006").mkdir()  # a save that was cut off
    assert is_run(run) and checkpoint_steps(run) == [2, 4]
    assert (config, tokenizer.decode([2, 4])) == (CONFIG, "ac")
    assert_same(params, parameters(4))
    assert_same(load_model(run, step=2)[1], parameters(2))


def test_dtype_and_shardings(run):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, parameters(0))
    params = load_model(run, jnp.bfloat16, shardings)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters(4)))


def test_parameters_stored_in_bfloat16_need_no_hint(run):
    with Checkpointer(run / "checkpoints") as saver:
        saver.save(6, {"params": parameters(6, jnp.bfloat16)}, {})
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), parameters(6, jnp.bfloat16))
    assert_same(load_model(run)[1], rounded)


@pytest.mark.parametrize("where, step, said", [
    ("nothing", None, "no such directory"),
    (".", 3, "no checkpoint of step 3"),
    ("empty", None, "config.json: no such file"),
    ("young", None, "no checkpoint yet"),
    ("hf", 2, "no checkpoint of step 2"),
])
def test_what_is_missing_is_named(run, where, step, said):
    (run / "empty").mkdir()
    save_params(run / "hf", parameters(0), CONFIG, TOKENIZER)
    (run / "young").mkdir()
    (run / "model").rename(run / "young" / "model") if where == "young" else None
    with pytest.raises(UserError, match=said):
        load_model(run / where, step=step)
