"""What the sampler computes, as functions of arrays: prefill, decode, score, and moves of the caches.

Nothing here knows of requests, slots or the engine. All rows of a dense cache share one clock: column `end` is where
every row writes next, and row b owns the columns [end - used[b], end). A decode step is then one contiguous write for
all rows, and moving them to another window is one uniform shift.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.rollout.sampling import draw, uniforms
from models.attention import from_blocks, resolve_implementation, to_blocks
from models.config import DecoderConfig
from models.decoder import AUXILIARY, Decoder, empty_cache, logits
from models.pages import empty_pages, local_layers, side_by_side


@flax.struct.dataclass
class Rows:
    """What a decode call needs to know of each row; [B] each.

    token: int32, last token, not yet in the cache. used: int32, cached columns, also the position of
    `token`. count: int32, response tokens so far. limit: int32, response tokens allowed. active: bool.
    keys: uint32 [B, 2], from sample_keys. min_count: int32, tokens before an EOS token may be drawn.
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
    """SamplingParams as the decode program takes them, traced: changing a value compiles nothing.

    temperature, top_p, min_p: float32 []. top_k: int32 []. top_k, top_p and min_p are None together. eos: int32 [E].
    bias: float32 [V] added to the logits, or None. allowed: bool [V], tokens that may be drawn, or None for all.
    """

    temperature: Any
    eos: Any
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    bias: Any = None
    allowed: Any = None


@dataclasses.dataclass(frozen=True)
class ProgramSpec:
    """What the programs of a sampler depend on; hashable.

    dtype: compute dtype. chunk: maximum decode steps of one call (the length of its output). platform: "cpu", "gpu" or
    "tpu". sharding: NamedSharding of the arrays of the cache, or None. int8_cache: keys and values of one
    byte, with scales. pages: tokens per page; 0: the cache is dense. record: what decoding returns for each token
    besides its log-prob: "kept" (the set it was drawn from, see sampling.kept_set), "experts" (those of the preceding
    token, from which this one was predicted: unsigned [L, k], counted from 1).
    """

    config: DecoderConfig
    dtype: Any
    chunk: int
    platform: str
    sharding: Any = None
    int8_cache: bool = False
    pages: int = 0
    record: tuple[str, ...] = ()

    @property
    def model(self) -> Decoder:
        attention = resolve_implementation("auto", self.platform)
        return Decoder(self.config, dtype=self.dtype, scan_layers=False, attention=attention)

    @property
    def cache_dtype(self):
        return jnp.int8 if self.int8_cache else self.dtype

    def place(self, array):
        """A cache array, placed as the sharding says."""
        return array if self.sharding is None else lax.with_sharding_constraint(array, self.sharding)


def prefill(spec: ProgramSpec, params, tokens, lengths, arrays=None, *, first: int = 0, size: int = 0):
    """The `arrays` of a Cache of P columns, prompts right-aligned. tokens: int32 [n, P]; lengths: int32 [n].

    arrays: those of the earlier chunks, with the columns before `first` cached; None for new ones. size: columns to
    cache now, 0 for all.
    """
    n, P = tokens.shape
    end = first + (size or P)
    cache = empty_cache(spec.config, n, P, spec.cache_dtype).replace(start=P - lengths, end=jnp.int32(first))
    cache = cache if arrays is None else cache.with_arrays(arrays)
    column = jnp.arange(end)[None] - (P - lengths)[:, None]
    # A CPU has no attention kernel: without segments, the prompts attend to their keys and values in the cache.
    segments = None if spec.platform == "cpu" else (column >= 0).astype(jnp.int32)
    inputs = tokens[:, first:end], jnp.maximum(column[:, first:], 0)
    return spec.model.apply({"params": params}, *inputs, segments, cache)[1].arrays


def score(spec: ProgramSpec, params, tokens):
    """float32 [n, P-1]: log-probs of tokens[:, 1:] under softmax(logits). tokens: int32 [n, P]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = spec.model.apply({"params": params}, tokens, positions)[0]

    def one(pair):  # one column at a time, so that no [n, P, V] array is made
        h, target = pair
        z = logits(params, h, spec.config.narrow)
        picked = jnp.take_along_axis(z, target[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(z, axis=-1)

    return lax.map(one, (hidden[:, :-1].swapaxes(0, 1), tokens[:, 1:].T)).T


def decode(spec: ProgramSpec, params, cache, rows: Rows, settings: SamplingArrays, steps, refill_at):
    """Decode until `steps` steps are done, `refill_at` rows have finished, or all have.

    Returns (cache, tokens int32 [chunk, B], log-probs float32 [chunk, B], emitted int32 [B]: how many of them are
    valid, columns: what `spec.record` names, name -> [chunk, B, ...]).
    """
    B = rows.token.shape[0]
    cache = cache.begin(rows.used)
    eos_column = jnp.any(jnp.arange(spec.config.vocab_size)[:, None] == settings.eos, axis=-1)  # [V]

    def going_on(carry):
        i, _, _, done, *_ = carry
        finished = jnp.sum(done & rows.active)
        return (i < steps) & (finished < refill_at) & ~jnp.all(done)

    def one_step(carry):
        i, cache, token, done, emitted, tokens, logps, columns = carry
        hidden, cache, experts = _forward(spec, params, token, rows.used + i, cache)
        z = logits(params, hidden[:, 0], spec.config.narrow)
        token, logp, found = _draw(z, rows, rows.count + i, settings, eos_column, record="kept" in spec.record)
        found |= experts
        tokens = lax.dynamic_update_slice(tokens, token[None], (i, 0))
        logps = lax.dynamic_update_slice(logps, logp[None], (i, 0))
        columns = {k: lax.dynamic_update_index_in_dim(v, found[k], i, 0) for k, v in columns.items()}
        emitted = jnp.where(done, emitted, i + 1)
        is_eos = jnp.any(token[:, None] == settings.eos[None], axis=-1)
        done = done | is_eos | (rows.count + i + 1 >= rows.limit)
        return i + 1, cache, token, done, emitted, tokens, logps, columns

    zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
    tokens, logps = zeros((spec.chunk, B)), jnp.zeros((spec.chunk, B), jnp.float32)
    columns = {k: logps for k in ("kept", "least") if "kept" in spec.record}
    if "experts" in spec.record:
        shape = spec.chunk, B, spec.config.num_layers, spec.config.experts_per_token
        columns["experts"] = jnp.zeros(shape, expert_dtype(spec.config))
    start = (zeros(()), cache, rows.token, ~rows.active, zeros((B,)), tokens, logps, columns)
    _, cache, _, _, emitted, tokens, logps, columns = lax.while_loop(going_on, one_step, start)
    cache = cache.with_arrays(jax.tree.map(spec.place, cache.arrays))
    return cache, tokens, logps, emitted, columns


def expert_dtype(config: DecoderConfig):
    """The smallest unsigned type that holds an expert counted from 1."""
    return jnp.uint8 if config.num_experts < 256 else jnp.uint16


def _forward(spec: ProgramSpec, params, token, position, cache):
    """(hidden, cache, what is recorded of the layers) of one step; token, position: int32 [B]."""
    arguments = {"params": params}, token[:, None], position[:, None], None, cache
    if "experts" not in spec.record:
        return *spec.model.apply(*arguments), {}
    (hidden, cache), found = spec.model.apply(*arguments, mutable=[AUXILIARY])
    layers = [found[AUXILIARY][f"layer_{i}"]["mlp"]["experts"][:, 0] for i in range(spec.config.num_layers)]
    return hidden, cache, {"experts": (jnp.stack(layers, axis=1) + 1).astype(expert_dtype(spec.config))}


def _draw(z, rows: Rows, position, settings: SamplingArrays, eos_column, *, record: bool):
    """One token a row from logits z [B, V] at response positions [B], its log-prob, and what is recorded of it."""
    spread = functools.partial(jnp.broadcast_to, shape=position.shape)
    truncation = {}
    if settings.top_k is not None:
        truncation = {n: spread(getattr(settings, n)) for n in ("top_k", "top_p", "min_p")}
    if settings.bias is not None:
        z = z + settings.bias
    z = jnp.where((position < rows.min_count)[:, None] & eos_column, -jnp.inf, z)
    u = uniforms(rows.keys, position)
    token, logp, *found = draw(
        z, u, spread(settings.temperature), allowed=settings.allowed, record=record, **truncation)
    return token, logp, found[0] if found else {}


# ---------------------------------------------------------------------------------------- arrays of the dense cache


def new_cache(spec: ProgramSpec, rows: int, window: int):
    """A zeroed models.decoder.Cache. On a CPU keys are in blocks (models.attention.to_blocks), as its kernels are
    slow at transposing operands."""
    cache = empty_cache(spec.config, rows, window, spec.cache_dtype, key_blocks=spec.platform == "cpu")
    return cache.with_arrays(jax.tree.map(spec.place, cache.arrays))


def write_prompts(spec: ProgramSpec, array, prompts, source, chosen, end):
    """The array with row source[b] of `prompts` [n, K, P, ...] in the columns before `end` of every chosen row b.

    source: int32 [B]. chosen: bool [B]. The array may be in blocks, prompts are not.
    """
    P = prompts.shape[2]
    if array.ndim == 5:  # the blocks that hold these columns, as columns
        n = array.shape[4]
        blocks = min((P + n - 2) // n + 1, array.shape[2])
        first = jnp.minimum((end - P) // n, array.shape[2] - blocks)
        part = from_blocks(lax.dynamic_slice_in_dim(array, first, blocks, 2))
        part = to_blocks(_write_columns(part, prompts, source, chosen, end - first * n), n)
        return spec.place(lax.dynamic_update_slice_in_dim(array, part, first, 2))
    return spec.place(_write_columns(array, prompts, source, chosen, end))


def _write_columns(array, prompts, source, chosen, end):
    P = prompts.shape[2]
    old = lax.dynamic_slice_in_dim(array, end - P, P, 2)
    new = jnp.where(jnp.expand_dims(chosen, range(1, array.ndim)), prompts[source], old)
    return lax.dynamic_update_slice_in_dim(array, new, end - P, 2)


def resize(spec: ProgramSpec, array, rows, shift, window: int):
    """An array of the rows int32 [B'] (None: all) and another window, whose column c is column c + shift of the old.

    One layer at a time, so that a move never doubles the cache.
    """
    array = array if rows is None else array[rows]
    if array.ndim == 5:
        return spec.place(to_blocks(_move_columns(from_blocks(array), shift, window)))
    return spec.place(_move_columns(array, shift, window))


def _move_columns(array, shift, window: int):
    sides = [(window, window) if i == 2 else (0, 0) for i in range(array.ndim)]
    return lax.dynamic_slice_in_dim(jnp.pad(array, sides), window + shift, window, 2)


# ---------------------------------------------------------------------------------------- arrays of the paged cache


def new_pages(spec: ProgramSpec, count: int, local: int):
    """The arrays of models.pages.Pages, zeroed: `count` pages of all replicas together, or `local` in local_layers."""
    return jax.tree.map(spec.place, empty_pages(spec.config, count, spec.pages, spec.cache_dtype, local))


def write_pages(spec: ProgramSpec, arrays, prompts, writes, local=None):
    """The arrays of the pool with pages taken from prefilled prompts.

    prompts: from `prefill`. writes: (source, first, target), int32 [n] each: page target[i] gets the columns of row
    source[i] from first[i] on; the part of a page behind the last column is filled by later steps. On a mesh n is split
    over the replicas. local: the writes of local_layers, or None if there are none.
    """
    k, v, *scales = prompts
    pairs = [(k, v), tuple(scales)] if scales else [(k, v)]

    def taken(x, source, first):  # [rows, K, columns, ...] -> [n, page, K, ...]
        columns = jnp.minimum(first[:, None] + jnp.arange(spec.pages), x.shape[2] - 1)
        return x[source[:, None], :, columns]

    def write(pool, new, target):
        return pool.at[target].set(new.astype(pool.dtype))

    if spec.sharding is not None:
        where = spec.sharding.spec
        specs = (where, where, type(where)(where[0]))
        write = jax.shard_map(write, mesh=spec.sharding.mesh, in_specs=specs, out_specs=where, check_vma=False)

    def filled(pool, a, b, small: bool):
        *where, target = local if small else writes
        return write(pool, side_by_side(taken(a, *where), taken(b, *where), 2), target)

    layers = local_layers(spec.config)
    return tuple(
        tuple(filled(*layer) for layer in zip(pools, *pair, layers, strict=True))
        for pools, pair in zip(arrays, pairs, strict=True)
    )
