"""Products of bfloat16 inside float32 arithmetic (`model.products`): against float64, and sampler against learner."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxrl.learner.logprobs import HeadSettings, logprobs_and_entropy, response_logprobs
from models import cpu
from models.config import DecoderConfig, to_hf
from models.decoder import Decoder, init_params, linear, logits
from models.layout import quantise, sampling_layout

CONFIG = DecoderConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
                       head_dim=16, tie_embeddings=True, narrow=True)


def rounded(a):
    return np.asarray(a, ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("width", [96, 40, 16], ids=["wide", "narrow", "adapter"])
@pytest.mark.parametrize("shape", [(4, 32, 64), (33, 48), (2, 5, 7)], ids=["tiles", "part", "odd"])
def test_product_and_gradients_are_those_of_rounded_factors(shape, width):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=shape).astype(np.float32), rng.normal(size=(shape[-1], width)).astype(np.float32)
    g = rng.normal(size=(*shape[:-1], width)).astype(np.float32)
    out, back = jax.vjp(jax.jit(cpu.narrow_product), x, w)
    d_x, d_w = back(jnp.asarray(g))
    assert out.dtype == d_x.dtype == d_w.dtype == jnp.float32
    rows, g_rows = rounded(x).reshape(-1, shape[-1]), rounded(g).reshape(-1, width)
    np.testing.assert_allclose(np.asarray(out).reshape(-1, width), rows @ rounded(w), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(d_x).reshape(-1, shape[-1]), g_rows @ rounded(w).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_w, rows.T @ g_rows, rtol=1e-4, atol=1e-4)


def test_sampler_and_learner_compute_the_same():
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, CONFIG.vocab_size)
    at = jnp.broadcast_to(jnp.arange(16), (2, 16))
    layout = sampling_layout(params, CONFIG, jnp.float32, untie=True)
    assert layout["layer_0"]["mlp"]["down"].dtype == layout["lm_head"]["kernel"].dtype == jnp.bfloat16
    assert layout["layer_0"]["mlp_norm"]["scale"].dtype == layout["embed"]["embedding"].dtype == jnp.float32
    h_s = Decoder(CONFIG, scan_layers=False).apply({"params": layout}, tokens, at)[0]
    h_l = Decoder(CONFIG).apply({"params": params}, tokens, at, jnp.ones((2, 16), jnp.int32))[0]
    assert h_s.dtype == h_l.dtype == jnp.float32
    sampled = jax.nn.log_softmax(logits(layout, h_s, narrow=True))
    sampled = np.take_along_axis(np.asarray(sampled)[:, :-1], np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    head = HeadSettings(tied=True, narrow=True, chunk=32)
    learned = response_logprobs(h_l, params["embed"]["embedding"], tokens, jnp.ones((2, 16)), 32, settings=head)[0]
    np.testing.assert_allclose(learned[:, 1:], sampled, atol=2e-5)
    plain = dataclasses.replace(CONFIG, narrow=False)
    h_p = Decoder(plain).apply({"params": params}, tokens, at, jnp.ones((2, 16), jnp.int32))[0]
    assert 1e-5 < float(jnp.abs(h_p - h_l).max()) < 0.1  # it does round, and no more than that


def test_export_does_not_hold_it():
    assert "narrow" not in to_hf(CONFIG)


def test_int8_matrices_are_multiplied_in_bfloat16_too():
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3, 64), (64, 32)]))
    q, scale = quantise(w)
    expected = rounded(x) @ np.asarray(q, np.float64) * np.asarray(scale, np.float64)
    np.testing.assert_allclose(linear(x, (q, scale), narrow=True), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(linear(x, (q, scale))) - expected).max() > 1e-3  # without it x is not rounded


def test_a_kept_set_of_everything_changes_nothing():
    """The vocabulary's second walk (sampling.replay) computes the logits as the first one does."""
    h, head = jax.random.normal(jax.random.key(0), (6, 64)), jax.random.normal(jax.random.key(1), (96, 64))
    args = (h, head, jnp.arange(6), jnp.ones(6), 6)
    settings = HeadSettings(tied=True, narrow=True, chunk=32)
    whole = logprobs_and_entropy(*args, settings=settings)[0]
    kept = logprobs_and_entropy(*args, settings=settings, least=jnp.zeros(6))[0]
    np.testing.assert_allclose(kept, whole, atol=2e-6)


def test_on_a_mesh_the_same_product():
    program = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from models import cpu
mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(8, 5, 64), (64, 32)]))
f = lambda x, w: jax.value_and_grad(lambda x, w: (cpu.narrow_product(x, w) ** 2).sum(), (0, 1))(x, w)
want = jax.jit(f)(x, w)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    put = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((x, P("rows")), (w, P(None, "columns")))]
    got = jax.jit(f)(*put)
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=0.01, atol=0.01 * np.abs(b).max())
"""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
