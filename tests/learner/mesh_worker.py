"""Runs one update on each of several meshes of eight fake devices; a process of its own, because the number of
devices is fixed at start-up.

    JAX_NUM_CPU_DEVICES=8 python -m tests.learner.mesh_worker OUT.npz 1,1,1 2,2,2 ...

A mesh is data,fsdp,tensor; a trailing "+sp" adds sequence parallelism, "@2" puts it on two slices, "+lora" trains
adapters beside an int8 base, "+moe" takes a mixture of experts, "+moe2" with a mesh axis of two devices for them. For
each, OUT holds the gradient (SGD with rate 1: old minus new parameters), the metrics, and the collectives of the
compiled program; a line tells how far loss and gradient are from those of the first mesh.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl.learner.packing import PackSettings, pack
from jaxrl.learner.state import Optimizer, abstract_state, init_state, sharding_of
from jaxrl.learner.state import placed as on_mesh
from jaxrl.learner.update import Objective, build_programs, place_batch
from jaxrl.rollouts import from_sequences
from jaxrl.runtime import hlo
from jaxrl.runtime.mesh import make_mesh
from models.config import DecoderConfig
from models.decoder import init_params
from models.lora import LoRA, abstract_base, frozen_base, init_adapters

# Sizes that tell arrays apart: V 208, D 32, F 80, q 64, kv 32. Two key-value heads, so tensor=8 replicates them.
CONFIG = DecoderConfig(208, 32, 80, 3, 8, 2, 8, qk_norm=True, model_type="qwen3", init_std=0.2)
MOE = dataclasses.replace(CONFIG, model_type="qwen3_moe", num_experts=8, experts_per_token=2, expert_size=24)
OBJECTIVE = Objective(loss="gspo", kl_coef=0.1, entropy_coef=0.01, temperature=0.9)


ADAPTERS = LoRA(4, 8.0)


def some_adapters(config):
    """As after some training: neither half is zero."""
    new = init_adapters(config, ADAPTERS, jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), new)


def batch(seed=0):
    """64 sequences in rows of 48 tokens, eight a micro-batch: one for each device."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 208, rng.integers(2, 9)) for _ in range(64)]
    responses = [rng.integers(1, 208, rng.integers(3, 39)) for _ in range(64)]
    logprobs = [-5 + 0.1 * rng.normal(size=len(r)) for r in responses]
    rollouts = from_sequences(prompts, responses, logprobs)
    data, packing = pack(rollouts, rng.normal(size=64), PackSettings(48, 8 * 48, shards=8))
    spread = packing.spread(rollouts.logprobs)
    data = data.replace(old_logprobs=spread, ref_logprobs=spread)
    return data.replace(capacity=8 * 48)  # for the mesh whose one shard holds all rows


def collectives(text):
    """[[computation, kind, [shapes]]] of every collective, and the totals with loops counted out."""
    computations, entry = hlo.parse(text)
    found = []
    for name, body in computations.items():
        for op in body.values():
            if (kind := op.opcode.removesuffix("-start")) in hlo.COLLECTIVES:
                shapes = [[int(d) for d in dims.split(",") if d] for _, dims in hlo._ARRAY.findall(op.shape)]
                found.append(["entry" if name == entry else name, kind, shapes])
    counts = hlo.count(text, loop_trips=1).collectives
    return found, {kind: int(n) for kind, (n, _) in counts.items()}


def main(out, *names):
    jax.config.update("jax_disable_most_optimizations", True)  # the same partitioning, compiled in half the time
    optimizer, record, first = Optimizer(optax.sgd(1.0), lambda step: jnp.float32(1)), {}, None
    for name in names:
        whole, *options = name.split("+")
        shape, _, slices = whole.partition("@")
        sizes, slices = [int(n) for n in shape.split(",")], int(slices or 1)
        moe = next((o for o in options if o.startswith("moe")), "")
        expert = int(moe[3:] or 1)
        mesh = make_mesh(*sizes, devices=jax.devices()[: expert * np.prod(sizes)], slices=slices, expert=expert)
        lora, config, frozen = None, MOE if moe else CONFIG, None
        objective = dataclasses.replace(OBJECTIVE, balance_coef=0.1 * bool(moe))
        if "lora" in options:
            lora, config = ADAPTERS, dataclasses.replace(CONFIG, lora_scale=ADAPTERS.scale)
            where = sharding_of(on_mesh(mesh, config, *abstract_base(config, "int8")))
            base = frozen_base(init_params(config, jax.random.key(0)), config, "int8")
            frozen = jax.tree.map(jax.device_put, base, where)
        programs = build_programs(config, mesh, optimizer, objective, sequence_parallel="sp" in options, lora=lora)
        if lora:
            where = sharding_of(abstract_state(config, optimizer, mesh, lora=lora).params)
            adapters = jax.tree.map(jax.device_put, some_adapters(config), where)
            state = init_state(config, optimizer, mesh, params=adapters, lora=lora)
        else:
            state = init_state(config, optimizer, mesh, jax.random.key(0))
        before, data = jax.tree.map(np.array, state.params), place_batch(batch(), mesh)
        program = programs.update.lower(state, data, frozen).compile()
        found, counts = collectives(program.as_text())
        far = hlo.count(program.as_text(), slices=tuple(i * slices // mesh.size for i in range(mesh.size))).far
        placed = [str(x.sharding.spec) for x in jax.tree.leaves(state)]
        state, metrics = program(state, data, frozen)
        assert placed == [str(x.sharding.spec) for x in jax.tree.leaves(state)], "the update moved the state"
        gradient = jax.tree.map(lambda a, b: a - np.array(b), before, state.params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
            record[f"{name}|{jax.tree_util.keystr(path)}"] = leaf
        metrics = {k: float(v) for k, v in metrics.items()}
        first = first or (metrics["loss"], gradient)
        apart = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (gradient, first[1])), strict=True))
        moved = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "no collectives"
        loss, apart = abs(metrics["loss"] / first[0] - 1), apart / metrics["grad_norm"]
        print(f"{name}: loss {loss:.1e} apart, gradient {apart:.1e} of its norm; {moved}")
        shards = {jax.tree_util.keystr(p): list(x.addressable_shards[0].data.shape)
                  for p, x in jax.tree_util.tree_leaves_with_path(state.params)}
        record[name] = json.dumps(dict(metrics=metrics, found=found, counts=counts, shards=shards, far=far))
    np.savez(out, **record)


if __name__ == "__main__":
    main(*sys.argv[1:])
