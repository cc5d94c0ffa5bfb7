"""Causal attention over packed rows, one switch for every backend.

`xla` runs everywhere and is the reference; it is written as plain batched matrix products, because on CPU
XLA lowers the grouped five-dimensional einsum an order of magnitude slower. `cudnn` is the GPU's fused
kernel, `splash` the TPU's. `triton` is another one for GPUs. Its memory is linear in a row's length, as it compares
segment ids itself, where cuDNN reads a number for each pair of tokens and computes that number's gradient.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

IMPLEMENTATIONS = ("xla", "cudnn", "splash", "triton")
_GPU = ("cudnn", "triton", "xla")
RUNS_ON = {"tpu": ("splash", "xla"), "gpu": _GPU, "cuda": _GPU}  # the best first; elsewhere xla only
SHARES_PROMPTS = ("xla", "cudnn")  # implementations that take any mask
TRITON = (128, 64, 64, 64, 64, 64)  # tokens of a block: queries and keys, then of the gradients of both


def resolve_implementation(name: str, platform: str) -> str:
    """The implementation `name` ("auto": the best) on `platform`, as a device names it.

    Raises:
      ValueError: it does not run there.
    """
    there = RUNS_ON.get(platform, ("xla",))
    if name != "auto" and name not in there:
        raise ValueError(f"{name!r} does not run on {platform}: choose auto, {', '.join(there)}")
    return there[0] if name == "auto" else name


def to_blocks(keys, n: int | None = None):
    """[B, K, S, H] -> [B, K, S / n, H, n]: keys in blocks of n columns, default 32 or what divides S.

    A CPU multiplies a query by such blocks as fast as it can read them; by [S, H] or [H, S] a third as fast.
    """
    B, K, S, H = keys.shape
    n = n or math.gcd(S, 32)
    return keys.reshape(B, K, S // n, n, H).swapaxes(3, 4)


def from_blocks(keys):
    """The inverse of `to_blocks`."""
    B, K, blocks, H, n = keys.shape
    return keys.swapaxes(3, 4).reshape(B, K, blocks * n, H)


def write_keys(keys, new, end):
    """A cache's keys, plain or in blocks, with new [B, K, T, H] in columns [end, end + T)."""
    if keys.ndim == 4:
        return lax.dynamic_update_slice(keys, new, (0, 0, end, 0))
    if new.shape[2] > 1:
        return to_blocks(write_keys(from_blocks(keys), new, end), keys.shape[4])
    n = keys.shape[4]
    return lax.dynamic_update_slice(keys, new[..., None], (0, 0, end // n, 0, end % n))


def attend(q, k, v, mask, scales=()):
    """Grouped-query attention as two batched matrix products; softmax in float32.

    Args:
      q: [B, T, N, H]. k, v: [B, K, S, H], K divides N; the cache is never expanded to N heads. k may also be in
        the form of `to_blocks`.
      mask: bool [B or 1, T, S], True where query t may see key s. A query that sees nothing gets
        the mean of v: finite, and only ever padding.
      scales: of int8 k and v, (float32 [B, K, S], float32 [B, K, S]). They are applied to the scores and to the
        weights, so that no k or v is ever written out in a wider type.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    B, T, N, H = q.shape
    K, S = v.shape[1], v.shape[2]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, (N // K) * T, H)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if k.ndim == 5:
        each = jnp.broadcast_to(q[:, :, None], (B, K, k.shape[2], *q.shape[2:]))
        scores = product("bknth,bknhs->bknts", each, k.astype(q.dtype)).swapaxes(2, 3).reshape(*q.shape[:3], S)
    else:
        scores = product("bkth,bksh->bkts", q, k.astype(q.dtype))
    scores = scores * H**-0.5
    if scales:
        scores = scores * scales[0][:, :, None]
    scores = scores.reshape(B, K, N // K, T, S)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if scales:
        weights = weights * scales[1][:, :, None, None]
    weights = weights.astype(q.dtype).reshape(B, K, (N // K) * T, S)
    out = jnp.einsum("bkts,bksh->bkth", weights, v.astype(q.dtype))
    return out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)


def segment_mask(segment_ids, window=0, shared=None):
    """bool [B, T, T]: causal, only within equal segment ids, and only the last `window` tokens (0: all).

    segment_ids: int32 [B, T]. window: int or traced int32 []. shared: (parents, positions), int32 [B, T] both: the id
    of one more segment that a token sees, 0 for none (the prompt that several responses share), and the token's
    position in its own sequence, by which the window then counts.
    """
    same, T = segment_ids[:, :, None] == segment_ids[:, None, :], segment_ids.shape[1]
    place = jnp.arange(T)[None]
    if shared is not None:
        parents, place = shared
        same |= (parents[:, :, None] == segment_ids[:, None, :]) & (parents > 0)[:, :, None]
    mask = same & jnp.tril(jnp.ones((T, T), bool))
    if isinstance(window, int) and window == 0:
        return mask
    return mask & ((place[:, :, None] - place[:, None] < window) | (window == 0))


def attend_packed(q, k, v, segment_ids, implementation: str, *, windows: tuple[int, ...] = (0,), kind=None,
                  shared=None):
    """Block-causal self-attention of packed rows, or of the last T of their S tokens.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H], S at least T. segment_ids: int32 [B, S], 0 = padding.
      implementation: one of IMPLEMENTATIONS.
      windows: for each kind of layer, how many tokens a token sees, 0 for all. kind: the kind of this layer, traced
        int32 []; None if there is only one.
      shared: see segment_mask.

    Returns:
      [B, T, N, H]. Values at padding positions are finite and meaningless.

    Raises:
      ValueError: unknown implementation, or one that cannot share prompts.
    """
    if shared is not None and implementation not in SHARES_PROMPTS:
        raise ValueError(f"attention={implementation!r} cannot share prompts: choose {', '.join(SHARES_PROMPTS)}")
    kind = None if len(set(windows)) == 1 else kind
    if implementation in ("cudnn", "triton") and q.dtype == jnp.float32:
        implementation = "xla"  # cuDNN's kernel has no float32, and Triton's rounds it to TF32
    if implementation == "splash":
        branches = [functools.partial(_splash, window=w) for w in windows]
        args = (q, k, v, segment_ids)
        return branches[0](*args) if kind is None else lax.switch(kind, branches, *args)
    if implementation == "triton":
        if kind is None and windows[0] == 0 and q.shape == (*k.shape[:2], *q.shape[2:]):
            return _triton(q, k, v, segment_ids)
        implementation = "cudnn"  # the kernel knows no windows and no tokens in front of the queries
    window = windows[0] if kind is None else jnp.array(windows, jnp.int32)[kind]
    if implementation == "xla":
        mask = segment_mask(segment_ids, window, shared)[:, -q.shape[1] :]
        return attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)
    if implementation == "cudnn":
        mask = segment_mask(segment_ids, window, shared)[:, None, -q.shape[1] :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    raise ValueError(f"attention={implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")


def _on_each_device(kernel, q, k, v, segment_ids):
    """kernel(q, k, v, segment_ids) on each device's own rows and heads, as the logical axis rules in force say: the
    compiler cannot partition a hand-written kernel. Key-value heads that do not divide are repeated first."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, segment_ids)
    N, K = q.shape[2], k.shape[2]
    rows, heads = nn.logical_to_mesh_axes(("batch", "heads"))
    parts = math.prod(mesh.shape[name] for name in ((heads,) if isinstance(heads, str) else heads or ()))
    if K % parts:
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    spec = PartitionSpec(rows, None, heads)
    run = jax.shard_map(kernel, in_specs=(spec, spec, spec, PartitionSpec(rows)), out_specs=spec, check_vma=False)
    return run(q, k, v, segment_ids)


def _triton(q, k, v, segment_ids, *, interpret: bool = False):
    """jax's flash attention for GPUs, which skips blocks above the diagonal and compares segment ids by itself."""
    return _on_each_device(functools.partial(_triton_local, interpret=interpret), q, k, v, segment_ids)


def _triton_local(q, k, v, segment_ids, *, interpret):
    from jax.experimental.pallas.ops.gpu import attention as kernel

    T, H = q.shape[1], q.shape[3]
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))  # the kernel takes as many heads
    whole = lambda x: jnp.pad(x, ((0, 0), (0, -T % TRITON[0]), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    q, k, v, segment_ids = map(whole, (q, k, v, segment_ids))
    if q.size >= 2**31:  # Triton counts elements in 32 bits
        raise ValueError(f"attention='triton': {q.size:,} elements of queries on a device, of 2,147,483,647 at most")
    blocks = kernel.BlockSizes(*TRITON)
    return kernel.mha(q, k, v, segment_ids, H**-0.5, True, blocks, interpret=interpret)[:, :T]


def _splash(q, k, v, segment_ids, window: int = 0, *, interpret: bool = False):
    """The TPU's block-sparse flash attention: skips blocks above the diagonal, masks by segment."""
    kernel = functools.partial(_splash_local, window=window, interpret=interpret)
    return _on_each_device(kernel, q, k, v, segment_ids)


def _splash_local(q, k, v, segment_ids, *, window, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, length, N, H = q.shape
    before = k.shape[1] - length  # tokens in front of the queries
    ids = kernel.SegmentIds(q=segment_ids[:, before:], kv=segment_ids)
    whole = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    q, k, v, ids = jax.tree.map(whole, (q, k, v, ids))  # pad to whole blocks of the kernel
    K, (T, S) = k.shape[2], (q.shape[1], k.shape[1])
    one = masks.LocalMask((T, S), (window - 1, 0), before) if window else masks.CausalMask((T, S), before)
    mask = masks.MultiHeadMask([one for _ in range(N // K)])
    best = {n: next(b for b in (512, 256, 128) if n % b == 0) for n in (T, S)}  # the default, 128, starves the MXU
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = kernel.BlockSizes(**{f"block_{name}": best[S if name.startswith("kv") else T] for name in names})
    attention = kernel.make_splash_mqa_single_device(mask, block_sizes=blocks, interpret=interpret)
    # kernel: q [heads, T, H], k and v [T, H]; one call per (row, kv head)
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * H**-0.5
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    per_head = jax.vmap(attention, in_axes=(0, 0, 0, None))
    out = jax.vmap(per_head)(q, k, v, ids)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)[:, :length]
