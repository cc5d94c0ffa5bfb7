"""The device mesh and the one table that says how logical axes lie on it.

    data    replicas: each holds all parameters of its fsdp x tensor block and sees its own rows. With several slices
            of TPU (or hosts of GPUs, mesh.slices) only this axis crosses the network: gradients, once per micro-batch
    fsdp    also splits rows; parameters, gradients and optimizer state are split over it and gathered per layer
    expert  as fsdp, but each of its devices keeps experts of its own, and tokens travel to them. If its size is 1,
            experts are split over fsdp instead, which must then not be larger than the number of experts
    tensor  splits heads, MLP width and vocabulary inside a layer (and, as an option, tokens between layers)

Models name their axes ("embed", "heads", ...); only this file knows what a name means on a mesh.
"""

from __future__ import annotations

import contextlib
import math

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH = ("data", "fsdp", "expert")  # the mesh axes that split rows
SPLIT = ("fsdp", "expert")  # the mesh axes that split parameters and are gathered

RULES = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",  # replicated when the number of key-value heads does not divide
    "mlp": "tensor",
    "embed": SPLIT,
    "norm": None,
    "expert": "fsdp",  # experts stay where they are, tokens travel to them (models/moe.py)
    "expert_embed": None,
    "expert_mlp": "tensor",
    # activations
    "batch": BATCH,
    "lookup_batch": "data",  # in the embedding lookup; the other axes of rows split its columns
    "seq": None,  # "tensor" with sequence parallelism
    "act_embed": None,
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None, slices: int = 1, *,
              expert: int = 1) -> Mesh:
    """A mesh of AXES over `devices` (default: all of them); one size may be -1, "the rest".

    slices: groups of devices that reach each other only over the network, such as slices of TPU or hosts of GPUs;
    `data` is then `slices` times what lies inside of each.

    Raises UserError when the sizes do not multiply to the number of devices, or the slices are not those of the
    machine.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes, count = [data, fsdp, expert, tensor], len(devices)
    named = ", ".join(f"mesh.{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"{named}: sizes must be positive, and at most one may be -1 (the rest)")
    known = math.prod(s for s in sizes if s != -1)
    if count % known or (-1 not in sizes and count != known):
        raise UserError(f"{named}: the product must be {'a divisor of ' if -1 in sizes else ''}{count}, "
                        "the number of devices")
    data, *inside = (count // known if s == -1 else s for s in sizes)
    axis_types = (AxisType.Auto,) * len(AXES)
    if data % slices:
        raise UserError(f"mesh.data={data} must be a multiple of mesh.slices={slices}: data alone crosses slices")
    groups = split_slices(devices, slices)
    if slices == 1:
        return jax.make_mesh((data, *inside), AXES, axis_types=axis_types, devices=devices)
    parts = [mesh_utils.create_device_mesh((data // slices, *inside), group) for group in groups]
    return Mesh(np.concatenate(parts), AXES, axis_types=axis_types)


def split_slices(devices, slices: int) -> list[list]:
    """The devices of each of `slices` slices: as TPUs report them, else neighbouring processes (hosts of GPUs),
    else equal parts (one process of a CPU that stands for several).

    Raises UserError if the TPUs are on another number of slices, or the devices do not divide.
    """
    own = {getattr(d, "slice_index", None) for d in devices} if devices[0].platform == "tpu" else {None}
    if slices < 1 or (len(own) > 1 and len(own) != slices) or len(devices) % slices:
        there = f"the {len(devices)} devices are on {len(own)} slice(s)" if own != {None} else f"{len(devices)} devices"
        raise UserError(f"mesh.slices={slices}: {there}")
    ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", None) or 0, d.process_index, d.id))
    size = len(devices) // slices
    return [ordered[i : i + size] for i in range(0, len(devices), size)]


def logical_rules(mesh: Mesh, num_kv_heads: int | None = None, vocab_size: int | None = None,
                  sequence_parallel: bool = False) -> dict:
    """RULES fitted to a model and a mesh: key-value heads and vocabulary stay whole where `tensor` does not divide
    them; experts take the mesh axis `expert` if it is larger than 1."""
    rules, tensor = dict(RULES), mesh.shape["tensor"]
    if mesh.shape["expert"] > 1:
        rules |= {"expert": "expert", "expert_embed": "fsdp"}
    if num_kv_heads is not None and num_kv_heads % tensor:
        rules["kv_heads"] = None
    if vocab_size is not None and vocab_size % tensor:
        rules["vocab"] = None
    if sequence_parallel:
        rules["seq"] = "tensor"
    return rules


def to_spec(logical: P, rules: dict) -> P:
    """PartitionSpec of mesh axes for a PartitionSpec of logical axes. Raises KeyError for an unknown name."""
    return P(*(None if name is None else rules[name] for name in logical))


def shardings(mesh: Mesh, logical_specs, rules: dict | None = None, abstract=None):
    """Tree of NamedSharding for a tree of logical PartitionSpecs (see models.decoder.abstract_params).

    rules: from `logical_rules`; default RULES. abstract: the matching tree of shapes; when given, every
    dimension must divide. Raises UserError naming the parameter and the mesh axis otherwise.
    """
    rules = RULES if rules is None else rules
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    out = jax.tree.map(lambda s: NamedSharding(mesh, to_spec(s, rules)), logical_specs, is_leaf=is_spec)
    if abstract is not None:
        jax.tree_util.tree_map_with_path(_check_divides, abstract, out)
    return out


def _check_divides(path, leaf, sharding):
    for size, axes in zip(leaf.shape, sharding.spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(sharding.mesh.shape[a] for a in axes)
        if size % parts:
            split = [a for a in axes if sharding.mesh.shape[a] > 1]
            raise UserError(f"mesh.{'*'.join(split)}={parts} does not divide dimension {size} of parameter "
                            f"{jax.tree_util.keystr(path, simple=True, separator='/')} {tuple(leaf.shape)}")


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, P())


def num_batch_shards(mesh: Mesh) -> int:
    """The number of parts that the rows of a batch are split into: data x fsdp x expert."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def own_shards(mesh: Mesh) -> np.ndarray:
    """int64, ascending: which of those parts lie on this process's devices."""
    mine = np.vectorize(lambda d: d.process_index == jax.process_index(), otypes=[bool])(mesh.devices)
    return np.flatnonzero(mine.reshape(num_batch_shards(mesh), -1).any(1))


@contextlib.contextmanager
def use(mesh: Mesh, rules: dict):
    """Inside it, the model's logical activation constraints mean `rules` on `mesh`. Used while tracing a program."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(tuple(rules.items())):
        yield
