"""The decoder: Llama 2/3.x, Qwen2/2.5 and Qwen3 by configuration flags.

One `Decoder.__call__` scores, trains, prefills and decodes, so the sampler and the learner cannot drift
apart. Dimensions: B rows, T tokens, D width, N query heads, K key-value heads, H head size, F MLP width,
V vocabulary, L layers, W cache window.

Parameters are plain pytrees (see `init_params`), each with logical axis names for sharding. Layers are
stacked on axis 0 and scanned for training; `sampling_layout` turns the same parameters into the unrolled,
fused form that decoding wants.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models.attention import attend, attend_packed, to_blocks, write_keys
from models.config import DecoderConfig

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


def empty_cache(
    config: DecoderConfig, rows: int, window: int, dtype, scan_layers: bool = False, key_blocks: bool = False
) -> Cache:
    """A zeroed cache of `rows` rows and `window` columns; every row starts at column 0. dtype: int8 adds scales."""
    L, shape = config.num_layers, (rows, config.num_kv_heads, window, config.head_dim)
    k_shape = jax.eval_shape(to_blocks, jax.ShapeDtypeStruct(shape, dtype)).shape if key_blocks else shape

    def zeros(shape, dtype):
        return jnp.zeros((L, *shape), dtype) if scan_layers else tuple(jnp.zeros(shape, dtype) for _ in range(L))

    scales = tuple(zeros(shape[:3], jnp.float32) for _ in "kv") if dtype == jnp.int8 else ()
    start, end = jnp.zeros((rows,), jnp.int32), jnp.zeros((), jnp.int32)
    return Cache(zeros(k_shape, dtype), zeros(shape, dtype), start, end, scales)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """float32 [H/2] rotary frequencies, with Llama 3's scaling where the config asks for it."""
    half = config.head_dim // 2
    freq = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    s = config.rope_scaling
    if s is not None:
        wavelength = 2 * math.pi / freq
        smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)  # 0: long wavelength, slowed down; 1: short, left alone
        freq = (1 - smooth) * freq / s.factor + smooth * freq
    return freq.astype(np.float32)


def rotate(x, sin, cos, by_product: bool = False):
    """Rotary embedding in the half-split form, computed in float32. x: [B, T, N, H]; sin, cos: [B, T, 1, H/2].

    by_product: swap the halves by a matrix of 0, 1 and -1, exactly. XLA's CPU compiler computes the result once for
    each of its users; then that is a plain sum, without the norm before it and a concatenation.
    """
    if by_product:
        half = np.eye(x.shape[-1] // 2, dtype=np.float32)
        y = x.astype(jnp.float32)
        swapped = project(y, np.block([[0 * half, half], [-half, 0 * half]]))
        sin, cos = (jnp.concatenate([a, a], axis=-1) for a in (sin, cos))
        return (y * cos + swapped * sin).astype(x.dtype)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def rms_norm(x, scale, eps):
    """RMSNorm over the last axis, computed in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def project(x, w):
    """x [..., D] @ w [D, F]; one flat product on a single device.

    There a CPU also writes the gradient of the result out before it is used. Left alone, XLA computes it a second
    time inside the product for w's gradient, transposed, and the MLP's backward pass takes 1.4 times as long.
    """
    if isinstance(w, tuple):  # int8 and a scale per column, see sampling_layout
        y = project(x, w[0].astype(x.dtype))
        return (y.astype(jnp.float32) * w[1]).astype(x.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return x @ w
    return _gradient_written_out(x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def _gradient_written_out(y):
    return y


def _write_out(_, g):
    return (lax.platform_dependent(g, cpu=lax.optimization_barrier, default=lambda g: g),)


_gradient_written_out.defvjp(lambda y: (y, None), _write_out)


def _weights(std: float, *axes: str):
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def _ones(*axes: str):
    return nn.with_logical_partitioning(nn.initializers.ones, axes)


def _zeros(*axes: str):
    return nn.with_logical_partitioning(nn.initializers.zeros, axes)


def _weight(module, name, init, *shape):
    """A parameter in the compute dtype; of a quantised one (int8, its float32 scales), which `project` takes."""
    w = module.param(name, init, shape, module.param_dtype)
    if w.dtype == jnp.int8:
        return w, module.get_variable("params", f"{name}_scale")
    return w.astype(module.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over packed rows or over a cache."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    implementation: str
    fused: bool

    @nn.compact
    def __call__(self, x, sin, cos, mask, segment_ids, layer_cache, end):
        """x: [B, T, D] -> ([B, T, D], layer_cache). See Decoder.__call__ for the rest."""
        c, (B, T, D) = self.config, x.shape
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim

        def param(name, init, *shape):
            return _weight(self, name, init, *shape)

        if self.fused:
            qkv = project(x, param("qkv", _weights(c.init_std, "embed", "heads"), D, (N + 2 * K) * H))
            if c.qkv_bias:
                qkv += param("qkv_bias", _zeros("heads"), (N + 2 * K) * H)
            q, k, v = jnp.split(qkv, [N * H, (N + K) * H], axis=-1)
        else:
            q = project(x, param("q", _weights(c.init_std, "embed", "heads"), D, N * H))
            k = project(x, param("k", _weights(c.init_std, "embed", "kv_heads"), D, K * H))
            v = project(x, param("v", _weights(c.init_std, "embed", "kv_heads"), D, K * H))
            if c.qkv_bias:
                q += param("q_bias", _zeros("heads"), N * H)
                k += param("k_bias", _zeros("kv_heads"), K * H)
                v += param("v_bias", _zeros("kv_heads"), K * H)
        q, k, v = (a.reshape(B, T, -1, H) for a in (q, k, v))
        if c.qk_norm:
            q = rms_norm(q, param("q_norm", _ones("norm"), H), c.rms_norm_eps)
            k = rms_norm(k, param("k_norm", _ones("norm"), H), c.rms_norm_eps)
        by_product = layer_cache is not None and layer_cache[0].ndim == 5  # a CPU's cache
        q, k = rotate(q, sin, cos, by_product), rotate(k, sin, cos, by_product)
        if layer_cache is None:
            out = attend_packed(q, k, v, segment_ids, self.implementation)
        else:
            keys, values, *scales = layer_cache
            k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
            if scales:
                (k, of_k), (v, of_v) = quantise(k, -1), quantise(v, -1)
                new = zip(scales, (of_k, of_v), strict=True)
                scales = [lax.dynamic_update_slice(s, n, (0, 0, end)) for s, n in new]
            keys = write_keys(keys, k.astype(keys.dtype), end)
            values = lax.dynamic_update_slice(values, v.astype(values.dtype), (0, 0, end, 0))
            layer_cache = (keys, values, *scales)
            out = attend(q, keys, values, mask, scales)
        o = param("o", _weights(c.init_std, "heads", "embed"), N * H, D)
        return project(out.reshape(B, T, N * H), o), layer_cache


class MLP(nn.Module):
    """SwiGLU; fused: gate and up are one matrix (see sampling_layout)."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    fused: bool

    @nn.compact
    def __call__(self, x):
        """SwiGLU. x: [..., D] -> [..., D]."""
        c = self.config
        D, F = c.hidden_size, c.intermediate_size

        def param(name, axes, *shape):
            return _weight(self, name, _weights(c.init_std, *axes), *shape)

        if self.fused:
            gate, up = jnp.split(project(x, param("gate_up", ("embed", "mlp"), D, 2 * F)), 2, axis=-1)
        else:
            gate = project(x, param("gate", ("embed", "mlp"), D, F))
            up = project(x, param("up", ("embed", "mlp"), D, F))
        return project(nn.silu(gate) * up, param("down", ("mlp", "embed"), F, D))


class Scale(nn.Module):
    """RMSNorm with a learned scale."""

    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        return rms_norm(x, self.param("scale", _ones("norm"), (x.shape[-1],), self.param_dtype), self.eps)


class Block(nn.Module):
    """One layer: attention and MLP, each behind its norm."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    implementation: str
    fused: bool

    @nn.compact
    def __call__(self, x, layer_cache, sin, cos, mask, segment_ids, end):
        """Pre-norm residual block. x: [B, T, D]."""
        c = self.config
        h = Scale(c.rms_norm_eps, self.param_dtype, name="attn_norm")(x)
        fields = (c, self.dtype, self.param_dtype, self.implementation, self.fused)
        h, layer_cache = Attention(*fields, name="attn")(h, sin, cos, mask, segment_ids, layer_cache, end)
        x = nn.with_logical_constraint(x + h, ("batch", "seq", "act_embed"))
        h = Scale(c.rms_norm_eps, self.param_dtype, name="mlp_norm")(x)
        h = MLP(c, self.dtype, self.param_dtype, self.fused, name="mlp")(h)
        return nn.with_logical_constraint(x + h, ("batch", "seq", "act_embed")), layer_cache


class Decoder(nn.Module):
    """The transformer up to its final norm; `logits` and the fused log-probs apply the head.

    dtype: compute dtype. param_dtype: dtype of newly initialised parameters. remat: key of REMAT_POLICIES,
    what the backward pass recomputes per layer. attention: see models.attention. scan_layers and fused
    choose the parameter layout (see `sampling_layout`).
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    scan_layers: bool = True
    fused: bool = False

    @nn.compact
    def __call__(self, tokens, positions, segment_ids=None, cache: Cache | None = None):
        """Hidden states of every position.

        Args:
          tokens: int32 [B, T]. positions: int32 [B, T], position of each token in its own sequence.
          segment_ids: int32 [B, T] for packed rows without a cache; attention is causal within equal ids,
            0 is padding. None means one sequence per row.
          cache: tokens are written to columns [end, end + T); row b sees columns from start[b] on.

        Returns:
          (hidden [B, T, D] in `dtype`, after the final norm; the updated cache or None).
        """
        c, (B, T) = self.config, tokens.shape
        embedding = self.param(
            "embed",
            lambda key: {
                "embedding": _weights(c.init_std, "vocab", "embed")(
                    key, (c.vocab_size, c.hidden_size), self.param_dtype
                )
            },
        )["embedding"]
        x = jnp.take(embedding, tokens, axis=0).astype(self.dtype)
        # On a mesh: each device looks its columns of the table up for all rows, then columns are traded for
        # rows. The other way round would gather the table, and its gradient, on every device.
        x = nn.with_logical_constraint(x, ("lookup_batch", None, "embed"))
        x = nn.with_logical_constraint(x, ("batch", "seq", "act_embed"))
        angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(c)
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        mask = end = layers = None
        if cache is None:
            segment_ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
        else:
            end, layers = cache.end, cache.arrays
            column = jnp.arange(cache.v[0].shape[-2])
            seen = column[None, None] <= end + jnp.arange(T)[None, :, None]
            mask = seen & (column[None, None] >= cache.start[:, None, None])
        block = Block
        if REMAT_POLICIES[self.remat] is not None:
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        fields = (c, self.dtype, self.param_dtype, self.attention, self.fused)
        if self.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, layers = scanned(*fields, name="layers")(x, layers, sin, cos, mask, segment_ids, end)
        else:
            updated = []
            for i in range(c.num_layers):
                layer_cache = None if cache is None else tuple(a[i] for a in cache.arrays)
                x, layer_cache = block(*fields, name=f"layer_{i}")(
                    x, layer_cache, sin, cos, mask, segment_ids, end
                )
                updated.append(layer_cache)
            layers = None if cache is None else tuple(zip(*updated, strict=True))
        x = Scale(c.rms_norm_eps, self.param_dtype, name="final_norm")(x)
        if not c.tie_embeddings:  # declared here so that init makes it; applied by logits() and the learner
            self.param(
                "lm_head",
                lambda key: {
                    "kernel": _weights(c.init_std, "embed", "vocab")(
                        key, (c.hidden_size, c.vocab_size), self.param_dtype
                    )
                },
            )
        if cache is not None:
            cache = cache.with_arrays(layers, end=end + T)
        return x, cache


def head_matrix(params):
    """The output projection [D, V]; for tied embeddings a transposed view of the embedding."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"].T


def logits(params, hidden):
    """float32 [..., V] next-token logits of hidden [..., D]."""
    head = head_matrix(params).astype(hidden.dtype)
    z = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    scale = params.get("lm_head", {}).get("kernel_scale")
    return z if scale is None else z * scale


def _init(config: DecoderConfig, dtype):
    model = Decoder(config, param_dtype=dtype)
    tokens = jnp.zeros((1, 1), jnp.int32)
    return lambda key: model.init(key, tokens, tokens)["params"]


def init_params(config: DecoderConfig, key, dtype=jnp.float32):
    """Random parameters (normal, std config.init_std; norms 1, biases 0), layers stacked on axis 0.

    The tree: embed/embedding [V, D]; layers/{attn_norm, mlp_norm}/scale; layers/attn/{q, k, v, o, ...};
    layers/mlp/{gate, up, down}; final_norm/scale; lm_head/kernel [D, V] unless tied.
    """
    return nn.unbox(_init(config, dtype)(key))


def abstract_params(config: DecoderConfig, dtype=jnp.float32):
    """(ShapeDtypeStruct tree, tree of logical PartitionSpecs), without allocating anything."""
    boxed = jax.eval_shape(_init(config, dtype), jax.random.key(0))
    return nn.unbox(boxed), nn.get_partition_spec(boxed)


def quantise(x, axis: int = 0):
    """(int8 like x, float32 scales without `axis`): symmetric, so that x is about their product. Of a matrix [D, F]
    a scale per column; of keys and values, axis -1, one per token and head."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axis) / 127, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x / jnp.expand_dims(scale, axis)).astype(jnp.int8), scale


def sampling_layout(
    params, config: DecoderConfig, dtype, fuse: bool = True, untie: bool = False, int8: bool = False
):
    """The same weights, unrolled by layer, cast once, with q/k/v and gate/up fused into one matrix each.

    Unrolled, because a scanned decode step would copy every layer's cache in and out of the scan; fused,
    because a decode step is bound by the number of small matrix products. Run it under jit with output
    shardings: it is the one cast-and-reshard from training to sampling per rollout phase.

    untie: give tied embeddings a head of their own, [D, V]; a CPU multiplies by a transposed matrix slowly.
    int8: matrices of the layers and a head of its own become int8, with `*_scale` beside them (see `quantise`).

    Returns: params for Decoder(config, dtype, scan_layers=False, fused=fuse).
    """

    def one(i):
        p = jax.tree.map(lambda a: a[i] if int8 else a[i].astype(dtype), params["layers"])
        attn, mlp = dict(p["attn"]), dict(p["mlp"])
        if fuse:
            attn["qkv"] = jnp.concatenate([attn.pop("q"), attn.pop("k"), attn.pop("v")], axis=-1)
            if config.qkv_bias:
                bias = [attn.pop(f"{n}_bias") for n in "qkv"]
                attn["qkv_bias"] = jnp.concatenate(bias, axis=-1)
            mlp["gate_up"] = jnp.concatenate([mlp.pop("gate"), mlp.pop("up")], axis=-1)
        return {name: compact(part) for name, part in {**p, "attn": attn, "mlp": mlp}.items()}

    def compact(part):
        matrices = {name: quantise(w) for name, w in part.items() if int8 and w.ndim == 2}
        out = {name: w.astype(dtype) for name, w in part.items() if name not in matrices}
        for name, (w, scale) in matrices.items():
            out |= {name: w, f"{name}_scale": scale}
        return out

    rest = jax.tree.map(lambda a: a.astype(dtype), {k: v for k, v in params.items() if k not in ("layers", "lm_head")})
    rest |= {k: v for k, v in params.items() if k == "lm_head"}
    if untie and "lm_head" not in rest:
        rest["lm_head"] = {"kernel": params["embed"]["embedding"].T}
    if "lm_head" in rest:
        rest["lm_head"] = compact(rest["lm_head"])
    return {**rest, **{f"layer_{i}": one(i) for i in range(config.num_layers)}}
