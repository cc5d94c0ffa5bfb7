"""Log-probability and entropy of given tokens, without ever holding [tokens, vocabulary].

With logits z_v = h . W_v / temperature,   logp = z_y - lse(z)   and   H = lse(z) - sum_v p_v z_v.

The vocabulary is walked in chunks. Forward keeps running max, sum of exponentials and sum of exponentials
times z, as flash attention does. Backward computes each chunk's logits again and forms

    dL/dz_v = g [v = y] - p_v (g + e (log p_v + H))          g = dL/dlogp, e = dL/dH

This gives the chunk's part of dHead at once (one product over all tokens; nothing is accumulated, so there is no second
fp32 copy of the head). Only dHidden [tokens, D] is summed over chunks.

With `least` the log-prob is that of a truncated distribution, over the tokens that reach a given probability, and y:

    logp = z_y - lse_S(z),   S = {v : p_v >= least} + {y}        H as before

This needs a second pass over the vocabulary, since S is known only after lse. S itself has no gradient.

Only the positions that predict a response token reach the head: they are first gathered into `capacity`
slots. On a mesh all of this runs inside `shard_map`, so the collectives are the ones written here: per chunk
the head is gathered over `fsdp` (its gradient scattered back); over `tensor` each device owns a slice of the
vocabulary and only [tokens] statistics, and dHidden, are summed.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl.runtime.mesh import BATCH, SPLIT


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """How the head is applied; all static.

    temperature: divides the logits. tied: the head is the embedding [V, D], not a kernel [D, V].
    chunk: vocabulary entries at a time (each device). saved_bytes: keep up to this many bytes of logits (per
    device) for the backward pass instead of computing them again: 4 bytes x positions x vocabulary save a
    quarter of the head's FLOPs. mesh: None for one device. shard_vocab: the head is split over `tensor`. frozen: the
    head has no gradient, which saves a third of its FLOPs. narrow: logits and the gradient of `hidden` are products of
    bfloat16, as in models.cpu.narrow_product.
    """

    temperature: float = 1.0
    tied: bool = False
    chunk: int = 2048
    saved_bytes: int = 0
    mesh: Mesh | None = None
    shard_vocab: bool = True
    frozen: bool = False
    narrow: bool = False

    def product_dtype(self, hidden):
        """What the factors of a product are rounded to."""
        return jnp.bfloat16 if self.narrow else hidden.dtype

    @property
    def sharded(self) -> bool:
        return self.mesh is not None and self.mesh.size > 1

    def size(self, *axes: str) -> int:
        """Devices along mesh axes as far as the head is concerned."""
        if not self.sharded or (axes == ("tensor",) and not self.shard_vocab):
            return 1
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def head_spec(self) -> P:
        vocab = "tensor" if self.size("tensor") > 1 else None
        return P(vocab, SPLIT) if self.tied else P(SPLIT, vocab)


def logprobs_and_entropy(hidden, head, targets, mask, capacity: int, *, settings: HeadSettings = HeadSettings(),
                         least=None):
    """Log-probability of targets[i] given hidden[i], and the entropy there, where mask is set.

    Args:
      hidden: [N, D] float32 or bfloat16; its dtype is the compute dtype (sums and logits are float32).
      head: [D, V], or [V, D] if settings.tied; any float dtype, cast to hidden's chunk by chunk.
      targets: int32 [N]. mask: [N], nonzero where asked.
      capacity: static; at least the number of masked positions in each of the mesh's batch shards (positions
        beyond it would be dropped: jaxrl.learner.packing counts them on the host).
      least: float32 [N], a probability: logp is that of the distribution over the target and the tokens that reach
        this probability; 0 keeps all tokens, as None does.

    Returns:
      (logp [N], entropy [N]) float32, in nats, 0 where mask is 0. Differentiable in hidden and head.
    """
    return _fused(settings, capacity, hidden, head, targets, mask != 0, least)


def response_logprobs(hidden, head, tokens, response_mask, capacity: int, *, settings: HeadSettings = HeadSettings(),
                      least=None):
    """`logprobs_and_entropy` of packed rows: entry [r, t] is about token t, predicted from hidden[r, t - 1].

    Args:
      hidden: [R, T, D]. head: see logprobs_and_entropy. tokens: int32 [R, T]. response_mask: [R, T]; position 0
        of a row is never a response token (every sequence starts with a prompt).
      capacity: most response tokens in one batch shard of rows. least: float32 [R, T], or None for whole distributions.

    Returns:
      (logp [R, T], entropy [R, T]) float32, 0 outside the response mask.
    """
    R, T, D = hidden.shape
    per_token = (tokens, response_mask, least)
    *shifted, least = [None if a is None else jnp.roll(a, -1, axis=1).reshape(R * T) for a in per_token]
    out = logprobs_and_entropy(hidden.reshape(R * T, D), head, *shifted, capacity, settings=settings, least=least)
    return tuple(jnp.roll(a.reshape(R, T), 1, axis=1) for a in out)


# --- the custom derivative: two shard_maps around two local functions -------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(settings, capacity, hidden, head, targets, mask, least):
    return _run_forward(settings, capacity, 0, hidden, head, targets, mask, least)[:2]


def _fused_forward(settings, capacity, hidden, head, targets, mask, least):
    saved = _saved_chunks(settings, capacity, head)
    logp, entropy, *kept = _run_forward(settings, capacity, saved, hidden, head, targets, mask, least)
    return (logp, entropy), (hidden, head, targets, least, kept)


def _fused_backward(settings, capacity, residuals, cotangents):
    hidden, head, targets, least, (index, lse, kept, entropy, saved) = residuals
    run = functools.partial(_backward, settings)
    if settings.sharded:
        rows, vocab = P(BATCH), settings.head_spec[0 if settings.tied else 1]
        run = jax.shard_map(
            run,
            mesh=settings.mesh,
            in_specs=(rows, settings.head_spec, *(rows,) * 6, P(None, BATCH, vocab), rows, rows),
            out_specs=(rows, None if settings.frozen else settings.head_spec),
            check_vma=False,
        )
    d_hidden, d_head = run(hidden, head, targets, least, index, lse, kept, entropy, saved, *cotangents)
    return d_hidden, d_head, None, None, None


_fused.defvjp(_fused_forward, _fused_backward)


def _run_forward(settings, capacity, saved_chunks, hidden, head, targets, mask, least):
    run = functools.partial(_forward, settings, capacity, saved_chunks)
    if settings.sharded:
        rows, vocab = P(BATCH), settings.head_spec[0 if settings.tied else 1]
        run = jax.shard_map(
            run,
            mesh=settings.mesh,
            in_specs=(rows, settings.head_spec, rows, rows, rows),
            out_specs=(*(rows,) * 6, P(None, BATCH, vocab)),
            check_vma=False,
        )
    return run(hidden, head, targets, mask, least)


def _saved_chunks(s: HeadSettings, capacity: int, head) -> int:
    """How many leading vocabulary chunks keep their logits within saved_bytes on each device."""
    width = head.shape[0 if s.tied else 1] // s.size("tensor")
    return min(width // min(s.chunk, width), s.saved_bytes // (4 * capacity * min(s.chunk, width)))


# --- what each device does ---------------------------------------------------------------------------------------


def _forward(s: HeadSettings, capacity, saved_chunks, hidden, head, targets, mask, least):
    N = hidden.shape[0]
    index = jnp.nonzero(mask, size=capacity, fill_value=N)[0].astype(jnp.int32)
    h, y = _gather(hidden, index), _gather(targets, index)
    offset = _vocab_offset(s, head)

    def step(carry, start, size, _):
        top, total, weighted, at_target = carry
        z = _logits(s, h, _piece(s, head, start, size, s.product_dtype(h)))
        new_top = jnp.maximum(top, jnp.max(z, axis=1))
        below = z - new_top[:, None]
        e, (total, weighted) = jnp.exp(below), _lower(total, weighted, top, new_top)
        hit = (y - offset - start)[:, None] == jnp.arange(size)
        at_target += jnp.sum(jnp.where(hit, z, 0), axis=1)
        return (new_top, total + jnp.sum(e, axis=1), weighted + jnp.sum(e * below, axis=1), at_target), z

    zero = jnp.zeros((capacity,), jnp.float32)
    carry = (zero - jnp.finfo(jnp.float32).max, zero, zero, zero)
    (top, total, weighted, at_target), saved = _over_vocabulary(s, head, step, carry, saved_chunks, None)
    if s.size("tensor") > 1:
        all_top = lax.pmax(top, "tensor")
        sums = jnp.stack([*_lower(total, weighted, top, all_top), at_target])
        top, (total, weighted, at_target) = all_top, lax.psum(sums, "tensor")
    logp, entropy = (at_target - top) - jnp.log(total), jnp.log(total) - weighted / total
    lse, kept = top + jnp.log(total), None
    if least is not None:
        kept = _log_mass_kept(
            s, h, y, head, lse=(top, jnp.log(total)), logp=logp, least=_gather(least, index), saved=saved)
        logp = logp - kept
    return _scatter(logp, index, N), _scatter(entropy, index, N), index, lse, kept, entropy, saved


def _log_mass_kept(s: HeadSettings, h, y, head, *, lse, logp, least, saved):
    """float32 [n]: logarithm of the kept tokens' probability. lse: its two terms; logp: the target's; [n] each."""
    offset = _vocab_offset(s, head)

    def step(total, start, size, z):
        z = _logits(s, h, _piece(s, head, start, size, s.product_dtype(h))) if z is None else z
        log_p = (z - lse[0][:, None]) - lse[1][:, None]
        hit = (y - offset - start)[:, None] == jnp.arange(size)
        return total + jnp.sum(jnp.where(_kept(log_p, least) & ~hit, jnp.exp(log_p), 0), axis=1), None

    others, _ = _over_vocabulary(s, head, step, jnp.zeros_like(logp), saved.shape[0], saved)
    others = lax.psum(others, "tensor") if s.size("tensor") > 1 else others
    return jnp.logaddexp(logp, jnp.log(others))  # the target apart: perhaps no other token is kept


def _kept(log_p, least):
    """bool [n, chunk]: which of log_p [n, chunk] reach the probability least [n]; 0 keeps everything."""
    return log_p >= jnp.log(least)[:, None]


def _lower(total, weighted, top, new_top):
    """sum e^(z - top) and sum e^(z - top) (z - top), converted to a higher top. They are relative to the top, because
    lse - E[z] would lose the digits of large logits."""
    scale = jnp.exp(top - new_top)
    return total * scale, (weighted + total * (top - new_top)) * scale


def _backward(s: HeadSettings, hidden, head, targets, least, index, lse, kept, entropy, saved, g_logp, g_entropy):
    h, y = _gather(hidden, index), _gather(targets, index)
    g, e = (_gather(a, index)[:, None] for a in (g_logp, g_entropy))
    offset, lse, entropy = _vocab_offset(s, head), lse[:, None], entropy[:, None]
    vocab_axis = 0 if s.tied else 1
    least = None if least is None else _gather(least, index)

    def step(carry, start, size, z):
        d_h, d_head = carry
        w = _piece(s, head, start, size, s.product_dtype(h))
        log_p = (_logits(s, h, w) if z is None else z) - lse
        hit = (y - offset - start)[:, None] == jnp.arange(size)
        if least is None:
            d_z = jnp.where(hit, g, 0) - jnp.exp(log_p) * (g + e * (log_p + entropy))
        else:
            p_kept = jnp.where(_kept(log_p, least) | hit, jnp.exp(log_p - kept[:, None]), 0)
            d_z = g * (hit - p_kept) - jnp.exp(log_p) * e * (log_p + entropy)
        d_z = (d_z * (1 / s.temperature)).astype(h.dtype)
        form = "nv,vd->nd" if s.tied else "nv,dv->nd"
        d_h += jnp.einsum(form, d_z.astype(w.dtype), w, preferred_element_type=jnp.float32)
        if s.frozen:
            return (d_h, None), None
        d_w = jnp.einsum("nv,nd->vd" if s.tied else "nv,nd->dv", d_z, h, preferred_element_type=jnp.float32)
        d_w = d_w.astype(head.dtype)
        if s.size(*SPLIT) > 1:
            d_w = lax.psum_scatter(d_w, SPLIT, scatter_dimension=1 - vocab_axis, tiled=True)
        return (d_h, lax.dynamic_update_slice_in_dim(d_head, d_w, start, vocab_axis)), None

    carry = (jnp.zeros(h.shape, jnp.float32), None if s.frozen else jnp.zeros(head.shape, head.dtype))
    (d_h, d_head), _ = _over_vocabulary(s, head, step, carry, saved.shape[0], saved)
    d_h = d_h.astype(h.dtype)
    if s.size("tensor") > 1:
        d_h = lax.psum(d_h, "tensor")
    if s.size("data") > 1 and not s.frozen:
        d_head = lax.psum(d_head, "data")
    return _scatter(d_h, index, hidden.shape[0]), d_head


def _over_vocabulary(s: HeadSettings, head, step, carry, saved_chunks: int, saved):
    """Folds step(carry, start, size, z) over this device's vocabulary; (carry, logits of the saved chunks).

    The first `saved_chunks` keep (forward: saved is None) or are given (backward) their logits. A width that
    the chunk does not divide ends in a narrower step.
    """
    width = head.shape[0 if s.tied else 1]
    chunk = min(s.chunk, width)
    full = width // chunk
    forward = saved is None

    def keep(carry, x):
        i, z = x
        return step(carry, i * chunk, chunk, z)

    carry, kept = lax.scan(keep, carry, (jnp.arange(saved_chunks), saved), length=saved_chunks)
    body = lambda carry, i: (step(carry, i * chunk, chunk, None)[0], None)  # noqa: E731
    carry, _ = lax.scan(body, carry, jnp.arange(saved_chunks, full))
    if width % chunk:
        carry, _ = step(carry, full * chunk, width % chunk, None)
    return carry, kept if forward else None


def _piece(s: HeadSettings, head, start, size, dtype):
    """[size, D] (tied) or [D, size] of the head in the compute dtype, all of D."""
    axis = 0 if s.tied else 1
    w = lax.dynamic_slice_in_dim(head, start, size, axis).astype(dtype)
    return lax.all_gather(w, SPLIT, axis=1 - axis, tiled=True) if s.size(*SPLIT) > 1 else w


def _logits(s: HeadSettings, h, w):
    z = jnp.einsum("nd,vd->nv" if s.tied else "nd,dv->nv", h.astype(w.dtype), w, preferred_element_type=jnp.float32)
    return z if s.temperature == 1 else z * (1 / s.temperature)


def _vocab_offset(s: HeadSettings, head):
    """First vocabulary entry of this device's slice."""
    return lax.axis_index("tensor") * head.shape[0 if s.tied else 1] if s.size("tensor") > 1 else 0


def _gather(a, index):
    return jnp.take(a, index, axis=0, mode="fill", fill_value=0)


def _scatter(a, index, size: int):
    return jnp.zeros((size, *a.shape[1:]), a.dtype).at[index].set(a, mode="drop")
