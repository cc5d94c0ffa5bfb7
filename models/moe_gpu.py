"""Grouped matrix products on a GPU (Pallas, Triton): rows of one expert lie in whole blocks, a program takes one block.

XLA multiplies every row by every expert there: jax.lax.ragged_dot on H100 compiles to masked dense products, as
many times the work and the memory as there are experts on the card.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LEAST, MOST = 16, 128  # rows of a block: a tile of the tensor cores, and what one program multiplies at once
WIDE, DEEP = 128, 64  # columns of a result and of a sum that a program takes at once


class Blocks(NamedTuple):
    """Which expert the rows of each block belong to. owner: int32 [P / rows], the number of experts where a block is
    empty. first, count: int32 [E], an expert's blocks, which lie side by side."""

    owner: jax.Array
    first: jax.Array
    count: jax.Array


def rows_of_block(choices: int, experts: int) -> int:
    """Rows of a block where `choices` rows go to so many experts: about an expert's share, a power of two."""
    return min(MOST, max(LEAST, pl.next_power_of_2(max(1, choices // experts))))


def takes(dtype, choices: int, *sizes: int) -> bool:
    """Whether the kernels take rows of these sizes, so many of them; Triton counts elements in 32 bits."""
    fits = (choices + MOST * 256) * max(sizes) < 2**31
    return dtype in (jnp.bfloat16, jnp.float16) and all(size % LEAST == 0 for size in sizes) and fits


def arrange(sizes, choices: int, rows: int) -> tuple[Blocks, jax.Array]:
    """(blocks, int32 [E]: the first row of each expert) for experts with `sizes` rows, at most `choices` together."""
    count = -(-sizes // rows)
    last = jnp.cumsum(count)
    number = choices // rows + sizes.shape[0]  # each expert has one block at most that is not full
    owner = jnp.searchsorted(last, jnp.arange(number), side="right").astype(jnp.int32)
    first = (last - count).astype(jnp.int32)
    return Blocks(owner, first, count.astype(jnp.int32)), first * rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(x, w, blocks: Blocks, interpret: bool = False):
    """Each row of x times its expert's matrix.

    x: [P, D], P / len(owner) rows a block. w: [E, D, F]. Returns [P, F] in x's dtype, 0 in empty blocks;
    sums are float32. Gradients for x and w.
    """
    return _rows_product(x, w, blocks, transposed=False, interpret=interpret)


def _forward(x, w, blocks, interpret):
    return _rows_product(x, w, blocks, transposed=False, interpret=interpret), (x, w, blocks)


def _backward(interpret, saved, dy):
    x, w, blocks = saved
    dx = _rows_product(dy, w, blocks, transposed=True, interpret=interpret)
    return dx, _sums(x, dy, w, blocks, interpret=interpret), None


grouped_product.defvjp(_forward, _backward)


def _tile(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(most, size & -size)


def _whole(array):
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def _rows_product(x, w, blocks: Blocks, *, transposed: bool, interpret: bool):
    """[P, F] of x [P, D] and w [E, D, F]; transposed: w is [E, F, D]."""
    (P, D), E = x.shape, w.shape[0]
    F = w.shape[1 if transposed else 2]
    rows, wide, deep = P // blocks.owner.shape[0], _tile(F, WIDE), _tile(D, DEEP)

    def kernel(owner_ref, x_ref, w_ref, out_ref):
        expert, columns = owner_ref[...], pl.ds(pl.program_id(1) * wide, wide)

        def body(i, total):
            at = pl.ds(i * deep, deep)
            part = w_ref[expert, columns, at] if transposed else w_ref[expert, at, columns]
            dims = (((1,), (1 if transposed else 0,)), ((), ()))
            return total + lax.dot_general(x_ref[:, at], part, dims, preferred_element_type=jnp.float32)

        steps = (expert < E).astype(jnp.int32) * (D // deep)
        out_ref[...] = lax.fori_loop(0, steps, body, jnp.zeros((rows, wide), jnp.float32)).astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(P // rows, F // wide),
        in_specs=[pl.BlockSpec((None,), lambda i, j: (i,)), pl.BlockSpec((rows, D), lambda i, j: (i, 0)), _whole(w)],
        out_specs=pl.BlockSpec((rows, wide), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((P, F), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_product",
    )(blocks.owner, x, w)


def _sums(x, dy, w, blocks: Blocks, *, interpret: bool):
    """The gradient of w [E, D, F]: for each expert, the sum over its rows of x [P, D] by dy [P, F]."""
    E, D, F = w.shape
    rows, tall, wide = x.shape[0] // blocks.owner.shape[0], _tile(D, WIDE), _tile(F, WIDE)

    def kernel(first_ref, count_ref, x_ref, dy_ref, out_ref):
        first, count = first_ref[...], count_ref[...]

        def body(i, total):
            at = pl.ds((first + i) * rows, rows)
            dims = (((0,), (0,)), ((), ()))
            return total + lax.dot_general(x_ref[at, :], dy_ref[at, :], dims, preferred_element_type=jnp.float32)

        out_ref[...] = lax.fori_loop(0, count, body, jnp.zeros((tall, wide), jnp.float32)).astype(out_ref.dtype)

    of_expert = pl.BlockSpec((None,), lambda e, i, j: (e,))
    return pl.pallas_call(
        kernel,
        grid=(E, D // tall, F // wide),
        in_specs=[of_expert, of_expert, pl.BlockSpec((x.shape[0], tall), lambda e, i, j: (0, i)),
                  pl.BlockSpec((x.shape[0], wide), lambda e, i, j: (0, j))],
        out_specs=pl.BlockSpec((None, tall, wide), lambda e, i, j: (e, i, j)),
        out_shape=jax.ShapeDtypeStruct(w.shape, w.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_sums",
    )(blocks.first, blocks.count, x, dy)
