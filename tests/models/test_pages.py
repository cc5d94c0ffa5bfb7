"""Attention over pages: the reference, and the GPU's kernel in interpret mode, against a loop in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import ref_ragged_paged_attention

from models import pages, pages_gpu
from models.layout import quantise


def case(B=5, N=6, K=2, H=16, P=13, page=16, M=4, seed=0):
    """(q, kv, table, positions): rows of one token, of a page's last and first, of all pages; tables share pages."""
    rng = np.random.default_rng(seed)
    q, kv = (rng.normal(size=shape).astype(np.float32) for shape in ((B, N, H), (P, page, 2 * K, H)))
    table = rng.integers(1, P, (B, M)).astype(np.int32)
    return q, kv, table, np.array([0, page - 1, page, 2 * page + 3, M * page - 1][:B], np.int32)


def by_hand(q, kv, table, positions, window):
    out = np.zeros(q.shape)
    group = q.shape[1] // (kv.shape[2] // 2)
    for b, last in enumerate(positions):
        seen = range(max(0, last - window + 1) if window else 0, last + 1)
        rows = [kv[table[b, t // kv.shape[1]], t % kv.shape[1]].astype(np.float64) for t in seen]
        for n in range(q.shape[1]):
            k, v = (np.stack([row[2 * (n // group) + which] for row in rows]) for which in (0, 1))
            w = np.exp(k @ q[b, n] / np.sqrt(q.shape[2]))
            out[b, n] = (w / w.sum()) @ v
    return out


@pytest.mark.parametrize("window", [0, 5, 20])
def test_the_reference_and_the_gpus_kernel_see_the_pages_of_their_row(window):
    q, kv, table, positions = case()
    expected = by_hand(q, kv, table, positions, window)
    args = (jnp.array(table), jnp.array(positions), window)
    np.testing.assert_allclose(pages._gathered(q, (jnp.array(kv),), *args), expected, atol=1e-5)
    np.testing.assert_allclose(pages_gpu.attend_pages(q, (kv,), *args, interpret=True), expected, atol=1e-5)


def test_the_gpus_kernel_takes_int8_pages_with_a_scale_a_token_and_head():
    q, kv, table, positions = case(seed=1)
    layer = quantise(jnp.array(kv), -1)
    whole = np.asarray(layer[0], np.float64) * np.asarray(layer[1])[..., None]
    expected = by_hand(q, whole, table, positions, 0)
    args = (jnp.array(table), jnp.array(positions), 0)
    np.testing.assert_allclose(pages._gathered(q, layer, *args), expected, atol=1e-5)
    np.testing.assert_allclose(pages_gpu.attend_pages(q, layer, *args, interpret=True), expected, atol=1e-5)


@pytest.mark.parametrize("window", [0, 5])
def test_the_tpus_kernel_is_asked_for_the_pages_of_its_row(window, monkeypatch):
    """jax's kernel uses what its interpreter lacks: its stand-in here is the reference that jax ships with it."""

    def stand_in(*args, num_queries_per_block, num_kv_pages_per_block, **options):
        assert num_queries_per_block == 5 and num_kv_pages_per_block == 4  # of at most 8 and 16
        return ref_ragged_paged_attention(*args, **options)

    monkeypatch.setattr(ragged_paged_attention, "ragged_paged_attention", stand_in)
    q, kv, table, positions = case()
    out = pages._ragged(jnp.array(q), jnp.array(kv), jnp.array(table), jnp.array(positions), window)
    np.testing.assert_allclose(out, by_hand(q, kv, table, positions, window), atol=1e-5)


def test_a_token_is_written_to_its_page_and_nowhere_else():
    q, kv, table, positions = case()
    table = np.arange(1, 9, dtype=np.int32).reshape(2, 4)
    new_k, new_v = np.random.default_rng(2).normal(size=(2, 2, 1, 2, 16)).astype(np.float32)
    place = pages.Place(jnp.array(table), jnp.array([17, 63]), 0, "xla")
    (after,), _ = pages.attend_pages((jnp.array(kv),), q[:2, None], new_k, new_v, place)
    expected = kv.copy()
    for b, position in enumerate((17, 63)):
        expected[table[b, position // 16], position % 16, 0::2] = new_k[b, 0]
        expected[table[b, position // 16], position % 16, 1::2] = new_v[b, 0]
    np.testing.assert_array_equal(after, expected)
