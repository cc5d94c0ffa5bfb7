"""The jitted programs of the sampler, built by a function of (config, dtype, chunk); nothing runs here.

All rows of the pool share one clock: column `end` of the cache is where every row writes next, and row b
owns the columns [end - used[b], end). A decode step is then one contiguous write for the whole pool, and
moving rows to another window is one uniform shift.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.rollout.sampling import draw, sample_keys, uniforms
from models.config import DecoderConfig
from models.decoder import Decoder, empty_cache, logits

log = logging.getLogger(__name__)

# Without it the TPU compiler moves whole layers of the cache to vector memory for the one column that a step writes,
# and back: a third more bytes a step. What is used less often than it is moved stays where it is.
TPU_OPTIONS = {"xla_tpu_msa_inefficient_use_to_copy_ratio": "0.75"}


@flax.struct.dataclass
class Rows:
    """What a decode chunk needs to know of each row; [B] each.

    token: int32, last token, not yet in the cache. used: int32, cached columns, also the position of
    `token`. count: int32, response tokens so far. limit: int32, response tokens allowed. active: bool.
    keys: uint32 [B, 2], from sample_keys. min_count: int32, tokens before an end token may be drawn.
    """

    token: Any
    used: Any
    count: Any
    limit: Any
    active: Any
    keys: Any
    min_count: Any


@flax.struct.dataclass
class Knobs:
    """Sampling settings, traced: changing them compiles nothing (top_k etc. None or not is one switch).

    temperature, top_p, min_p: float32 []. top_k: int32 []. eos: int32 [E], padded with -1.
    bias: float32 [V] added to the logits, or None.
    """

    temperature: Any
    eos: Any
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    bias: Any = None


class Programs(NamedTuple):
    """`axis` below is the cache array's column axis: 2, or 3 for keys stored by column (`key_axis`).

    prefill(params, tokens [n, P], lengths [n]) -> prompt caches, the `arrays` of a Cache of P columns, right-aligned.
    insert(array, prompts, source int32 [B], chosen bool [B], end, axis) -> array with prompt rows copied to the
      columns before `end`; donates the array.
    rebase(array, rows int32 [B'] | None, shift, window, axis) -> array of B' rows and another window, whose
      column c is column c + shift of the old one. One layer at a time, so a move never doubles the cache.
    decode(params, cache, rows, knobs, steps, refill_at) -> (cache, tokens [chunk, B], logps, emitted [B]).
    new_cache(rows, window) -> zeroed cache. keys(seed, step, problem [B], sample [B]) -> uint32 [B, 2].
    score(params, tokens [n, P]) -> log-probs [n, P-1] of tokens[:, 1:] under softmax(logits).
    """

    prefill: Any
    insert: Any
    rebase: Any
    decode: Any
    new_cache: Any
    keys: Any
    score: Any
    key_axis: int


@functools.lru_cache(maxsize=8)  # samplers after each other in one process share what is traced and compiled
def build_programs(
    config: DecoderConfig,
    dtype,
    chunk: int,
    attention: str = "xla",
    fused: bool = True,
    cache_sharding=None,
    platform: str | None = None,
    cache_dtype=None,
) -> Programs:
    """Sampler programs for parameters in `models.decoder.sampling_layout`.

    Args:
      dtype: compute dtype. chunk: most decode steps of one call (the width of its output).
      attention: implementation for the prefill and score. fused: whether the parameters are (see
        sampling_layout). cache_sharding: NamedSharding of the [B, K, ...] cache arrays, or None.
      cache_dtype: of keys and values, default `dtype`; int8 adds scales (see models.decoder.Cache).
      platform: "cpu", "gpu" or "tpu", default the one jax runs on. On a CPU keys are stored by column,
        because its kernels transpose operands slowly; `sampling_layout(untie=True)` is for the same reason.
    """
    platform = platform or jax.default_backend()
    on_cpu = platform == "cpu"
    key_axis = 3 if on_cpu else 2
    cache_dtype = cache_dtype or dtype
    model = Decoder(
        config, dtype=dtype, scan_layers=False, fused=fused, attention=attention, key_columns=on_cpu
    )

    def place(array):
        return array if cache_sharding is None else lax.with_sharding_constraint(array, cache_sharding)

    def prefill(params, tokens, lengths):
        n, P = tokens.shape
        cache = empty_cache(config, n, P, cache_dtype, key_columns=on_cpu).replace(start=P - lengths)
        positions = jnp.maximum(jnp.arange(P)[None] - (P - lengths)[:, None], 0)
        return model.apply({"params": params}, tokens, positions, None, cache)[1].arrays

    def insert(array, prompts, source, chosen, end, axis):
        P = prompts.shape[axis]
        old = lax.dynamic_slice_in_dim(array, end - P, P, axis)
        new = jnp.where(jnp.expand_dims(chosen, range(1, array.ndim)), prompts[source], old)
        return place(lax.dynamic_update_slice_in_dim(array, new, end - P, axis))

    def rebase(array, rows, shift, window, axis):
        array = array if rows is None else array[rows]
        sides = [(window, window) if i == axis else (0, 0) for i in range(array.ndim)]
        return place(lax.dynamic_slice_in_dim(jnp.pad(array, sides), window + shift, window, axis))

    def new_cache(rows, window):
        cache = empty_cache(config, rows, window, cache_dtype, key_columns=on_cpu)
        return cache.with_arrays(jax.tree.map(place, cache.arrays))

    def score(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model.apply({"params": params}, tokens, positions)[0]

        def one(pair):  # a column at a time: never [n, P, V]
            h, target = pair
            z = logits(params, h)
            picked = jnp.take_along_axis(z, target[:, None], axis=-1)[:, 0]
            return picked - jax.nn.logsumexp(z, axis=-1)

        return lax.map(one, (hidden[:, :-1].swapaxes(0, 1), tokens[:, 1:].T)).T

    def decode(params, cache, rows, knobs, steps, refill_at):
        B = rows.token.shape[0]
        cache = cache.replace(start=cache.end - rows.used)
        spread = functools.partial(jnp.broadcast_to, shape=(B,))
        truncation = {}
        if knobs.top_k is not None:
            truncation = {n: spread(getattr(knobs, n)) for n in ("top_k", "top_p", "min_p")}
        is_eos = lambda token: jnp.any(token[:, None] == knobs.eos[None], axis=-1)  # noqa: E731

        def cond(carry):
            i, _, _, done, *_ = carry
            finished = jnp.sum(done & rows.active)
            return (i < steps) & (finished < refill_at) & ~jnp.all(done)

        def body(carry):
            i, cache, token, done, emitted, tokens, logps = carry
            position = (rows.used + i)[:, None]
            hidden, cache = model.apply({"params": params}, token[:, None], position, None, cache)
            z = logits(params, hidden[:, 0])
            if knobs.bias is not None:
                z = z + knobs.bias
            z = _hold_back_eos(z, knobs.eos, rows.count + i < rows.min_count)
            u = uniforms(rows.keys, rows.count + i)
            token, logp = draw(z, u, spread(knobs.temperature), **truncation)
            tokens = lax.dynamic_update_slice(tokens, token[None], (i, 0))
            logps = lax.dynamic_update_slice(logps, logp[None], (i, 0))
            emitted = jnp.where(done, emitted, i + 1)
            done = done | is_eos(token) | (rows.count + i + 1 >= rows.limit)
            return i + 1, cache, token, done, emitted, tokens, logps

        start = (
            jnp.zeros((), jnp.int32),
            cache,
            rows.token,
            ~rows.active,
            jnp.zeros((B,), jnp.int32),
            jnp.zeros((chunk, B), jnp.int32),
            jnp.zeros((chunk, B), jnp.float32),
        )
        _, cache, _, _, emitted, tokens, logps = lax.while_loop(cond, body, start)
        cache = cache.with_arrays(jax.tree.map(place, cache.arrays))
        return cache, tokens, logps, emitted

    options = None
    if platform == "tpu":
        devices = jax.local_devices() if cache_sharding is None else cache_sharding.device_set
        options = known_options(tuple(TPU_OPTIONS.items()), next(iter(devices)))
    return Programs(
        prefill=jax.jit(prefill),
        insert=jax.jit(insert, donate_argnums=0, static_argnames="axis"),
        rebase=jax.jit(rebase, static_argnames=("window", "axis")),
        decode=jax.jit(decode, donate_argnums=1, compiler_options=options),
        new_cache=jax.jit(new_cache, static_argnums=(0, 1)),
        keys=jax.jit(sample_keys),
        score=jax.jit(score),
        key_axis=key_axis,
    )


@functools.cache
def known_options(options: tuple[tuple[str, str], ...], device) -> dict[str, str]:
    """Those of the compiler `options` that the compiler of `device` has: they differ between versions of libtpu.

    Each other one is logged as a warning. Raises JaxRuntimeError for a value that an option cannot have.
    """
    known = {}
    for name, value in options:
        x = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
        try:
            jax.jit(lambda x: x + 1).lower(x).compile(compiler_options={name: value})
            known[name] = value
        except jax.errors.JaxRuntimeError as e:
            if "No such compile option" not in str(e):
                raise
            log.warning("sampler: this compiler has no option %s; decoding will read the cache more often", name)
    return known


def _hold_back_eos(z, eos, held):
    """Set the end tokens' logits to -inf in the rows where `held`; z: [B, V], held: bool [B]."""

    def mask(z):
        column = jnp.any(jnp.arange(z.shape[-1])[:, None] == eos[None], axis=-1)
        return jnp.where(held[:, None] & column[None], -jnp.inf, z)

    return lax.cond(jnp.any(held), mask, lambda z: z, z)
