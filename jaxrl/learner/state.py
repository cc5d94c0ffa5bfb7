"""What an optimizer step carries, the optimizer itself, and their creation directly into shards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxrl.errors import UserError
from jaxrl.runtime.mesh import logical_rules, replicated, shardings
from models.config import DecoderConfig
from models.decoder import abstract_params, init_params
from models.lora import LoRA, abstract_adapters, init_adapters
from models.table import BIAS, NORM, kinds

SCHEDULES = ("constant", "cosine", "linear")
HOST = "pinned_host"  # the memory that a device can copy from and to by itself


@flax.struct.dataclass
class TrainState:
    """step: int32 [], optimizer updates applied. params: the master copy of what is trained: all of the model, or the
    adapters (models/lora.py) beside a frozen base that is no part of the state. opt_state: optax's. skipped: int32 [],
    updates not applied because something was not finite. skipped_in_a_row: int32 [], those since the last
    update that was applied."""

    step: Any
    params: Any
    opt_state: Any
    skipped: Any
    skipped_in_a_row: Any


class Optimizer(NamedTuple):
    """transform: optax gradient transformation. schedule: updates applied so far -> learning rate. offload: its
    state is kept in host memory and is on the device only during the update."""

    transform: optax.GradientTransformation
    schedule: Callable
    offload: bool = False


@functools.lru_cache(maxsize=8)  # equal settings, equal object: build_programs tells optimizers apart by identity
def build_optimizer(
    learning_rate: float,
    *,
    warmup_steps: int = 0,
    schedule: str = "constant",
    total_steps: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_clip: float = 0.0,
    state_dtype=jnp.float32,
    offload: bool = False,
) -> Optimizer:
    """AdamW (1711.05101) behind global-norm clipping.

    learning_rate: the peak, reached after warmup_steps updates (the first update already moves: lr / warmup).
    schedule: constant, or cosine / linear decay to 0 at total_steps updates. weight_decay: decoupled, not on
    norms and biases. grad_clip: largest global gradient norm, 0 = off. state_dtype: of both moments; bfloat16
    is written with stochastic rounding, because with b2 = 0.999 a second moment rounded to nearest never decays.

    Raises UserError for an unknown schedule, or a decaying one whose total_steps is not above warmup_steps.
    """
    lr = _schedule(learning_rate, warmup_steps, schedule, total_steps)
    adam = _adam_stored_as(optax.scale_by_adam(b1, b2, eps), state_dtype)
    chain = [optax.clip_by_global_norm(grad_clip)] if grad_clip else []
    chain += [adam, optax.add_decayed_weights(weight_decay, mask=decays), optax.scale_by_learning_rate(lr)]
    return Optimizer(optax.chain(*chain), lr, offload)


def _schedule(peak, warmup, kind, total):
    if kind not in SCHEDULES:
        raise UserError(f"config.optimizer.schedule={kind!r}: choose one of {', '.join(SCHEDULES)}")
    if kind != "constant" and total <= warmup:
        raise UserError(f"config.optimizer.schedule={kind!r} decays to zero at update {total}, which must be after "
                        f"config.optimizer.warmup_steps={warmup}")

    def lr(step):
        rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        done = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done))}[kind]
        return peak * rise * fall

    return lr


def decays(params):
    """Tree of bools: whether weight decay applies; norm scales and biases are left alone."""

    return jax.tree.map(lambda kind: kind not in (NORM, BIAS), kinds(params))


def _adam_stored_as(adam, dtype) -> optax.GradientTransformation:
    """scale_by_adam whose moments rest in `dtype`, whatever the parameters' is; all arithmetic is float32."""
    dtype = jnp.dtype(dtype)

    def cast(state, dtype):
        return state._replace(mu=optax.tree.cast(state.mu, dtype), nu=optax.tree.cast(state.nu, dtype))

    def init(params):
        return cast(adam.init(params), dtype)

    def update(grads, state, params=None):
        updates, new = adam.update(optax.tree.cast(grads, jnp.float32), cast(state, jnp.float32), params)
        if dtype == jnp.bfloat16:
            moments, tree = jax.tree.flatten((new.mu, new.nu))
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.count), len(moments))
            moments = [_round_stochastically(k, x) for k, x in zip(keys, moments, strict=True)]
            mu, nu = jax.tree.unflatten(tree, moments)
            new = new._replace(mu=mu, nu=nu)
        return updates, cast(new, dtype)

    return optax.GradientTransformation(init, update)


def _round_stochastically(key, x):
    """float32 -> bfloat16, up or down with the probabilities that make the expectation exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def add_updates(params, updates, step):
    """params + updates in the dtype of params. bfloat16 ones are rounded stochastically, as moments are: a step of 1e-6
    is far below half the distance of two bfloat16 neighbours, so rounding to nearest would never change a parameter."""

    def add(i, p, u):
        total = p.astype(jnp.float32) + u
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), step), i)
        return _round_stochastically(key, total) if p.dtype == jnp.bfloat16 else total.astype(p.dtype)

    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten([add(i, *pair) for i, pair in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))])


# --- creation ---------------------------------------------------------------------------------------------------


def fresh_state(params, optimizer: Optimizer) -> TrainState:
    """The state before the first update. params: float arrays, or shapes under jax.eval_shape."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.transform.init(params), zero, zero)


def abstract_state(config: DecoderConfig, optimizer: Optimizer, mesh: Mesh, *, rules: dict | None = None,
                   param_dtype=jnp.float32, lora: LoRA | None = None) -> TrainState:
    """TrainState of jax.ShapeDtypeStruct with shardings: what `preflight` lowers with and checkpoints restore to.

    lora: train these adapters, not the whole model. Moments lie as their parameters do, on the host if the optimizer
    is offloaded. Raises UserError if a dimension does not divide by its mesh axis.
    """
    params, specs = abstract_adapters(config, lora, param_dtype) if lora else abstract_params(config, param_dtype)
    params = placed(mesh, config, params, specs, rules)
    by_path = {jax.tree_util.keystr(path): x.sharding for path, x in jax.tree_util.tree_leaves_with_path(params)}
    state = jax.eval_shape(lambda p: fresh_state(p, optimizer), params)

    def place(path, leaf):
        tails = (jax.tree_util.keystr(path[i:]) for i in range(len(path)))
        sharding = next((by_path[t] for t in tails if t in by_path), None)
        if sharding and optimizer.offload and path[0].name == "opt_state":
            sharding = sharding.with_memory_kind(HOST)
        sharding = sharding or replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def placed(mesh: Mesh, config: DecoderConfig, shapes, specs, rules: dict | None = None):
    """Shapes with the shardings that their logical PartitionSpecs mean on the mesh."""
    rules = rules or logical_rules(mesh, config.num_kv_heads, config.vocab_size)
    where = shardings(mesh, specs, rules, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def sharding_of(tree):
    """The tree of shardings of a tree of (abstract) arrays."""
    return jax.tree.map(lambda x: x.sharding, tree)


def on_device(tree, shardings):
    """The tree with what rests in host memory copied to the device. shardings: where each array rests."""

    def one(x, sharding):
        return jax.device_put(x, sharding.with_memory_kind("device")) if sharding.memory_kind == HOST else x

    return jax.tree.map(one, tree, shardings)


def on_host(tree, shardings):
    """The inverse of `on_device`."""
    return jax.tree.map(lambda x, s: jax.device_put(x, s) if s.memory_kind == HOST else x, tree, shardings)


def init_state(config: DecoderConfig, optimizer: Optimizer, mesh: Mesh, key=None, *, params=None,
               rules: dict | None = None, param_dtype=jnp.float32, lora: LoRA | None = None) -> TrainState:
    """A fresh TrainState, every array created where it lives: no host and no device ever holds all of it.

    Give `key` for random parameters (the same on every mesh) or `params`, already in shards (see
    models.weights.load_params); the caller must not use `params` afterwards. lora: they are these adapters.
    """
    target = sharding_of(abstract_state(config, optimizer, mesh, rules=rules, param_dtype=param_dtype, lora=lora))
    if params is None:
        init = functools.partial(init_adapters, config, lora) if lora else functools.partial(init_params, config)
        make = jax.jit(lambda key: fresh_state(init(key, param_dtype), optimizer), out_shardings=target)
        return make(key)
    return jax.jit(lambda p: fresh_state(p, optimizer), out_shardings=target, donate_argnums=0)(params)
