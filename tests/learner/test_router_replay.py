"""Router replay: the experts that the sampler chose go with the tokens, and the learner takes them again."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.learner.packing import PackSettings, pack
from jaxrl.rollout.engine import Engine, Request
from jaxrl.rollouts import Prompt, begin
from jaxrl.runtime.config import base_config
from jaxrl.runtime.mesh import make_mesh
from jaxrl.types import Problem
from models.config import DecoderConfig
from models.decoder import init_params

# One expert a token, with weight 1: then what a token gets depends on the choice alone, not on the router's numbers.
MODEL = DecoderConfig(31, 16, 24, 3, 2, 1, 8, model_type="qwen3_moe", init_std=0.5, qk_norm=True, num_experts=5,
                      experts_per_token=1, expert_size=12, normalise_experts=True)
MESHED = dataclasses.replace(MODEL, vocab_size=32, num_kv_heads=2, num_experts=4, experts_per_token=2)


def draw(params, decoder=MODEL):
    """Rollouts of prompts of one token: every token that a response is predicted from goes through a decode step."""
    engine = Engine(decoder, (0,), max_prompt=4, max_tokens=12, slots=4, chunk=5, window=16,
                    record=("experts",))
    drawn = engine.generate(engine.layout(params), [Request(np.array([i + 1]), 3, 12, i) for i in range(3)], seed=1)
    rows = begin(Prompt(Problem(str(i), "", ""), np.array([i + 1]), 3, i) for i in range(3))
    rows = rows.extend([c for group in drawn for c in group], 0, 12)
    return rows.replace(valid=np.ones(9, bool))


def learner(decoder=MODEL):
    config = base_config()
    config.sampling.router_replay, config.optimizer.learning_rate = True, 1e-2
    return Learner(config, decoder, make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize("share", [False, True])
def test_another_router_takes_the_sampler_s_experts(share):
    params = init_params(MODEL, jax.random.key(0))
    rows = draw(params)
    assert rows.token_columns["experts"].shape == (len(rows.tokens), 3, 1)
    assert set(np.unique(rows.token_columns["experts"])) <= {1, 2, 3, 4, 5}
    other = jax.tree.map(jnp.copy, params)
    other["layers"]["mlp"]["router"] = jax.random.normal(jax.random.key(9), params["layers"]["mlp"]["router"].shape)

    def scores(replay):
        batch, packing = pack(rows, np.ones(9), PackSettings(32, 64, experts=replay, share_prompts=share))
        return packing.collect(learner().score(other, batch))

    np.testing.assert_allclose(scores(True), rows.logprobs, atol=2e-5)
    assert np.abs(scores(False) - rows.logprobs).mean() > 0.05


def test_an_update_with_replayed_experts():
    """Through micro-batches and the gradient; where the parameters are the sampler's there is no mismatch, and the
    router still learns where weights are not 1."""
    decoder = dataclasses.replace(MODEL, experts_per_token=2)
    params = init_params(decoder, jax.random.key(0))
    batch, _ = pack(draw(params, decoder), np.linspace(-1, 1, 9), PackSettings(32, 64, experts=True))
    assert batch.experts.shape == (*batch.tokens.shape, 3, 2) and batch.experts.dtype == np.uint8
    one = learner(decoder)
    before = np.asarray(params["layers"]["mlp"]["router"])
    state, metrics = one.update(one.init(params), [batch])
    assert metrics["logprob_diff/mean"] < 2e-5 and metrics["nonfinite"] == 0
    assert np.abs(np.asarray(state.params["layers"]["mlp"]["router"]) - before).max() > 1e-3


def test_a_reference_model_chooses_its_own_experts():
    params = init_params(MODEL, jax.random.key(0))
    other = init_params(MODEL, jax.random.key(9))
    rows = draw(params)
    replayed, plain = (pack(rows, np.ones(9), PackSettings(32, 64, experts=e))[0] for e in (True, False))
    one = learner()
    np.testing.assert_array_equal(one.score(other, replayed, reference=True), one.score(other, plain))
    assert np.abs(np.asarray(one.score(other, replayed) - one.score(other, plain))).max() > 0.01


@pytest.mark.slow
def test_on_a_mesh():
    """Eight devices: rows, and with them the experts to be taken, over data and fsdp; experts over fsdp."""
    program = """
import jax, numpy as np
from jaxrl.learner.learner import Learner
from jaxrl.learner.packing import PackSettings, pack
from jaxrl.runtime.config import base_config
from jaxrl.runtime.mesh import make_mesh, num_batch_shards
from tests.learner.test_router_replay import MESHED, draw, init_params
rows, out = draw(init_params(MESHED, jax.random.key(0)), MESHED), []
config = base_config()
config.sampling.router_replay = True
for mesh in (make_mesh(1, 1, 1, jax.devices()[:1]), make_mesh(2, 2, 2)):
    learner = Learner(config, MESHED, mesh)
    params = learner.init(init_params(MESHED, jax.random.key(1))).params
    shards = num_batch_shards(mesh)
    batch, packing = pack(rows, np.ones(9), PackSettings(32, 128, shards=shards, experts=True))
    out.append(packing.collect(learner.score(params, batch)))
np.testing.assert_allclose(*out, atol=1e-4)
"""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], check=True, env=env, timeout=300)


def test_needs_experts():
    with pytest.raises(UserError, match="router_replay=True, but the model has no experts"):
        learner(DecoderConfig(31, 16, 24, 2, 2, 1, 8, model_type="llama"))
