"""Families with layers of several kinds go through sampler and learner: what is drawn is scored the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.learner.logprobs import HeadSettings, response_logprobs
from jaxrl.rollout.engine import Engine, Request
from models.config import from_hf
from models.decoder import Decoder, init_params
from tests.models.hf_cases import CASES


@pytest.fixture(scope="module", params=["gemma3", "qwen3_moe"])
def model(request):
    config = from_hf(CASES[request.param] | {"initializer_range": 0.3})
    return config, jax.jit(lambda key: init_params(config, key))(jax.random.key(3))


def packed(completions, prompts, width=64):
    """(tokens, positions, segment ids, response mask, sampler's log-probs), [1, width]: all in one row."""
    arrays = [np.zeros((1, width), t) for t in (np.int32, np.int32, np.int32, np.float32, np.float32)]
    at = 0
    for i, (prompt, c) in enumerate(zip(prompts, completions, strict=True), 1):
        p, n = len(prompt), len(c.tokens)
        mask = np.arange(p + n) >= p
        logps = np.concatenate([np.zeros(p), c.logprobs])
        for a, x in zip(arrays, ([*prompt, *c.tokens], np.arange(p + n), i, mask, logps), strict=True):
            a[0, at : at + p + n] = x
        at += p + n
    return map(jnp.asarray, arrays)


def test_the_learner_scores_what_the_sampler_drew(model):
    config, params = model
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, config.vocab_size, n).astype(np.int32) for n in (11, 1, 5)]
    engine = Engine(config, (0,), max_prompt=12, max_tokens=14, slots=2, chunk=4)
    requests = [Request(p, 1, 14, i) for i, p in enumerate(prompts)]
    drawn = [group[0] for group in engine.generate(engine.layout(params), requests, seed=1)]
    assert max(len(c.tokens) for c in drawn) == 14  # twice the window of the local layers
    tokens, positions, segments, mask, want = packed(drawn, prompts)

    def score(params, remat):
        hidden, _ = Decoder(config, remat=remat).apply({"params": params}, tokens, positions, segments)
        settings = HeadSettings(tied=config.tie_embeddings, chunk=16)
        head = params["embed"]["embedding"] if config.tie_embeddings else params["lm_head"]["kernel"]
        return response_logprobs(hidden, head, tokens, mask, 64, settings=settings)[0]

    np.testing.assert_allclose(jax.jit(lambda p: score(p, "none"))(params), want, atol=2e-4)
    gradients = [jax.jit(jax.grad(lambda p, remat=r: jnp.sum(score(p, remat) ** 2)))(params) for r in ("none", "full")]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert float(jnp.abs(a).max()) > 0
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max()))
