"""Mixture of experts: every token is given to its k best experts, and none is dropped.

Tokens are sorted by expert and multiplied group by group, so that the work is that of k experts a token: by
jax.lax.ragged_dot, on a TPU by jax's megablox kernels, on a GPU by those of models/moe_gpu.py.

On a mesh, experts are split over the mesh axis that the logical axis "expert" stands for. If that axis also splits rows
(the learner's), tokens travel to the experts and back: they are gathered over it before, summed and scattered after;
else (the sampler's) every device has all tokens and adds what its own experts say.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from models import moe_gpu


def route(logits, k: int, normalise: bool, replayed=None):
    """The k experts of each token and their weights, as transformers' Qwen3-MoE chooses them.

    logits: [..., E]. normalise: the weights of a token sum to 1. replayed: unsigned [..., k], earlier choices to use
    again, counted from 1; zeros for a token without any, which chooses anew. Returns (probabilities of all
    experts float32 [..., E], weights float32 [..., k], experts int32 [..., k]).
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = lax.top_k(probabilities, k)
    if replayed is not None:
        experts = jnp.where(replayed > 0, replayed.astype(jnp.int32) - 1, experts)
        weights = jnp.take_along_axis(probabilities, experts, axis=-1)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True) if normalise else weights
    return probabilities, weights, experts


def balance(probabilities, experts, live):
    """What the load-balancing loss needs of one layer: (assignments, sum of probabilities) of each expert, float32 [E].

    live: bool like a token, False for padding.
    """
    E, live = probabilities.shape[-1], live.astype(jnp.float32)[..., None]
    chosen = jnp.sum(jax.nn.one_hot(experts, E, dtype=jnp.float32), axis=-2) * live
    axes = tuple(range(chosen.ndim - 1))
    return jnp.sum(chosen, axes), jnp.sum(probabilities * live, axes)


def balance_loss(assignments, probabilities, tokens):
    """Load-balancing loss of Switch Transformers (2101.03961, equations 4 to 6) over all layers at once, as
    transformers computes it: E x sum over experts of (share of assignments) x (mean probability); k if even.

    assignments, probabilities: float32 [L, E], from `balance`. tokens: how many were counted, in one layer.
    """
    L, E = assignments.shape
    total = L * jnp.maximum(tokens, 1)
    return E * jnp.sum(assignments.sum(0) / total * probabilities.sum(0) / total)


def apply_experts(x, weights, experts, gate_up, down, activation):
    """Sum over the chosen experts of weight x down(activation(gate(x)) * up(x)).

    x: [B, T, D]. weights, experts: [B, T, k]. gate_up: [E, D, 2 M], or the pair of [E, D, M]. down: [E, M, D].
    Returns [B, T, D] in x's dtype.
    """
    local = functools.partial(_local, activation=activation, total=down.shape[0])
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(x, weights, experts, gate_up, down)
    rows, expert, inner = nn.logical_to_mesh_axes(("batch", "expert", "expert_mlp"))
    row_axes = (rows,) if isinstance(rows, str) else rows or ()
    run = functools.partial(_on_mesh, local, expert, inner, expert in row_axes)
    wide, tokens = P(expert, None, inner), P(rows)
    specs = (tokens, tokens, tokens, jax.tree.map(lambda _: wide, gate_up), P(expert, inner))
    return jax.shard_map(run, in_specs=specs, out_specs=tokens, check_vma=False)(x, weights, experts, gate_up, down)


def _on_mesh(local, expert, inner, travel: bool, x, weights, experts, gate_up, down):
    """`apply_experts` on one device. expert, inner: mesh axes that split experts and their width, or None."""
    if expert and travel:
        x, weights, experts = (lax.all_gather(a, expert, axis=0, tiled=True) for a in (x, weights, experts))
    first = lax.axis_index(expert) * down.shape[0] if expert else 0
    out = local(x, weights, experts - first, gate_up, down)
    out = lax.psum(out, inner) if inner else out
    if not expert:
        return out
    return lax.psum_scatter(out, expert, scatter_dimension=0, tiled=True) if travel else lax.psum(out, expert)


def _local(x, weights, experts, gate_up, down, *, activation, total: int):
    """`apply_experts` with the experts [0, E), of `total`, that are here; choices outside of them add nothing."""
    E, D, k = down.shape[0], x.shape[-1], experts.shape[-1]
    chosen = experts.reshape(-1)
    here = (chosen >= 0) & (chosen < E)
    chosen = jnp.where(here, chosen, E)  # the rest is sorted behind all groups
    fixed = dict(k=k, activation=activation)
    forms = {"default": functools.partial(_sorted, **fixed)}
    if moe_gpu.takes(x.dtype, chosen.shape[0], D, 2 * down.shape[1]):
        forms["cuda"] = functools.partial(_in_blocks, **fixed, total=total)
        forms["tpu"] = functools.partial(_sorted, **fixed, product=functools.partial(_megablox, total=total))
    with jax.named_scope(f"experts_of_{total}"):  # tells preflight how many of the rows are here
        y = lax.platform_dependent(x.reshape(-1, D), chosen, gate_up, down, **forms)
    y = jnp.where(here[:, None], y.astype(jnp.float32), 0) * weights.reshape(-1, 1)
    return jnp.sum(y.reshape(*x.shape[:-1], k, D), axis=-2).astype(x.dtype)


def _groups(chosen, E: int):
    """(the order that sorts choices by expert, int32 [E]: how many each expert has)."""
    sizes = jnp.sum(chosen[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    return jnp.argsort(chosen, stable=True), sizes


def _mlp(rows, product, gate_up, down, activation):
    if isinstance(gate_up, tuple):
        gate, up = (product(rows, w) for w in gate_up)
    else:
        gate, up = jnp.split(product(rows, gate_up), 2, axis=-1)
    return product(activation(gate) * up, down)


def _sorted(x, chosen, gate_up, down, *, k: int, activation, product=lax.ragged_dot):
    """What the experts say to their tokens, [choices, D]. x: [tokens, D]. chosen: int32 [choices], E: nobody here."""
    order, sizes = _groups(chosen, down.shape[0])
    grouped = functools.partial(product, group_sizes=sizes)
    return _mlp(x[order // k], grouped, gate_up, down, activation)[jnp.argsort(order)]  # back in the order of tokens


def _megablox(rows, w, group_sizes, *, total: int, interpret: bool = False):
    """lax.ragged_dot of rows [M, D] and w [E, D, F]; on v5e and v6e XLA's own multiplies every row by every expert."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    (M, D), F = rows.shape, w.shape[-1]
    if M % 16:
        return lax.ragged_dot(rows, w, group_sizes)
    tile = min(512, M & -M, max(32, 2 * moe_gpu.rows_of_block(M, total)))
    live = (jnp.arange(M) < jnp.sum(group_sizes))[:, None]  # others, and their gradients, the kernels leave undefined
    tiling = (tile, min(D, 1024), min(F, 1024))
    out = gmm(jnp.where(live, rows, 0), w, group_sizes, rows.dtype, tiling, interpret=interpret)
    return jnp.where(live, out, 0)


def _in_blocks(x, chosen, gate_up, down, *, k: int, activation, total: int, interpret: bool = False):
    """`_sorted` with each expert's rows in whole blocks, for the kernels of a GPU."""
    E, choices = down.shape[0], chosen.shape[0]
    order, sizes = _groups(chosen, E)
    block = moe_gpu.rows_of_block(choices, total)
    blocks, first = moe_gpu.arrange(sizes, choices, block)
    P = blocks.owner.shape[0] * block
    expert = chosen[order]
    rank = jnp.arange(choices) - (jnp.cumsum(sizes) - sizes).at[expert].get(mode="clip")
    place = jnp.where(expert < E, first.at[expert].get(mode="clip") + rank, P)
    source = jnp.full(P, x.shape[0]).at[place].set(order // k, mode="drop")
    rows = x.at[source].get(mode="fill", fill_value=0)
    y = _mlp(rows, lambda a, w: moe_gpu.grouped_product(a, w, blocks, interpret), gate_up, down, activation)
    return y.at[jnp.zeros_like(order).at[order].set(place)].get(mode="clip")
