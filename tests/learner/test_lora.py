"""Training adapters: their gradient by the chain rule from that of the whole matrices, and what rests meanwhile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.learner.state import init_state
from jaxrl.learner.update import build_programs, place_batch
from jaxrl.runtime.config import base_config, validate
from models.decoder import init_params
from models.lora import LoRA, frozen_base, init_adapters, join, merge
from tests.learner.test_update import CONFIG as WHOLE
from tests.learner.test_update import FULL, SGD, batch_of, mesh

LORA = LoRA(3, 6.0, ("q", "o", "mlp"))
CONFIG = dataclasses.replace(WHOLE, lora_scale=LORA.scale)



def test_the_gradient_is_the_chain_rule_applied_to_that_of_the_matrices():
    """With W' = W + s a b:  da = s dW' b^T,  db = s a^T dW'. dW' comes from full training at W'."""
    base = init_params(CONFIG, jax.random.key(3))
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
                            init_adapters(CONFIG, LORA, jax.random.key(1)))
    before = jax.tree.map(np.array, adapters)
    batch = place_batch(batch_of()[0], mesh())
    merged = merge(join(base, adapters), CONFIG, jnp.float32)
    full = init_state(WHOLE, SGD, mesh(), params=jax.tree.map(jnp.copy, merged))
    after, want = build_programs(WHOLE, mesh(), SGD, FULL).update(full, batch)
    slope = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), merged, after.params)["layers"]
    state = init_state(CONFIG, SGD, mesh(), params=adapters, lora=LORA)
    frozen = jax.tree.map(np.array, base)
    state, got = build_programs(CONFIG, mesh(), SGD, FULL, lora=LORA).update(state, batch, base)
    for name in want:
        if name != "grad_norm":
            assert got[name] == pytest.approx(float(want[name]), rel=1e-4, abs=1e-5), name
    moved = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), before, state.params)["layers"]
    assert set(moved["attn"]) == {f"{n}_lora_{half}" for n in "qo" for half in "ab"}
    scale = float(optax.tree.norm(moved))
    assert got["grad_norm"] == pytest.approx(scale, rel=1e-4)
    for part, name in (("attn", "q"), ("attn", "o"), ("mlp", "gate"), ("mlp", "up"), ("mlp", "down")):
        a, b = (np.float64(before["layers"][part][f"{name}_lora_{half}"]) for half in "ab")
        da = LORA.scale * slope[part][name] @ b.transpose(0, 2, 1)
        db = LORA.scale * a.transpose(0, 2, 1) @ slope[part][name]
        for half, expected in (("a", da), ("b", db)):
            assert np.abs(moved[part][f"{name}_lora_{half}"] - expected).max() < 5e-5 * scale, (name, half)
            assert np.abs(expected).max() > 1e-3 * scale
    for a, b in zip(*map(jax.tree.leaves, (base, frozen)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_a_learner_trains_adapters_beside_a_resting_base(kind):
    """Two steps of two updates with a KL term: the first KL is 0 (the reference is the base), moments exist for the
    adapters alone, and the base does not move."""
    config = base_config()
    config.model.lora.rank, config.model.lora.targets, config.model.lora.base = 2, ("attention", "down"), kind
    config.algorithm.kl_coef, config.batch.updates, config.batch.row_tokens = 0.1, 1, 64
    config.optimizer.learning_rate = 1e-2
    learner = Learner(config, WHOLE, mesh())
    state = learner.init(init_params(WHOLE, jax.random.key(3)))
    base = jax.tree.map(np.array, learner.frozen)
    types = {"bfloat16": {"bfloat16"}, "int8": {"bfloat16", "int8", "float32"}}
    assert {str(x.dtype) for x in jax.tree.leaves(base)} == types[kind]
    assert jax.tree.structure(learner.frozen) == jax.tree.structure(learner.abstract_base())
    adam = next(s for s in state.opt_state if hasattr(s, "nu"))
    assert jax.tree.structure(adam.nu) == jax.tree.structure(state.params) != jax.tree.structure(base)
    kl, batch = [], batch_of()[0]
    for _ in range(2):
        state, metrics = learner.update(state, [batch], learner.frozen)
        kl.append(metrics["kl"])
        assert metrics["nonfinite"] == 0 and metrics["grad_norm"] > 0
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 1e-4
    for a, b in zip(*map(jax.tree.leaves, (learner.frozen, base)), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), b.view(np.uint8))


def test_a_frozen_head_still_gives_the_hidden_states_gradient():
    """An untied model: the gradient of its adapters, with the head's own left out."""
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    base, batch = init_params(config, jax.random.key(3)), place_batch(batch_of()[0], mesh())
    full = init_state(config, SGD, mesh(), params=jax.tree.map(jnp.copy, base))
    before = np.array(full.params["layers"]["attn"]["q"])
    after, _ = build_programs(config, mesh(), SGD, FULL).update(full, batch)
    slope = before - np.array(after.params["layers"]["attn"]["q"])
    state = init_state(config, SGD, mesh(), jax.random.key(0), lora=LORA)
    a = np.array(state.params["layers"]["attn"]["q_lora_a"])
    state, _ = build_programs(config, mesh(), SGD, FULL, lora=LORA).update(state, batch, base)
    got = -np.array(state.params["layers"]["attn"]["q_lora_b"])  # b was 0
    want = LORA.scale * a.transpose(0, 2, 1) @ slope
    np.testing.assert_allclose(got, want, atol=5e-5 * np.abs(want).max())


@pytest.mark.parametrize(("changes", "message"), [
    ({"model.lora.targets": ("q", "head")}, "config.model.lora.targets=.* must be .* words of all, attention"),
    ({"model.lora.targets": ()}, "config.model.lora.targets is empty"),
    ({"model.lora.path": "/nowhere"}, "config.model.lora.path='/nowhere' is not a directory"),
    ({"model.lora.path": "/tmp", "model.lora.rank": 4}, "config.model.lora.rank=4: the adapters in model.lora.path"),
    ({"model.lora.rank": 4, "model.lora.alpha": 0.0}, "config.model.lora.alpha=0.0 must be a number above 0"),
])
def test_mistakes_are_one_line(changes, message):
    config = base_config()
    config.model.shape.hidden_size = 8
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as error:
        validate(config)
        Learner(config, WHOLE, mesh())
    assert "\n" not in str(error.value)


def test_frozen_base_gives_up_what_it_converts():
    params = init_params(WHOLE, jax.random.key(0))
    embedding, norm = params["embed"]["embedding"], params["final_norm"]["scale"]
    base = frozen_base(params, WHOLE, "bfloat16")
    assert embedding.is_deleted() and norm.is_deleted() and not base["embed"]["embedding"].is_deleted()
