"""Products of bfloat16 inside float32 arithmetic (`model.products`): against float64, and sampler against learner."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxrl.learner.logprobs import HeadSettings, response_logprobs
from models import cpu
from models.config import DecoderConfig, to_hf
from models.decoder import Decoder, init_params, logits
from models.layout import sampling_layout

CONFIG = DecoderConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
                       head_dim=16, tie_embeddings=True, narrow=True)


def rounded(a):
    return np.asarray(a, ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("shape", [(4, 32, 64), (33, 48), (2, 5, 7)], ids=["tiles", "part", "odd"])
def test_product_and_gradients_are_those_of_rounded_factors(shape):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=shape).astype(np.float32), rng.normal(size=(shape[-1], 96)).astype(np.float32)
    g = rng.normal(size=(*shape[:-1], 96)).astype(np.float32)
    out, back = jax.vjp(jax.jit(cpu.narrow_product), x, w)
    d_x, d_w = back(jnp.asarray(g))
    assert out.dtype == d_x.dtype == d_w.dtype == jnp.float32
    rows, g_rows = rounded(x).reshape(-1, shape[-1]), rounded(g).reshape(-1, 96)
    np.testing.assert_allclose(np.asarray(out).reshape(-1, 96), rows @ rounded(w), rtol=1e-4, atol=1e-4)
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
