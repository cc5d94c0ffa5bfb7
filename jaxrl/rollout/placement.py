"""Where the sampler lives on a mesh: every host decodes its own prompts on its own chips.

    training:  all devices, ("data", "fsdp", "tensor"), fp32, one layer at a time gathered
    sampling:  this host's devices, ("data", "tensor"), compute dtype: slots over `data`, each replica of the
               weights split over `tensor` (1 if a chip holds the model)

Lock-step decoding over all hosts would wait for the slowest row of the pod at every step. Once per rollout
phase the weights are cast where they lie and then moved; no second fp32 copy exists at any time.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.errors import UserError
from jaxrl.runtime import mesh as meshes
from models.config import DecoderConfig
from models.layout import layout_specs

AXES = ("host", "data", "tensor")
RULES = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": None,
    "norm": None,
    "expert": "tensor",
    "expert_embed": None,
    "expert_mlp": None,
    "batch": "data",
    "seq": None,
    "act_embed": None,
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """Meshes and shardings of one process's sampler.

    training: the learner's mesh. everywhere: the same devices as ("host", "data", "tensor"). mesh: those of this
    process, ("data", "tensor"). rules: logical axis -> mesh axis. fused: whether q/k/v and gate/up share a
    matrix; not if matrices are split over `tensor`, as shards would then mix them. int8: whether matrices are int8.
    """

    training: Mesh
    everywhere: Mesh
    mesh: Mesh
    rules: dict
    fused: bool
    int8: bool = False

    @property
    def row_multiple(self) -> int:
        """Slots and prefilled prompts come in multiples of this."""
        return self.mesh.shape["data"]

    @property
    def platform(self) -> str:
        """"cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    def use(self):
        """Context for tracing and calling the sampler's programs."""
        return meshes.use(self.mesh, self.rules)

    def params(self, config: DecoderConfig, mesh: Mesh | None = None, rules: dict | None = None):
        """Shardings of parameters in the sampling layout, on this mesh or on another one with its rules."""
        mesh, rules = mesh or self.mesh, rules or self.rules
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, meshes.to_spec(spec, rules)),
            layout_specs(config, self.fused, self.platform == "cpu", self.int8),
            is_leaf=lambda x: isinstance(x, P),
        )

    def cast_where_they_lie(self, config: DecoderConfig):
        """Shardings of the sampling layout on the training mesh: the output of the cast."""
        rules = meshes.logical_rules(self.training, config.num_kv_heads, config.vocab_size)
        if self.fused and self.training.shape["tensor"] > 1:
            rules |= dict(heads=None, kv_heads=None)  # see `fused`
        return self.params(config, self.training, rules)

    def cache(self, pages: bool = False) -> NamedSharding:
        """Of every [rows, heads, ...] array of the cache, or [pages, tokens, heads, ...]."""
        return NamedSharding(self.mesh, P("data", *(None,) * pages, self.rules["kv_heads"]))

    def fetch(self, params, config: DecoderConfig):
        """Moves the cast parameters to the sampler's places; returns those on this process's chips."""
        if self.training.size == 1:
            return params
        moved = jax.device_put(params, self.params(config, self.everywhere))

        def local(array, sharding):
            pieces = [s.data for s in array.addressable_shards]
            return jax.make_array_from_single_device_arrays(array.shape, sharding, pieces)

        return jax.tree.map(local, moved, self.params(config))


def place(config: DecoderConfig, training: Mesh, tensor: int = 1, int8: bool = False) -> Placement:
    """The placement of this process.

    tensor: chips that share one copy of the weights. Raises UserError if it does not divide a host's chips, the
    heads or the MLP.
    """
    devices = sorted(training.devices.flat, key=lambda d: d.process_index)  # stable: keeps the mesh's order
    local = [d for d in devices if d.process_index == jax.process_index()]
    for what, size in (
        ("chips of a host", len(local)),
        ("query heads", config.num_heads),
        ("MLP width", config.intermediate_size),
    ):
        if tensor < 1 or size % tensor:
            raise UserError(f"config.sampling.tensor={tensor} does not divide the {size} {what}")
    shape = (len(devices) // len(local), len(local) // tensor, tensor)
    everywhere = Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)
    mesh = Mesh(np.array(local).reshape(shape[1:]), AXES[1:], axis_types=(AxisType.Auto,) * 2)
    rules = dict(RULES)
    for name, size in (("kv_heads", config.num_kv_heads), ("vocab", config.vocab_size), ("expert", config.num_experts)):
        rules[name] = "tensor" if size % tensor == 0 else None
    return Placement(training, everywhere, mesh, rules, fused=tensor == 1, int8=int8)
