"""Weights of one byte an entry: how far log-probs move, and what does not move at all."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.algorithms.correction import CORRECTIONS
from jaxrl.rollout.engine import Request, Sampler
from jaxrl.rollout.placement import _specs
from models.config import from_hf
from models.decoder import quantise, sampling_layout
from models.weights import load_params
from tests.rollout import tiny
from tests.shared import shared_path


def test_quantised_matrices_are_within_half_a_step():
    w = np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32) * np.logspace(-3, 3, 7, dtype=np.float32)
    w[:, 3] = 0
    q, scale = quantise(jnp.asarray(w))
    assert q.dtype == jnp.int8 and np.abs(np.asarray(q)).max() == 127
    assert (np.abs(np.asarray(q, np.float64) * scale - w) <= 0.5001 * np.abs(w).max(0) / 127).all()


def test_what_is_quantised():
    params = sampling_layout(tiny.params(), tiny.CONFIG, jnp.bfloat16, untie=True, int8=True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        matrix = name.split("/")[-1] in ("qkv", "o", "gate_up", "down", "kernel")
        expected = jnp.int8 if matrix else jnp.float32 if name.endswith("_scale") else jnp.bfloat16
        assert leaf.dtype == expected, name


def test_every_leaf_has_a_place_on_a_mesh():
    for fuse in (True, False):
        layout = jax.eval_shape(
            lambda p, fuse=fuse: sampling_layout(p, tiny.CONFIG, jnp.bfloat16, fuse, True, True), tiny.params()
        )
        specs = _specs(tiny.CONFIG, fuse, True, True)
        jax.tree.map(lambda a, s: None if len(s) <= a.ndim else 1 / 0, layout, specs)


def test_completions_do_not_depend_on_the_schedule():
    one, other = tiny.sampler(weights="int8"), tiny.sampler(weights="int8", slots=3, chunk=5, window=32)
    groups = one.generate(one.layout(tiny.params()), tiny.requests(), seed=11)
    tiny.same(other.generate(other.layout(tiny.params()), tiny.requests(), seed=11), groups)


def test_a_trained_model_keeps_its_log_probs_and_the_rest_is_corrected():
    root = shared_path("data", "models", "stories260K")
    config, logps, tokens = from_hf(root), {}, None
    params = load_params(root, config)
    for weights in ("int8", "same"):
        sampler = Sampler(config, (2,), max_prompt=64, max_tokens=63, slots=8, weights=weights)
        laid_out = sampler.layout(params)
        if tokens is None:  # drawn by the int8 model
            done = sampler.generate(laid_out, [Request(np.array([1], np.int32), 8, 63, 5)], seed=3)[0]
            tokens = [np.concatenate([[1], c.tokens]) for c in done]
            reported = np.concatenate([c.logprobs for c in done])
        logps[weights] = np.concatenate(sampler.prompt_logprobs(laid_out, tokens))
    np.testing.assert_allclose(reported, logps["int8"], atol=1e-4)
    gap = np.abs(logps["int8"] - logps["same"])
    assert 1e-4 < gap.mean() < 0.03 and gap.max() < 0.3, (gap.mean(), gap.max())
    row = lambda x: jnp.asarray(x, jnp.float32)[None]  # noqa: E731
    ones = jnp.ones_like(row(gap))
    tis = CORRECTIONS["token_tis"]
    weights = tis.fn(row(logps["same"]), row(logps["int8"]), ones, ones.astype(int), tis.defaults)[0]
    np.testing.assert_allclose(weights[0], np.exp(logps["same"] - logps["int8"]).clip(max=2.0), rtol=1e-4)
