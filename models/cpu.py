"""Detours that XLA's CPU compiler needs to be fast; everywhere else the plain form is used.

Each computes the same as the line it stands for: `product(x, w)` is x @ w, `apply_rope` is the decoder's.
Keys in blocks, for the same reason, are in models/attention.py beside the cache's other forms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def product(x, w):
    """x [..., D] @ w [D, F]; on a single device one flat product, whose gradient a CPU writes out before it is used.

    Left alone, XLA computes that gradient a second time inside the product for w's gradient, transposed, and the
    MLP's backward pass takes 1.4 times as long. Other backends see no barrier.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return x @ w
    return _written_out(x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def _written_out(y):
    return y


def _write_out(_, g):
    return (lax.platform_dependent(g, cpu=lax.optimization_barrier, default=lambda g: g),)


_written_out.defvjp(lambda y: (y, None), _write_out)


def apply_rope(x, sin, cos):
    """models.decoder.apply_rope, with the halves swapped by a matrix of 0, 1 and -1, exactly.

    XLA's CPU compiler computes a rotation once for each of its users; so it is a plain sum, without the norm before
    it and a concatenation.
    """
    half = np.eye(x.shape[-1] // 2, dtype=np.float32)
    y = x.astype(jnp.float32)
    swapped = product(y, np.block([[0 * half, half], [-half, 0 * half]]))
    sin, cos = (jnp.concatenate([a, a], axis=-1) for a in (sin, cos))
    return (y * cos + swapped * sin).astype(x.dtype)
