"""Attention kernels of TPU (splash) and GPU (Triton), interpreted: gradients, and each device of a mesh on its own."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention
from models.config import DecoderConfig
from models.decoder import Decoder, empty_cache, init_params

B, T, N, K, H = 4, 128, 4, 2, 128


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K), strict=True))
    # segments of several lengths; the end of each row is padding
    cuts = np.array([[30, 31, 100], [1, 64, 120], [10, 20, 30], [127, 127, 127]])
    ids = (np.arange(T)[None, :, None] >= cuts[:, None]).sum(-1) + 1
    ids[:, 120:] = 0
    return q, k, v, jnp.asarray(ids, jnp.int32)


def close_where_not_padding(got, want, ids):
    keep = np.asarray(ids)[..., None, None] > 0
    np.testing.assert_allclose(np.where(keep, got, 0), np.where(keep, want, 0), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kernel, length", [("_splash", T), ("_triton", T), ("_triton", 100)])
def test_gradients_match_xla(kernel, length):
    """A row of 100 tokens is no whole block."""
    q, k, v, ids = (x[:, :length] for x in inputs())
    kept = (ids > 0)[..., None, None]
    weight = jax.random.normal(jax.random.key(9), q.shape) * kept

    def run(f):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(f(*a) * weight), argnums=(0, 1, 2)))(q, k, v)

    want = run(lambda *a: attention.attend_packed(*a, ids, "xla"))
    got = run(lambda *a: getattr(attention, kernel)(*a, ids, interpret=True))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype, windows, first, kernel", [
    (jnp.bfloat16, (0,), 0, "triton"), (jnp.bfloat16, (20,), 0, "cudnn"), (jnp.bfloat16, (0,), 40, "cudnn"),
    (jnp.float32, (0,), 0, "xla"),
])
def test_what_triton_cannot_do_another_kernel_does(dtype, windows, first, kernel, monkeypatch):
    q, k, v, ids = inputs()
    q, k, v = (x.astype(dtype) for x in (q[:, first:], k, v))
    ran = []
    local, fused = attention._triton_local, jax.nn.dot_product_attention

    def triton(*args, interpret):
        ran.append("triton")
        return local(*args, interpret=True)

    def cudnn(q, k, v, mask, implementation):
        ran.append(implementation)
        return fused(q, k, v, mask=mask)

    monkeypatch.setattr(attention, "_triton_local", triton)
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    got = attention.attend_packed(q, k, v, ids, "triton", windows=windows)
    assert (ran or ["xla"]) == [kernel]
    want = attention.attend_packed(*(x.astype(jnp.float32) for x in (q, k, v)), ids, "xla", windows=windows)
    keep = np.asarray(ids)[:, first:, None, None] > 0
    np.testing.assert_allclose(np.where(keep, got, 0), np.where(keep, want, 0), atol=0.03)


def test_a_window_matches_xla():
    q, k, v, ids = inputs()
    want = attention.attend_packed(q, k, v, ids, "xla", windows=(20,))
    close_where_not_padding(jax.jit(lambda *a: attention._splash(*a, ids, 20, interpret=True))(q, k, v), want, ids)


@pytest.mark.parametrize("window", [0, 20])
def test_the_last_tokens_of_a_row(window):
    """32 queries, which are no whole block, behind 68 known tokens."""
    q, k, v, ids = (x[:, :100] for x in inputs())
    want = attention.attend_packed(q, k, v, ids, "xla", windows=(window,))[:, 68:]
    got = jax.jit(lambda *a: attention._splash(*a, ids, window, interpret=True))(q[:, 68:], k, v)
    close_where_not_padding(got, want, ids[:, 68:])


@pytest.mark.parametrize("implementation, chunk, dtype, within", [
    ("xla", 0, jnp.float32, 2e-5), pytest.param("xla", 16, jnp.float32, 2e-5, marks=pytest.mark.slow),
    pytest.param("splash", 0, jnp.float32, 2e-5, marks=pytest.mark.slow), ("splash", 16, jnp.float32, 2e-5),
    ("xla", 16, jnp.int8, 0.03),
])
def test_prompts_that_see_each_other_fill_the_cache_as_those_that_read_it(implementation, chunk, dtype, within,
                                                                          monkeypatch):
    """A prefill, right-aligned in 40 columns, which are no whole blocks of the kernel; all at once or in parts."""
    local = attention._splash_local
    interpreted = lambda *a, window, interpret: local(*a, window=window, interpret=True)  # noqa: E731
    monkeypatch.setattr(attention, "_splash_local", interpreted)
    config = DecoderConfig(31, 64, 96, 3, 4, 2, 128, model_type="llama")
    params, P, lengths = init_params(config, jax.random.key(0)), 40, jnp.array([3, 40, 17])
    tokens = jax.random.randint(jax.random.key(1), (3, P), 0, 31)
    column = jnp.arange(P)[None] - (P - lengths)[:, None]
    cache = empty_cache(config, 3, P, dtype, scan_layers=True).replace(start=P - lengths)

    def prefill(implementation, segments, first, end, cache):
        model, part = Decoder(config, attention=implementation), slice(first, end)
        seen = None if segments is None else segments[:, :end]
        return model.apply({"params": params}, tokens[:, part], jnp.maximum(column[:, part], 0), seen, cache)

    want, want_cache = prefill("xla", None, 0, P, cache)
    parts, got_cache = [], cache
    for first in range(0, P, chunk or P):
        args = (implementation, (column >= 0).astype(jnp.int32), first, min(first + (chunk or P), P))
        part, got_cache = prefill(*args, got_cache)
        parts.append(part)
    got = jnp.concatenate(parts, axis=1)
    real = np.asarray(column >= 0)
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=within)
    for a, b in zip(got_cache.arrays, want_cache.arrays, strict=True):  # [layers, B, K, columns, H]
        keep = real[None, :, None, :, None] if a.ndim == 5 else real[None, :, None]
        np.testing.assert_allclose(
            np.where(keep, a, 0.0), np.where(keep, b, 0.0), atol=2 if a.dtype == jnp.int8 else within
        )
    assert got_cache.end == want_cache.end == P


@pytest.mark.parametrize("kernel", ["_splash", "_triton"])
def test_on_a_mesh(kernel):
    """In a process with eight devices: rows over four, heads over two; one key-value head has to be repeated."""
    program = f"""kernel = {kernel!r}""" + """
import flax.linen as nn, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from models import attention
from tests.models.test_splash import close_where_not_padding, inputs
q, k, v, ids = inputs()
mesh = jax.make_mesh((4, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
def f(q, k, v, ids):
    rules = (("batch", "rows"), ("heads", "heads"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
        return getattr(attention, kernel)(q, k, v, ids, interpret=True)
put = lambda x: jax.device_put(x, NamedSharding(mesh, P("rows")))
for kv_heads in (2, 1):
    k, v = k[:, :, :kv_heads], v[:, :, :kv_heads]
    got = jax.jit(f)(*map(put, (q, k, v, ids)))
    assert got.sharding.spec == P("rows", None, "heads"), got.sharding
    close_where_not_padding(got, attention.attend_packed(q, k, v, ids, "xla"), ids)
"""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
