"""Router replay: the experts that the sampler chose go with the tokens, and the learner takes them again."""

import dataclasses

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


def draw(params, decoder=MODEL, dtype=jnp.float32):
    """Rollouts of prompts of one token: every token that a response is predicted from goes through a decode step."""
    engine = Engine(decoder, (0,), max_prompt=4, max_tokens=12, slots=4, chunk=5, window=16, dtype=dtype,
                    record=("experts",))
    drawn = engine.generate(engine.layout(params), [Request(np.array([i + 1]), 3, 12, i) for i in range(3)], seed=1)
    rows = begin(Prompt(Problem(str(i), "", ""), np.array([i + 1]), 3, i) for i in range(3))
    rows = rows.extend([c for group in drawn for c in group], 0, 12)
    return rows.replace(valid=np.ones(9, bool))


def learner(decoder=MODEL, **changes):
    config = base_config()
    config.sampling.router_replay, config.optimizer.learning_rate = True, 1e-2
    config.update(changes)
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


def test_needs_experts():
    with pytest.raises(UserError, match="router_replay=True, but the model has no experts"):
        learner(DecoderConfig(31, 16, 24, 2, 2, 1, 8, model_type="llama"))
