"""The GPU's kernel over pages (Pallas, Triton): a program per row and key-value head walks the row's own pages.

Online softmax (2205.14135) in float32; the queries of a key-value head share its reads. The context is not
split over programs, so rows x heads should be at least the card's multiprocessors.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LEAST = 16  # least rows of a tile of the tensor cores


def attend_pages(q, layer, table, positions, window: int = 0, *, interpret: bool = False):
    """Attention of one token a row over the pages of its row.

    Args:
      q: [B, N, H]. layer: (kv [P, page, 2K, H],) and of int8 kv the scales [P, page, 2K]; page a power of two, at least
        16. table: int32 [B, M]. positions: int32 [B]: row b sees 0 .. positions[b], of them the last `window` (0: all).
      interpret: run as plain operations, on any backend.

    Returns: [B, N, H] in q's dtype.
    """
    (B, N, H), (_, page, K, _) = q.shape, layer[0].shape
    K, M = K // 2, table.shape[1]
    heads = N // K
    rows = max(LEAST, pl.next_power_of_2(heads))
    padded = jnp.pad(q.reshape(B, K, heads, H), ((0, 0), (0, 0), (0, rows - heads), (0, 0)))
    one = pl.BlockSpec((None, None, rows, H), lambda b, h: (b, h, 0, 0))
    whole = [pl.BlockSpec(a.shape, lambda b, h, n=a.ndim: (0,) * n) for a in layer]
    out = pl.pallas_call(
        functools.partial(_kernel, page=page, window=window),
        grid=(B, K),
        in_specs=[one, pl.BlockSpec((None, M), lambda b, h: (b, 0)), pl.BlockSpec((None,), lambda b, h: (b,)), *whole],
        out_specs=one,
        out_shape=jax.ShapeDtypeStruct(padded.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(padded, table, positions, *layer)
    return out[:, :, :heads].reshape(B, N, H)


def _product(a, b, axis: int):
    """float32 product of a [M, K] with b along b's `axis`."""
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _kernel(q_ref, table_ref, position_ref, kv_ref, *refs, page: int, window: int):
    *scale_refs, out_ref = refs
    q, position, head = q_ref[...], position_ref[...], 2 * pl.program_id(1)
    first = jnp.maximum(position - window + 1, 0) if window else 0

    def body(i, carry):
        out, top, total = carry
        number = table_ref[i]
        k, v = (kv_ref[number, :, head + which, :].astype(q.dtype) for which in (0, 1))
        scores = _product(q, k, 1) * q.shape[-1] ** -0.5
        if scale_refs:
            scores = scores * scale_refs[0][number, :, head][None]
        column = i * page + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where((column <= position) & (column >= first), scores, jnp.finfo(jnp.float32).min)
        peak = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, before = jnp.exp(scores - peak[:, None]), jnp.exp(top - peak)
        total = total * before + jnp.sum(weights, axis=1)
        if scale_refs:
            weights = weights * scale_refs[0][number, :, head + 1][None]
        return out * before[:, None] + _product(weights.astype(q.dtype), v, 0), peak, total

    low = jnp.full(q.shape[:1], jnp.finfo(jnp.float32).min)
    start = jnp.zeros(q.shape, jnp.float32), low, jnp.zeros(q.shape[:1], jnp.float32)
    out, _, total = lax.fori_loop(first // page, position // page + 1, body, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
