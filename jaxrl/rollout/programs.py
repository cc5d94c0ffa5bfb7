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
from models.attention import from_blocks, to_blocks
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
class SamplingArrays:
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


class SamplerPrograms(NamedTuple):
    """The pool's cache may hold its keys in blocks (see models.attention.to_blocks); prompt caches do not.

    prefill(params, tokens [n, P], lengths [n]) -> prompt caches, the `arrays` of a Cache of P columns, right-aligned.
    insert(array, prompts, source int32 [B], chosen bool [B], end) -> array with prompt rows copied to the
      columns before `end`; donates the array.
    rebase(array, rows int32 [B'] | None, shift, window) -> array of B' rows and another window, whose
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


@functools.lru_cache(maxsize=8)  # samplers after each other in one process share what is traced and compiled
def sampler_programs(
    config: DecoderConfig,
    dtype,
    chunk: int,
    attention: str = "xla",
    cache_sharding=None,
    platform: str | None = None,
    cache_dtype=None,
) -> SamplerPrograms:
    """Sampler programs for parameters in `models.layout.sampling_layout`.

    Args:
      dtype: compute dtype. chunk: most decode steps of one call (the width of its output).
      attention: implementation for the prefill and score. cache_sharding: NamedSharding of the [B, K, ...] cache
        arrays, or None.
      cache_dtype: of keys and values, default `dtype`; int8 adds scales (see models.decoder.Cache).
      platform: "cpu", "gpu" or "tpu", default the one jax runs on. On a CPU keys are stored in blocks,
        because its kernels transpose operands slowly; `sampling_layout(untie=True)` is for the same reason.
    """
    platform = platform or jax.default_backend()
    on_cpu = platform == "cpu"
    cache_dtype = cache_dtype or dtype
    model = Decoder(config, dtype=dtype, scan_layers=False, attention=attention)

    def place(array):
        return array if cache_sharding is None else lax.with_sharding_constraint(array, cache_sharding)

    def prefill(params, tokens, lengths):
        n, P = tokens.shape
        cache = empty_cache(config, n, P, cache_dtype).replace(start=P - lengths)
        positions = jnp.maximum(jnp.arange(P)[None] - (P - lengths)[:, None], 0)
        return model.apply({"params": params}, tokens, positions, None, cache)[1].arrays

    def insert(array, prompts, source, chosen, end):
        P = prompts.shape[2]
        if array.ndim == 5:  # the blocks that hold these columns, as columns
            n = array.shape[4]
            blocks = min((P + n - 2) // n + 1, array.shape[2])
            first = jnp.minimum((end - P) // n, array.shape[2] - blocks)
            part = from_blocks(lax.dynamic_slice_in_dim(array, first, blocks, 2))
            part = to_blocks(insert(part, prompts, source, chosen, end - first * n), n)
            return place(lax.dynamic_update_slice_in_dim(array, part, first, 2))
        old = lax.dynamic_slice_in_dim(array, end - P, P, 2)
        new = jnp.where(jnp.expand_dims(chosen, range(1, array.ndim)), prompts[source], old)
        return place(lax.dynamic_update_slice_in_dim(array, new, end - P, 2))

    def rebase(array, rows, shift, window):
        array = array if rows is None else array[rows]
        if array.ndim == 5:
            return place(to_blocks(rebase(from_blocks(array), None, shift, window)))
        sides = [(window, window) if i == 2 else (0, 0) for i in range(array.ndim)]
        return place(lax.dynamic_slice_in_dim(jnp.pad(array, sides), window + shift, window, 2))

    def new_cache(rows, window):
        cache = empty_cache(config, rows, window, cache_dtype, key_blocks=on_cpu)
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
        is_end = jnp.any(jnp.arange(config.vocab_size)[:, None] == knobs.eos, axis=-1)  # [V]
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
            z = jnp.where((rows.count + i < rows.min_count)[:, None] & is_end, -jnp.inf, z)
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
    return SamplerPrograms(
        prefill=jax.jit(prefill),
        insert=jax.jit(insert, donate_argnums=0),
        rebase=jax.jit(rebase, static_argnames="window"),
        decode=jax.jit(decode, donate_argnums=1, compiler_options=options),
        new_cache=jax.jit(new_cache, static_argnums=(0, 1)),
        keys=jax.jit(sample_keys),
        score=jax.jit(score),
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
