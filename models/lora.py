"""Low-rank adapters (LoRA, 2106.09685): W + scale a b beside a frozen matrix W [D, F], with a [D, r] and b [r, F].

In the parameter tree the adapters of `q` are `q_lora_a` and `q_lora_b` beside it, layers stacked like everything else;
the decoder adds their product wherever it finds them (models/decoder.py), and models/layout.py merges them into W for
sampling and export. Trained are the adapters alone; the base, in bfloat16 or with its matrices in int8, stays as it is.

Files are PEFT's: adapter_config.json and adapter_model.safetensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from models.config import DecoderConfig, read_json
from models.layout import dense, quantise
from models.table import (
    FAMILIES,
    LORA_A,
    LORA_B,
    MATRIX,
    SCALE,
    Weight,
    get_path,
    set_path,
    weights,
    whole_shape,
)
from models.weights import read_table, write_tensors

CLASSES = {"attention": "attn", "mlp": "mlp"}  # word for a class of matrices -> its module
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BASES = ("float32", "bfloat16", "int8")
TARGETS = ("all", *CLASSES, *dict.fromkeys(
    row.path[-1] for rows in FAMILIES.values() for row in rows if row.kind == MATRIX and row.layered))


@dataclasses.dataclass(frozen=True)
class LoRA:
    """rank: columns of a. alpha: the product counts alpha / rank, with rslora (2312.03732) alpha / sqrt(rank).
    targets: names of matrices ("q", "down") or classes: "attention", "mlp", "all"."""

    rank: int
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all",)
    rslora: bool = False

    @property
    def scale(self) -> float:
        """Factor of the product a b."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def targeted(config: DecoderConfig, targets: Iterable[str]) -> list[Weight]:
    """The rows of the table that get an adapter. Raises ValueError naming a target that the model does not have."""
    layered = [row for row in weights(config).values() if row.kind == MATRIX and row.layered]
    found = set()
    for target in targets:
        rows = [r for r in layered if target in ("all", r.path[-1]) or CLASSES.get(target) == r.path[-2]]
        if not rows:
            names = ", ".join(["all", *CLASSES, *dict.fromkeys(r.path[-1] for r in layered)])
            raise ValueError(f"{target!r} is no matrix of {config.model_type}'s layers; choose among {names}")
        found |= {r.path for r in rows}
    return [r for r in layered if r.path in found]


def adapter_table(config: DecoderConfig, lora: LoRA) -> dict[tuple[str, ...], Weight]:
    """Path -> row of every adapter matrix, with its name in PEFT's files."""
    out = {}
    for row in targeted(config, lora.targets):
        stem = "base_model.model." + row.hf.removesuffix(".weight")
        *outer, D, F = row.shape
        halves = (LORA_A, "lora_A", (D, lora.rank), (-2, None)), (LORA_B, "lora_B", (lora.rank, F), (None, -1))
        for suffix, name, shape, kept in halves:
            path = (*row.path[:-1], row.path[-1] + suffix)
            dims = row.dims[:-2] + "".join("R" if i is None else row.dims[i] for i in kept)
            hf = f"{stem}.{name}.weight"
            out[path] = dataclasses.replace(row, path=path, hf=hf, dims=dims, fused="", shape=(*outer, *shape))
    return out


def abstract_adapters(config: DecoderConfig, lora: LoRA, dtype=jnp.float32):
    """(ShapeDtypeStruct tree, tree of logical PartitionSpecs), as models.decoder.abstract_params."""
    shapes: dict = {}
    specs: dict = {}
    for path, row in adapter_table(config, lora).items():
        set_path(shapes, path, jax.ShapeDtypeStruct(whole_shape(row, config), dtype))
        set_path(specs, path, P("layers", *row.axes))
    return shapes, specs


def init_adapters(config: DecoderConfig, lora: LoRA, key, dtype=jnp.float32):
    """New adapters, which leave the model as its base: b is 0, a uniform within 1 / sqrt(D), as in PEFT."""
    out: dict = {}
    for i, (path, row) in enumerate(adapter_table(config, lora).items()):
        shape, bound = whole_shape(row, config), row.shape[-2] ** -0.5
        new = jnp.zeros(shape, dtype)
        if path[-1].endswith(LORA_A):
            new = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound).astype(dtype)
        set_path(out, path, new)
    return out


def join(frozen, trained):
    """All parameters of the model as one tree of nested dicts: adapters beside their matrices. frozen: None if there is
    nothing beside `trained`."""
    if frozen is None:
        return trained
    return {**frozen, **{k: join(frozen[k], v) if isinstance(v, Mapping) else v for k, v in trained.items()}}


def merge(params, config: DecoderConfig, dtype):
    """The ordinary training tree: every matrix with its adapters added, int8 ones as floats, all in `dtype`."""
    out: dict = {}
    for path, row in weights(config).items():
        set_path(out, path, dense(params, row, config).astype(dtype))
    return out


# --- the frozen base ------------------------------------------------------------------------------------------------


def frozen_base(params: dict, config: DecoderConfig, kind: str) -> dict:
    """The training tree as the frozen base of adapters. kind: of BASES. int8: the matrices of the layers in int8 with a
    float32 scale per column, all else in bfloat16. Each array of `params` is freed once it is converted."""
    out: dict = {}
    dtype = jnp.dtype("bfloat16" if kind == "int8" else kind)
    cast, small = jax.jit(lambda x: x.astype(dtype)), jax.jit(quantise)
    for path, row in weights(config).items():
        array = get_path(params, path)
        if _is_small(row, kind):
            new, scale = small(array)
            set_path(out, (*path[:-1], path[-1] + SCALE), scale)
        else:
            new = array if array.dtype == dtype else cast(array)
        set_path(out, path, new)
        if new is not array:
            array.delete()
    return out


def fingerprint(params) -> str:
    """A short name of the values of a tree of arrays, the same on every mesh: it tells one base from another."""
    numbers = jax.device_get(jax.jit(lambda tree: jax.tree.map(_checksum, tree))(params))
    leaves = jax.tree_util.tree_leaves_with_path(numbers)
    text = json.dumps([[jax.tree_util.keystr(path), int(n)] for path, n in leaves])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checksum(x):
    """uint32 []: the sum of all bits, each element weighted by its place; integer sums do not depend on the order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum((bits + jnp.uint32(1)) * (place * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)


def abstract_base(config: DecoderConfig, kind: str):
    """(ShapeDtypeStruct tree, tree of logical PartitionSpecs) of `frozen_base`."""
    shapes: dict = {}
    specs: dict = {}
    dtype = jnp.dtype("bfloat16" if kind == "int8" else kind)
    for path, row in weights(config).items():
        shape, axes = whole_shape(row, config), ("layers",) * row.layered + row.axes
        small = _is_small(row, kind)
        set_path(shapes, path, jax.ShapeDtypeStruct(shape, jnp.int8 if small else dtype))
        set_path(specs, path, P(*axes))
        if small:
            at = (*path[:-1], path[-1] + SCALE)
            set_path(shapes, at, jax.ShapeDtypeStruct((*shape[:-2], shape[-1]), jnp.float32))
            set_path(specs, at, P(*axes[:-2], axes[-1]))
    return shapes, specs


def _is_small(row: Weight, kind: str) -> bool:
    return kind == "int8" and row.kind == MATRIX and row.layered


# --- PEFT's files ---------------------------------------------------------------------------------------------------


def save_adapters(directory: str | os.PathLike, adapters, config: DecoderConfig, lora: LoRA, base: str = "") -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which peft loads onto the base model.

    base: name or path of the base, for adapter_config.json. Over several processes all must call this.
    """
    root, table = pathlib.Path(directory), adapter_table(config, lora)
    write_tensors(root / TENSORS, adapters, table, config)
    if jax.process_index() == 0:
        (root / CONFIG).write_text(json.dumps(to_peft(config, lora, base), indent=2) + "\n", encoding="utf-8")


def to_peft(config: DecoderConfig, lora: LoRA, base: str = "") -> dict[str, Any]:
    """The content of adapter_config.json."""
    modules = [row.hf.split(".")[-2] for row in targeted(config, lora.targets)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(dict.fromkeys(modules)),
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


# keys of adapter_config.json that change arithmetic -> the values that leave it as it is here
_MUST_BE = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "megatron_config": (None,),
}


def read_lora(directory: str | os.PathLike, config: DecoderConfig) -> LoRA:
    """What the adapter_config.json of a directory says. Raises ValueError, one line naming file and key, for what
    this decoder would not compute."""
    file = pathlib.Path(directory) / CONFIG
    peft = read_json(file)
    for key, valid in _MUST_BE.items():
        if key in peft and peft[key] not in valid:
            raise ValueError(f"{file}: key {key!r} is {peft[key]!r}; only {valid[0]!r} is supported")
    by_module = {row.hf.split(".")[-2]: row.path[-1] for row in targeted(config, ["all"])}
    modules = peft.get("target_modules")
    modules = list(by_module) if modules == "all-linear" else modules
    if not isinstance(modules, list) or not modules or not set(modules) <= set(by_module):
        raise ValueError(f"{file}: key 'target_modules' is {modules!r}; supported: a list of {', '.join(by_module)}")
    rank, alpha = peft.get("r"), peft.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and np.isfinite(alpha)):
        raise ValueError(f"{file}: r={rank!r} must be a positive integer and lora_alpha={alpha!r} a number")
    targets = tuple(name for module, name in by_module.items() if module in modules)
    return LoRA(rank, float(alpha), targets, bool(peft.get("use_rslora", False)))


def load_adapters(directory: str | os.PathLike, config: DecoderConfig, shardings=None, dtype=jnp.float32):
    """(LoRA, adapters) of a PEFT directory; shardings as for models.weights.load_params, a tree or a function of the
    LoRA. Raises ValueError, one line naming the file, for what is missing, misshapen or not supported."""
    lora = read_lora(directory, config)
    shardings = shardings(lora) if callable(shardings) else shardings
    table = adapter_table(config, lora)
    return lora, read_table(pathlib.Path(directory), table, config, shardings, dtype=dtype, single=TENSORS)
