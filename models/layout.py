"""From training parameters to the form that decoding wants: unrolled by layer, fused, cast, perhaps int8."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from models.config import DecoderConfig
from models.table import LORA_A, LORA_B, MATRIX, SCALE, TRANSPOSED, Weight, get_path, set_path, weights

HEAD = ("lm_head", "kernel")


def quantise(x, axis: int = -2):
    """(int8 like x, float32 scales without `axis`); symmetric: x is approximately their product. A matrix [D, F] has
    a scale per column; keys and values, with axis -1, have one per token and head."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axis) / 127, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x / jnp.expand_dims(scale, axis)).astype(jnp.int8), scale


def sampling_layout(
    params, config: DecoderConfig, dtype, fuse: bool = True, *, untie: bool = False, int8: bool = False,
    transpose_from: int = 0,
):  # fmt: skip
    """The same weights, unrolled by layer, cast once, with those of one `fused` name in the table side by side.

    Unrolled, because a scanned decode step would copy every layer's cache in and out of the scan; fused,
    because a decode step is bound by the number of small matrix products. Run it under jit with output
    shardings: it is the one cast-and-reshard from training to sampling per rollout phase.

    untie: give tied embeddings a head of their own, [D, V]; a CPU multiplies by a transposed matrix slowly.
    int8: matrices of the layers and a head of its own become int8, with `*_scale` beside them (see `quantise`).
    transpose_from: matrices of so many elements or more, but no int8 ones, are stored transposed, as `*_transposed`
    (see models.cpu.transposed_product); 0: none.

    Returns: params for Decoder(config, dtype, scan_layers=False).
    """

    out: dict = {}
    for path, rows, layer, small in _entries(config, fuse, untie, int8):
        arrays = [dense(params, row, config, layer) for row in rows]
        matrix, as_embedding = rows[0].kind == MATRIX or path == HEAD, path == HEAD and rows[0].path != HEAD
        kept = jnp.bfloat16 if config.narrow and matrix else dtype
        arrays = arrays if small else [a.astype(kept) for a in arrays]
        w = jnp.concatenate(arrays, axis=-1) if len(arrays) > 1 else arrays[0]
        transposed = matrix and not small and 0 < transpose_from <= w.size
        w = w.T if transposed != as_embedding else w
        if small:
            w, scale = quantise(w)
            set_path(out, (*path[:-1], path[-1] + SCALE), scale)
        set_path(out, (*path[:-1], path[-1] + TRANSPOSED) if transposed else path, w)
    return out


def dense(params, row: Weight, config: DecoderConfig, layer: int | None = None):
    """The array of a row (of one layer, if given) as it is stored. If it is int8 or has adapters beside it, instead the
    float32 matrix that it stands for: scale x W + lora_scale a b."""

    def stored(suffix=""):
        array = get_path(params, (*row.path[:-1], row.path[-1] + suffix))
        return array if array is None or layer is None else array[layer]

    w, scale, a, b = map(stored, ("", SCALE, LORA_A, LORA_B))
    if scale is not None:
        w = w.astype(jnp.float32) * scale[..., None, :]
    if a is None:
        return w
    product = jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
    return w.astype(jnp.float32) + config.lora_scale * product


def layout_specs(config: DecoderConfig, fuse: bool = True, untie: bool = False, int8: bool = False):
    """Logical PartitionSpecs of what `sampling_layout` returns for the same arguments."""
    out: dict = {}
    for path, rows, _, small in _entries(config, fuse, untie, int8):
        axes = rows[0].axes
        axes = axes[::-1] if path == HEAD and rows[0].path != HEAD else axes
        if small:
            set_path(out, (*path[:-1], path[-1] + SCALE), P(*axes[:-2], axes[-1]))
        set_path(out, path, P(*axes))
    return out


def _entries(config: DecoderConfig, fuse: bool, untie: bool, int8: bool
             ) -> Iterator[tuple[tuple[str, ...], list[Weight], int | None, bool]]:
    """(path, rows whose arrays it holds side by side, layer or None, whether int8) of each parameter of the layout.
    A separate head that was made for tied embeddings has the embedding's row and holds its array transposed."""
    groups: dict[tuple[str, ...], list[Weight]] = {}
    for path, row in weights(config).items():
        groups.setdefault((*path[:-1], row.fused) if fuse and row.fused else path, []).append(row)
    for path, rows in groups.items():
        small = int8 and rows[0].kind == MATRIX
        if rows[0].layered:
            for i in range(config.num_layers):
                yield (f"layer_{i}", *path[1:]), rows, i, small
        else:
            yield path, rows, None, small
    if untie and HEAD not in groups:
        yield HEAD, groups[("embed", "embedding")], None, int8
