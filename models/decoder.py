"""The decoder of all families: a model is a DecoderConfig and the table of its weights.

One `Decoder.__call__` scores, trains, prefills and decodes, so the sampler and the learner cannot drift
apart. Dimensions: B rows, T tokens, D width, N query heads, K key-value heads, H head size, F MLP width,
V vocabulary, L layers, W cache window.

Parameters are plain pytrees; what there is of each is in the family's table (models/table.py). Layers are stacked
on axis 0 and scanned for training; models/layout.py turns the same parameters into the unrolled, fused form that
decoding wants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from models import cpu, moe
from models.attention import attend, attend_packed, to_blocks, write_keys
from models.config import DecoderConfig, LayerKind
from models.layout import quantise
from models.pages import Pages, Place, attend_pages
from models.rope import rope_frequencies
from models.table import BIAS, LORA_A, LORA_B, NORM, SCALE, TRANSPOSED, find, set_path, weights, whole_shape

AUXILIARY = "auxiliary"  # Flax collection of what layers return besides their output

ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": nn.gelu}
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class Cache:
    """Key-value cache whose rows are right-aligned: all rows share one clock.

    Column `end` is where every row writes next, so a decode step writes one contiguous slice for the
    whole batch instead of scattering; row b may attend to columns [start[b], end].

    k, v: one [B, K, W, H] array per layer (unrolled), or stacked [L, B, K, W, H] (scanned); with
      key_blocks, k is in the form of models.attention.to_blocks.
    start: int32 [B]. end: int32 [].
    scales: of int8 k and v (see `quantise`), float32 [B, K, W] in the same two lists; else empty.
    """

    k: Any
    v: Any
    start: jax.Array
    end: jax.Array
    scales: Any = ()

    @property
    def arrays(self) -> tuple:
        """(k, v) or (k, v, scales of k, scales of v), each by layer."""
        return self.k, self.v, *self.scales

    def with_arrays(self, arrays, **changes) -> Cache:
        """The cache with other `arrays`."""
        k, v, *scales = arrays
        return self.replace(k=k, v=v, scales=tuple(scales), **changes)

    def begin(self, used) -> Cache:
        """The cache whose row b owns the last used[b] columns. used: int32 [B]."""
        return self.replace(start=self.end - used)

    def stepped(self, arrays, steps: int) -> Cache:
        """The cache after `steps` more columns."""
        return self.with_arrays(arrays, end=self.end + steps)

    def sees(self, positions, window: int):
        """bool [B, T, W]: the columns that the queries at positions [B, T], written next, see; window 0: all."""
        column, last = jnp.arange(self.v[0].shape[-2]), self.end + jnp.arange(positions.shape[1])[:, None]
        mask = (column <= last)[None] & (column >= self.start[:, None, None])
        return mask & (column > last - window)[None] if window else mask


def empty_cache(
    config: DecoderConfig, rows: int, window: int, dtype, *, scan_layers: bool = False, key_blocks: bool = False
) -> Cache:
    """A zeroed cache of `rows` rows and `window` columns; every row starts at column 0. dtype: int8 adds scales."""
    L, shape = config.num_layers, (rows, config.num_kv_heads, window, config.head_dim)
    k_shape = jax.eval_shape(to_blocks, jax.ShapeDtypeStruct(shape, dtype)).shape if key_blocks else shape

    def zeros(shape, dtype):
        return jnp.zeros((L, *shape), dtype) if scan_layers else tuple(jnp.zeros(shape, dtype) for _ in range(L))

    scales = tuple(zeros(shape[:3], jnp.float32) for _ in "kv") if dtype == jnp.int8 else ()
    start, end = jnp.zeros((rows,), jnp.int32), jnp.zeros((), jnp.int32)
    return Cache(zeros(k_shape, dtype), zeros(shape, dtype), start, end, scales)


def apply_rope(x, sin, cos):
    """Rotary embedding in the half-split form, computed in float32. x: [B, T, N, H]; sin, cos: [B, T, 1, H/2]."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def rms_norm(x, scale, config: DecoderConfig):
    """RMSNorm over the last axis, computed in float32, returned in x's dtype."""
    y, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.rms_norm_eps)
    return (y * (1 + scale if config.norm_offset else scale)).astype(x.dtype)


class Transposed(NamedTuple):
    """A matrix [D, F] as its transpose [F, D]."""

    array: Any


def linear(x, w, narrow: bool = False):
    """x [..., D] times w [D, F], or times an int8 w with its float32 scales [F], or a `Transposed` one (see
    models.layout). narrow: both are rounded to bfloat16 first."""
    if isinstance(w, Transposed):
        return cpu.transposed_product(x, w.array).astype(x.dtype)
    product = cpu.narrow_product if narrow else cpu.product
    if isinstance(w, tuple):
        y = product(x, w[0].astype(x.dtype))
        return (y.astype(jnp.float32) * w[1]).astype(x.dtype)
    return product(x, w).astype(x.dtype)


def pick(kind, options):
    """The entry of `options` (trees of arrays) for a kind of layer: a traced int32 [], or None for the only one."""
    return options[0] if kind is None else jax.tree.map(lambda *cases: lax.select_n(kind, *cases), *options)


class Part(nn.Module):
    """A module whose parameters are the rows of the table (models/table.py) under its name."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    def raw(self, name: str):
        """Parameter `name` as it is stored; a new one is initialised as its row says."""
        row = find(self.config, self.name, name)
        if row is None:  # a fused parameter of the sampling layout; those are never initialised
            return self.get_variable("params", name)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        init = {NORM: zeros if self.config.norm_offset else ones, BIAS: zeros}
        init = init.get(row.kind, nn.initializers.normal(self.config.init_std))
        return self.param(name, init, row.shape, self.param_dtype)

    def weight(self, name: str):
        """Parameter `name` in the compute dtype; of an int8 matrix the pair (int8, float32 scales)."""
        if self.has_variable("params", name + TRANSPOSED):
            return Transposed(self.get_variable("params", name + TRANSPOSED).astype(self.dtype))
        w = self.raw(name)
        return (w, self.get_variable("params", name + SCALE)) if w.dtype == jnp.int8 else w.astype(self.dtype)

    def has(self, name: str) -> bool:
        """Whether the family has parameter `name` in this module."""
        return find(self.config, self.name, name) is not None

    def linear(self, x, *names: str) -> list:
        """x times each of these matrices, plus its bias if it has one; one product where they are fused."""
        rows = [find(self.config, self.name, name) for name in names]
        fused = rows[0].fused
        if fused and any(self.has_variable("params", fused + form) for form in ("", TRANSPOSED)):
            y = linear(x, self.weight(fused), self.config.narrow)
            if self.has(f"{names[0]}_bias"):
                y += self.weight(f"{fused}_bias")
            return jnp.split(y, np.cumsum([row.shape[-1] for row in rows])[:-1], axis=-1)
        out = [self.adapted(x, name) for name in names]
        bias = [f"{name}_bias" for name in names]
        return [y + self.weight(b) if self.has(b) else y for y, b in zip(out, bias, strict=True)]


    def adapted(self, x, name: str):
        """x times matrix `name`, and its adapters if there are any (models/lora.py)."""
        y = linear(x, self.weight(name), self.config.narrow)
        if not self.has_variable("params", name + LORA_A):
            return y
        a, b = (self.get_variable("params", name + half).astype(self.dtype) for half in (LORA_A, LORA_B))
        return y + self.config.lora_scale * linear(linear(x, a, self.config.narrow), b, self.config.narrow)


class RMSNorm(Part):
    """RMSNorm with a learned scale."""

    @nn.compact
    def __call__(self, x):
        """x: [..., D] -> the same."""
        return rms_norm(x, self.raw("scale"), self.config)


class Attention(Part):
    """Grouped-query attention with rotary positions, over packed rows or over a cache.

    implementation: see models.attention. kinds: those that the layer can be; `kind` says which (see `pick`).
    """

    implementation: str
    kinds: tuple[LayerKind, ...]

    @nn.compact
    def __call__(self, x, layer_cache, kind, views, segments, end):
        """x: [B, T, D] -> ([B, T, D], layer_cache). See Decoder.__call__ for the rest."""
        c, (B, T, _) = self.config, x.shape
        q, k, v = self.linear(x, "q", "k", "v")
        q, k = self.norm("q_norm", q), self.norm("k_norm", k)
        q, k, v = (a.reshape(B, T, -1, c.head_dim) for a in (q, k, v))
        sin, cos, mask = pick(kind, views)
        on_cpu = layer_cache is not None and layer_cache[0].ndim == 5  # keys in blocks
        rope = cpu.apply_rope if on_cpu else apply_rope
        q, k = rope(q, sin, cos), rope(k, sin, cos)
        if c.query_scale:  # attention itself divides by the root of the head size
            q = q * (c.query_scale * c.head_dim**0.5)
        if layer_cache is not None and not isinstance(mask, Place):
            layer_cache = write_cache(layer_cache, k, v, end)
        if isinstance(mask, Place):
            layer_cache, out = attend_pages(layer_cache, q, k, v, mask)
        elif segments[0] is not None:
            windows = tuple(kind.window for kind in self.kinds)
            ids, shared = segments
            if ids.shape[1] > T:
                k, v = read_cache(layer_cache, ids.shape[1], k.dtype)
            out = attend_packed(q, k, v, ids, self.implementation, windows=windows, kind=kind, shared=shared)
        else:
            keys, values, *scales = layer_cache
            out = attend(q, keys, values, mask, scales)
        (out,) = self.linear(out.reshape(B, T, -1), "o")
        return out, layer_cache

    def norm(self, name: str, x):
        """x [B, T, N * H] with each head normalised, if the family does that."""
        if not self.has(name):
            return x
        scale = self.weight(name)
        return rms_norm(x.reshape(*x.shape[:2], -1, *scale.shape), scale, self.config).reshape(x.shape)


def write_cache(layer_cache, k, v, end):
    """A layer's cache arrays with k and v [B, T, K, H] in columns [end, end + T)."""
    keys, values, *scales = layer_cache
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if scales:
        (k, of_k), (v, of_v) = quantise(k, -1), quantise(v, -1)
        scales = [lax.dynamic_update_slice(s, n, (0, 0, end)) for s, n in zip(scales, (of_k, of_v), strict=True)]
    keys = write_keys(keys, k.astype(keys.dtype), end)
    values = lax.dynamic_update_slice(values, v.astype(values.dtype), (0, 0, end, 0))
    return keys, values, *scales


def read_cache(layer_cache, columns: int, dtype):
    """(k, v), each [B, columns, K, H], of a layer's cache arrays, keys not in blocks, from column 0 on."""
    k, v, *scales = (a[:, :, :columns] for a in layer_cache)
    if scales:
        k, v = (a.astype(jnp.float32) * s[..., None] for a, s in zip((k, v), scales, strict=True))
    return [a.astype(dtype).swapaxes(1, 2) for a in (k, v)]


class MLP(Part):
    """SwiGLU, or GeGLU: a gated MLP."""

    @nn.compact
    def __call__(self, x):
        """x: [..., D] -> [..., D]."""
        gate, up = self.linear(x, "gate", "up")
        return self.linear(ACTIVATIONS[self.config.activation](gate) * up, "down")[0]


class MoE(Part):
    """A mixture of experts in place of the MLP (models/moe.py). Sows the experts' load into AUXILIARY; without
    segment_ids (decoding) also the chosen experts."""

    @nn.compact
    def __call__(self, x, segment_ids, replayed):
        """x: [B, T, D] -> [B, T, D]; segment_ids: of packed rows whose last T tokens are x, 0 is padding; or None.
        replayed: see moe.route."""
        c = self.config
        logits = linear(x, self.weight("router"))
        probabilities, weights, experts = moe.route(logits, c.experts_per_token, c.normalise_experts, replayed)
        live = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids[:, -x.shape[1] :] > 0
        self.sow(AUXILIARY, "load", moe.balance(probabilities, experts, live), reduce_fn=lambda _, new: new)
        if segment_ids is None:
            self.sow(AUXILIARY, "experts", experts, reduce_fn=lambda _, new: new)
        if self.has_variable("params", "experts_gate_up"):
            gate_up = self.weight("experts_gate_up")
        else:
            gate_up = self.weight("experts_gate"), self.weight("experts_up")
        weights = weights.astype(x.dtype)
        return moe.apply_experts(x, weights, experts, gate_up, self.weight("experts_down"), ACTIVATIONS[c.activation])


class Block(nn.Module):
    """One layer: attention and MLP, each behind its norm. Fields as in Attention."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    implementation: str
    kinds: tuple[LayerKind, ...]

    @nn.compact
    def __call__(self, x, layer, views, segments, end):
        """x: [B, T, D]; layer: (its cache arrays or None, its kind or None, experts to replay or None) -> (x, layer's
        cache)."""
        fields = (self.config, self.dtype, self.param_dtype)

        def norm(name, x):  # which norms a layer has is in the family's table
            return RMSNorm(*fields, name=name)(x) if find(self.config, name, "scale") else x

        layer_cache, kind, replayed = layer
        attention = Attention(*fields, self.implementation, self.kinds, name="attn")
        h, layer_cache = attention(norm("attn_norm", x), layer_cache, kind, views, segments, end)
        x = nn.with_logical_constraint(x + norm("attn_post_norm", h), ("batch", "seq", "act_embed"))
        h = norm("mlp_norm", x)
        experts = self.config.num_experts
        h = MoE(*fields, name="mlp")(h, segments[0], replayed) if experts else MLP(*fields, name="mlp")(h)
        return nn.with_logical_constraint(x + norm("mlp_post_norm", h), ("batch", "seq", "act_embed")), layer_cache


class Decoder(nn.Module):
    """The transformer up to its final norm; `logits` and the fused log-probs apply the head.

    dtype: compute dtype. param_dtype: dtype of newly initialised parameters. remat: key of REMAT_POLICIES,
    what the backward pass recomputes per layer. attention: see models.attention. scan_layers: parameters are the
    training tree, else those of models.layout.sampling_layout, fused or not.
    Losses and counts of a layer besides its output are sown into the collection AUXILIARY, stacked by layer.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    scan_layers: bool = True

    @nn.compact
    def __call__(self, tokens, positions, segment_ids=None, cache: Cache | Pages | None = None, parents=None,
                 experts=None):
        """Hidden states of every position.

        Args:
          tokens: int32 [B, T]. positions: int32 [B, T], position of each token in its own sequence.
          segment_ids: int32 [B, T] for packed rows; attention is causal within equal ids, 0 is padding. None
            means one sequence per row. With a cache: int32 [B, end + T], of its first `end` columns and of these
            tokens. Attention then reads only these columns, so that a fused kernel can be used; end is 0 if they
            have length T.
          parents: int32 [B, T], with segment_ids: the id of one more segment that a token sees, 0 for none.
          cache: tokens are written to columns [end, end + T); row b sees columns from start[b] on. Pages: T = 1.
          experts: unsigned [B, T, L, k], the experts to replay in each layer (models.moe.route), or None.

        Returns:
          (hidden [B, T, D] in `dtype`, after the final norm; the updated cache or None).
        """
        c, (B, T) = self.config, tokens.shape
        parts = (c, self.dtype, self.param_dtype)
        x = jnp.take(self._table("embed", "embedding"), tokens, axis=0).astype(self.dtype)
        if c.scale_embeddings:
            x = x * jnp.asarray(c.hidden_size**0.5, self.dtype)
        # On a mesh, each device looks up its columns of the table for all rows; then devices exchange columns
        # for rows. The other way round would gather the table, and its gradient, on every device.
        x = nn.with_logical_constraint(x, ("lookup_batch", None, "embed"))
        x = nn.with_logical_constraint(x, ("batch", "seq", "act_embed"))
        if cache is None and segment_ids is None:
            segment_ids = jnp.ones((B, T), jnp.int32)
        segments = (segment_ids, None if parents is None else (parents, positions))
        views = [self._view(kind, positions, cache) for kind in c.kinds]
        layers, end = (None, None) if cache is None else (cache.arrays, cache.end)
        block = Block
        if REMAT_POLICIES[self.remat] is not None:
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        if self.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, AUXILIARY: 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.num_layers,
            )
            which = jnp.array(c.kind_of_layer, jnp.int32) if len(views) > 1 else None
            scanned = scanned(*parts, self.attention, c.kinds, name="layers")
            by_layer = None if experts is None else experts.transpose(2, 0, 1, 3)
            x, layers = scanned(x, (layers, which, by_layer), views, segments, end)
        else:
            updated = []
            for i, kind in enumerate(c.kind_of_layer):
                layer = block(*parts, self.attention, (c.kinds[kind],), name=f"layer_{i}")
                own = None if cache is None else tuple(a[i] for a in layers)
                replayed = None if experts is None else experts[:, :, i]
                x, own = layer(x, (own, None, replayed), [views[kind]], segments, end)
                updated.append(own)
            layers = None if cache is None else tuple(zip(*updated, strict=True))
        x = RMSNorm(*parts, name="final_norm")(x)
        if not c.tie_embeddings and self.is_initializing():  # applied by logits() and the learner
            self._table("lm_head", "kernel")
        if cache is not None:
            cache = cache.stepped(layers, T)
        return x, cache

    def _table(self, name: str, leaf: str):
        """The embedding or the head."""
        init = nn.initializers.normal(self.config.init_std)
        shape = find(self.config, name, leaf).shape
        return self.param(name, lambda key: {leaf: init(key, shape, self.param_dtype)})[leaf]

    def _view(self, kind: LayerKind, positions, cache):
        """A kind of layer's inputs for the positions: (sin, cos, mask over the cache's columns, or Place, or None)."""
        frequencies, factor = rope_frequencies(self.config.head_dim, kind.rope_theta, kind.rope_scaling)
        angle = positions[..., None, None].astype(jnp.float32) * frequencies
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        sin, cos = (sin, cos) if factor == 1 else (sin * factor, cos * factor)
        return sin, cos, None if cache is None else cache.sees(positions, kind.window)


def head_matrix(params):
    """The output projection [D, V]; for tied embeddings a transposed view of the embedding."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"].T


def logits(params, hidden, narrow: bool = False):
    """float32 [..., V] next-token logits of hidden [..., D]. narrow: see DecoderConfig."""
    hidden = hidden.astype(jnp.bfloat16) if narrow else hidden
    own = params.get("lm_head", {})
    if "kernel" + TRANSPOSED in own:
        return cpu.transposed_product(hidden, own["kernel" + TRANSPOSED].astype(hidden.dtype)).astype(jnp.float32)
    head = head_matrix(params).astype(hidden.dtype)
    z = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    scale = own.get("kernel_scale")
    return z if scale is None else z * scale


def init_params(config: DecoderConfig, key, dtype=jnp.float32):
    """Random parameters (normal, std config.init_std; norms 1, biases 0), layers stacked on axis 0; the tree is that of
    `abstract_params`."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config, param_dtype=dtype).init(key, tokens, tokens)["params"]


def abstract_params(config: DecoderConfig, dtype=jnp.float32):
    """(ShapeDtypeStruct tree, tree of logical PartitionSpecs) of the training tree; nothing is allocated."""
    shapes: dict = {}
    specs: dict = {}
    for path, row in weights(config).items():
        set_path(shapes, path, jax.ShapeDtypeStruct(whole_shape(row, config), dtype))
        set_path(specs, path, PartitionSpec(*("layers",) * row.layered, *row.axes))
    return shapes, specs
