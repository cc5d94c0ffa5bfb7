"""Workarounds that make XLA's CPU code fast; everywhere else the plain form is used.

Each computes the same as the line it stands for: `product(x, w)` is x @ w, `transposed_product(x, w.T)` is too, and
`apply_rope` is the decoder's.
Keys in blocks, for the same reason, are in models/attention.py beside the cache's other forms.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# What `transposed_product` pays for, measured on CPUs (docs/performance.md): rows, and elements of a matrix
FEW_ROWS, LARGE = 64, 2**16


def product(x, w):
    """x [..., D] @ w [D, F]; on a single device one flat product, whose gradient a CPU writes out before it is used.

    Without this barrier, XLA computes that gradient a second time, transposed, inside the product for w's gradient, and
    the MLP's backward pass takes 1.4 times as long. Other backends get no barrier.
    """
    if _on_a_mesh():
        return x @ w
    return _written_out(x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[1])


def transposed_product(x, w):
    """x [..., D] times the transpose of w [F, D], on a single device.

    XLA's CPU kernels rearrange ("pack") the right side before they multiply. With few rows on the left, packing
    x @ w takes as long as the product, or longer: so w goes to the left, x to the right, and the result is turned. The
    barrier keeps XLA from turning what comes after it instead. With many rows, both sides take the same time; one row
    gains nothing.
    """
    flat = x.reshape(-1, x.shape[-1])
    by_columns = ((1,), (1,)), ((), ())
    if 1 < len(flat) <= FEW_ROWS:
        y = lax.optimization_barrier(lax.dot_general(w, flat, by_columns)).T
    else:
        y = lax.dot_general(flat, w, by_columns)
    return y.reshape(*x.shape[:-1], len(w))


def _on_a_mesh() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


@jax.custom_vjp
def _written_out(y):
    return y


def _write_out(_, g):
    return (_separate(g),)


def _separate(y):
    """y; on a CPU it becomes an array of its own, which XLA merges with no other operation."""
    return lax.platform_dependent(y, cpu=lax.optimization_barrier, default=lambda y: y)


_written_out.defvjp(lambda y: (y, None), _write_out)


def narrow_product(x, w):
    """x [..., D] @ w [D, F] with both rounded to bfloat16, summed and returned in float32.

    XLA gives a bfloat16 product to the AMX or AVX512-BF16 kernels of a CPU, three to four times as fast as float32,
    only if its result is to be float32 and its left side is not transposed; else it widens both sides first.
    Arrays between products stay in float32: XLA's CPU compiler has no bfloat16 updates in place, and would widen
    all layers' activations at each layer. On a single device the gradients are written in the same form.
    """
    if _on_a_mesh():
        return _wide(x, w)
    return _flat(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def _flat(x, w):
    return _wide(x, w)


def _wide(a, b):
    a, b = (x.astype(jnp.bfloat16) for x in (a, b))
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _gradient(saved, g):
    x, w = saved
    a, b, c = (y.astype(jnp.bfloat16) for y in (x, w, g))
    # contract over w's second axis instead of transposing w: that takes 0.4 of the time
    d_x = lax.dot_general(c, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if c.shape[1] < a.shape[1]:  # transpose the narrower side: an adapter's is a fraction of the other
        d_w = _separate(_wide(_turned(c), a)).T
    else:
        d_w = _wide(_turned(a), c)
    return d_x.astype(x.dtype), d_w.astype(w.dtype)


_flat.defvjp(lambda x, w: (_wide(x, w), (x, w)), _gradient)


def _turned(x):
    """x [M, D] -> [D, M], through tiles where they divide it: XLA would merge a plain transpose into the product."""
    if min(x.shape) <= 32:  # no tiles
        return _separate(x.T)
    tile = math.gcd(32, *x.shape)
    tiles = x.reshape(x.shape[0] // tile, tile, x.shape[1] // tile, tile)
    return tiles.transpose(2, 3, 0, 1).reshape(x.shape[::-1])


def apply_rope(x, sin, cos):
    """models.decoder.apply_rope, with the halves swapped by a matrix of 0, 1 and -1, exactly.

    XLA's CPU compiler repeats a rotation for each of its users. In this form it repeats only a plain sum, not the norm
    before it and a concatenation.
    """
    half = np.eye(x.shape[-1] // 2, dtype=np.float32)
    y = x.astype(jnp.float32)
    swapped = product(y, np.block([[0 * half, half], [-half, 0 * half]]))
    sin, cos = (jnp.concatenate([a, a], axis=-1) for a in (sin, cos))
    return (y * cos + swapped * sin).astype(x.dtype)
