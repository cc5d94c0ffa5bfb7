"""Weights, keys and values of one byte an entry: how far log-probs move, and what does not move at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.correction import CORRECTIONS
from jaxrl.algorithms.inputs import LossInputs
from jaxrl.collect import requests
from jaxrl.rollout.engine import Engine, Request
from jaxrl.types import Completion
from models.config import from_hf
from models.layout import layout_specs, quantise, sampling_layout
from models.weights import load_params
from tests.rollout import tiny
from tests.rollout.test_partial import LIMIT, begun
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
            lambda p, fuse=fuse: sampling_layout(p, tiny.CONFIG, jnp.bfloat16, fuse, untie=True, int8=True),
            tiny.params(),
        )
        specs = layout_specs(tiny.CONFIG, fuse, True, True)
        jax.tree.map(lambda a, s: None if len(s) <= a.ndim else 1 / 0, layout, specs)


def alike(got, want, atol):
    """Rounding may move an entry of an int8 cache by one step, and so, on some CPU, turn a draw: log-probs agree up to
    there, and most completions to their end."""
    pairs = [pair for g, w in zip(got, want, strict=True) for pair in zip(g, w, strict=True)]
    whole = 0
    for a, b in pairs:
        n = min(a.length, b.length)
        same = int(np.argmin(np.append(a.tokens[:n] == b.tokens[:n], False)))
        np.testing.assert_allclose(a.logprobs[:same], b.logprobs[:same], atol=atol, rtol=0)
        whole += same == a.length == b.length
    assert whole >= 0.7 * len(pairs), f"{whole} of {len(pairs)}"


@pytest.mark.parametrize(
    "options", [pytest.param(dict(weights="int8"), marks=pytest.mark.slow), dict(cache="int8")], ids=str
)
def test_completions_do_not_depend_on_the_schedule(options):
    one, other = tiny.sampler(**options), tiny.sampler(slots=3, chunk=5, window=32, **options)
    groups = one.generate(one.layout(tiny.params()), tiny.requests(), seed=11)
    order = [3, 0, 5, 4, 1, 2]
    shuffled = other.generate(other.layout(tiny.params()), [tiny.requests()[i] for i in order], seed=11)
    if "cache" in options:
        alike(shuffled, [groups[i] for i in order], atol=5e-3)
    else:
        tiny.same(shuffled, [groups[i] for i in order], 1e-5)


def test_pieces_are_the_uncut_sample():
    s = tiny.sampler(cache="int8", chunk=8, window=32)
    params = s.layout(tiny.params())

    def drawn(budget):
        rollouts = begun()
        while rollouts.unfinished.any():
            pieces = sum(s.generate(params, requests(rollouts, LIMIT, budget, {}), seed=5, step=2), [])
            rollouts = rollouts.extend(pieces, 2, LIMIT)
        rows = zip(rollouts.split_tokens(), rollouts.split_tokens(rollouts.logprobs), rollouts.finish, strict=True)
        return [[Completion(*row) for row in rows]]

    alike(drawn(7), drawn(0), atol=5e-3)


@pytest.mark.parametrize("weights, cache, mean, most", [("int8", "same", 0.03, 0.3), ("same", "int8", 0.06, 1.0)])
def test_a_trained_model_keeps_its_log_probs_and_the_rest_is_corrected(weights, cache, mean, most):
    root = shared_path("data", "models", "stories260K")
    config, options = from_hf(root), dict(max_prompt=64, max_tokens=63, slots=8)
    params = load_params(root, config)
    int8, exact = Engine(config, (2,), weights=weights, cache=cache, **options), Engine(config, (2,), **options)
    own = int8.layout(params)
    done = int8.generate(own, [Request(np.array([1], np.int32), 8, 63, 5)], seed=3)[0]
    tokens = [np.concatenate([[1], c.tokens]) for c in done]
    logps = {"int8": np.concatenate([c.logprobs for c in done])}
    logps["same"] = np.concatenate(exact.prompt_logprobs(exact.layout(params), tokens))
    if cache == "same":  # the cache's rounding is no part of a pass without one
        np.testing.assert_allclose(logps["int8"], np.concatenate(int8.prompt_logprobs(own, tokens)), atol=1e-4)
    gap = np.abs(logps["int8"] - logps["same"])
    assert 1e-4 < gap.mean() < mean and gap.max() < most, (gap.mean(), gap.max())
    row = lambda x: jnp.asarray(x, jnp.float32)[None]  # noqa: E731
    ones, tis = jnp.ones_like(row(gap)), CORRECTIONS["token_tis"]
    drawn = LossInputs(
        row(logps["same"]), row(logps["same"]), ones * 0, ones, ones.astype(int), sampler_logp=row(logps["int8"])
    )
    weights = tis.fn(drawn, tis.defaults)[0]
    np.testing.assert_allclose(weights[0], np.exp(logps["same"] - logps["int8"]).clip(max=2.0), rtol=1e-4)
