"""One optimizer step on one packed mini-batch, from tokens to the update.

    hidden = decoder(tokens, positions, segment_ids)                     models/decoder.py
    logp, entropy of the response tokens                                 learner/logprobs.py
    old   = stop_gradient(logp) if this is the only update of the batch, else the scored old_logprobs;
            at tokens that older parameters drew, the sampler's log-probs
    A     = advantages (+ entropy shaping)
    token = loss(logp, old, A) x correction weight + kl_coef x KL(reference) - entropy_coef x H
    loss  = aggregate(token) with the mini-batch's own counts as denominators

Micro-batches are computed one after another and their float32 gradients added up. Every denominator counts the whole
mini-batch, so the sum is the gradient of the whole mini-batch, however it is split. Then comes one clipped AdamW step,
or none if loss, gradient or the step's result are not finite.

`build_programs` makes the two programs (update, score) for a model, a mesh and an objective. They lower from
abstract arguments (`abstract_state`, `abstract_batch`), so that `preflight` can compile them without data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.algorithms.aggregation import aggregate
from jaxrl.algorithms.correction import CORRECTIONS, effective_mask, mismatch_stats
from jaxrl.algorithms.entropy import entropy_advantages, entropy_bonus
from jaxrl.algorithms.hyper import Method, resolve
from jaxrl.algorithms.inputs import LossInputs
from jaxrl.algorithms.kl import kl_estimate
from jaxrl.algorithms.losses import LOSSES, Loss
from jaxrl.algorithms.segments import count_sequences
from jaxrl.errors import UserError
from jaxrl.learner.logprobs import HeadSettings, response_logprobs
from jaxrl.learner.packing import PackedBatch
from jaxrl.learner.state import (
    Optimizer,
    TrainState,
    abstract_state,
    add_updates,
    on_device,
    on_host,
    sharding_of,
)
from jaxrl.runtime.mesh import BATCH, logical_rules, num_batch_shards, own_shards, replicated, use
from models.attention import resolve_implementation
from models.config import DecoderConfig
from models.decoder import AUXILIARY, Decoder
from models.lora import LoRA, join
from models.moe import balance_loss
from models.table import NORM, kinds

PER_TOKEN = ("tokens", "positions", "segment_ids", "response_mask", "advantages", "old_logprobs",
             "sampler_logprobs", "ref_logprobs", "stale")
OPTIONAL = ("parents", "least", "experts")  # further arrays with values per token, or None


def attention_kernel(name: str, mesh: Mesh) -> str:
    """The attention implementation that config.model.attention=`name` means on the devices of the mesh. Raises
    UserError if it does not run there."""
    try:
        return resolve_implementation(name, mesh.devices.flat[0].platform)
    except ValueError as e:
        raise UserError(f"config.model.attention={e}") from e


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised.

    loss, correction: names in LOSSES, CORRECTIONS; *_hyper: constants that differ from the method's defaults.
    aggregation: "" = the loss's own. norm_length: tokens, for seq-mean-token-sum-norm. temperature: of
    sampling; log-probs and entropy are those of the tempered distribution. on_policy: exactly one update per
    batch, so old_logp = stop_gradient(logp) and no scoring pass is needed. kl_coef: weight of KL(pi || reference),
    with estimator kl_kind, clamped at kl_value_clamp, and weighted by pi / pi_old if kl_unbiased. entropy_coef:
    entropy bonus. entropy_advantage: (alpha, kappa) or None. balance_coef: weight of the load-balancing loss of a
    mixture of experts, computed per micro-batch and weighted by the micro-batch's share of the response tokens.
    """

    loss: str = "grpo"
    loss_hyper: Mapping = dataclasses.field(default_factory=dict, hash=False)
    aggregation: str = ""
    norm_length: float = 1.0
    temperature: float = 1.0
    on_policy: bool = False
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    kl_value_clamp: float = 10.0
    kl_unbiased: bool = False
    entropy_coef: float = 0.0
    balance_coef: float = 0.0
    entropy_advantage: tuple[float, float] | None = None
    correction: str = "none"
    correction_hyper: Mapping = dataclasses.field(default_factory=dict, hash=False)

    @property
    def scores_reference(self) -> bool:
        """Whether the reference model's log-probs are needed: for the KL term, or because the loss says so."""
        return bool(self.kl_coef) or "ref_logp" in LOSSES[self.loss].needs


class Programs(NamedTuple):
    """update(state, batch, frozen=None) -> (state, metrics); state is donated. score(params, batch) -> (logp, entropy),
    float32 [M, R, T], no gradient. Both are jitted. frozen: the base of adapters; params: base and adapters joined
    (models.lora.join). metrics: dict of float32 scalars (see `_metrics`)."""

    update: Callable
    score: Callable


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the programs are made of; all static. dtype: compute dtype. rules: logical axis -> mesh axis. gradients:
    shardings of the trainable parameters' gradients."""

    objective: Objective
    loss: Loss
    loss_hyper: Mapping
    correction: Method
    correction_hyper: Mapping
    optimizer: Optimizer
    model: Decoder
    head: HeadSettings
    mesh: Mesh
    rules: Mapping
    gradients: Any
    dtype: Any


class Whole(NamedTuple):
    """What a micro-batch has to know of its mini-batch: the loss's constants and the denominators."""

    hyper: Mapping
    num_tokens: Any
    num_sequences: Any


@functools.lru_cache(maxsize=8)  # consecutive runs in one process share what is traced and compiled
def build_programs(
    config: DecoderConfig,
    mesh: Mesh,
    optimizer: Optimizer,
    objective: Objective,
    *,
    dtype=jnp.float32,
    remat: str = "none",
    attention: str = "auto",
    sequence_parallel: bool = False,
    lora: LoRA | None = None,
) -> Programs:
    """The learner's programs. dtype: compute dtype (sums, softmax and log-probs stay float32). lora: train these
    adapters beside a frozen base.

    remat, attention: see models.decoder.Decoder and models.attention.resolve_implementation. sequence_parallel: between
    blocks, tokens are split over the mesh's tensor axis, which must divide them. Raises ValueError for unknown
    names of the objective.
    """
    if objective.balance_coef and not config.num_experts:
        raise UserError(f"config.algorithm.balance_coef={objective.balance_coef}, but the model has no experts")
    loss, loss_hyper = resolve(LOSSES, "loss", objective.loss, objective.loss_hyper)
    correction, correction_hyper = resolve(
        CORRECTIONS, "correction", objective.correction, objective.correction_hyper)
    platform = mesh.devices.flat[0].platform
    attention = attention_kernel(attention, mesh)
    rules = logical_rules(mesh, config.num_kv_heads, config.vocab_size, sequence_parallel)
    head = HeadSettings(
        temperature=objective.temperature,
        tied=config.tie_embeddings,
        chunk=512 if platform == "cpu" else 4096,  # CPU: a chunk's logits stay in cache
        saved_bytes=2**28 if platform == "cpu" else 0,
        mesh=mesh,
        shard_vocab=rules["vocab"] is not None,
        frozen=lora is not None,
        narrow=config.narrow,
    )
    # Outputs have the shardings of the inputs, so that a second call does not compile again.
    resting = sharding_of(abstract_state(config, optimizer, mesh, rules=rules, lora=lora))
    model = Decoder(config, dtype=dtype, remat=remat, attention=attention)
    parts = Parts(objective, loss, loss_hyper, correction, correction_hyper, optimizer, model, head, mesh, rules,
                  resting.params, dtype)
    return Programs(
        update=jax.jit(functools.partial(_update, parts, resting.opt_state), donate_argnums=0,
                       out_shardings=(resting, replicated(mesh))),
        score=jax.jit(functools.partial(_score, parts), out_shardings=NamedSharding(mesh, P(None, BATCH))),
    )


# --- the two programs ---------------------------------------------------------------------------------------------


def _score(parts: Parts, params, batch: PackedBatch):
    params = _cast(params, parts.dtype)

    def one(i, out):
        pair, _ = _forward(parts, params, _micro(batch, i))
        return tuple(lax.dynamic_update_index_in_dim(o, x, i, 0) for o, x in zip(out, pair, strict=True))

    zeros = jnp.zeros(batch.tokens.shape, jnp.float32)
    return lax.fori_loop(0, batch.num_micro, one, (zeros, zeros))


def _update(parts: Parts, moments_rest, state: TrainState, batch: PackedBatch, frozen=None):
    """moments_rest: shardings of the optimizer's state between updates."""
    whole = _whole(parts, join(frozen, state.params), batch)
    total, grads, sums, maxima = _gradient(parts, state.params, frozen, batch, whole)
    grad_norm, lr = optax.tree.norm(grads), parts.optimizer.schedule(state.step)
    state = state.replace(opt_state=on_device(state.opt_state, moments_rest))
    state, ok = _apply(state, grads, parts.optimizer, jnp.isfinite(total) & jnp.isfinite(grad_norm))
    metrics = _metrics(total, grad_norm, sums, maxima, batch.num_tokens, lr=lr, ok=ok)
    return state.replace(opt_state=on_host(state.opt_state, moments_rest)), metrics


def _whole(parts: Parts, params, batch: PackedBatch) -> Whole:
    """The constants of a loss that depend on the whole mini-batch, and the denominators. With drop_rejected,
    they count no rejected tokens."""
    loss, on_policy, drops = parts.loss, parts.objective.on_policy, parts.correction_hyper["drop_rejected"]
    hyper, num_tokens, num_sequences = parts.loss_hyper, batch.num_tokens, batch.num_sequences
    if loss.prepare is None and not drops:
        return Whole(hyper, num_tokens, num_sequences)
    now, entropy = batch.old_logprobs, None
    if loss.prepare is not None or on_policy:
        now, entropy = _score(parts, params, batch)
    rows = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), _inputs(parts, batch, now, entropy))
    if loss.prepare is not None:
        hyper = loss.prepare(rows, hyper)
    if drops:
        weights, _ = parts.correction.fn(rows, parts.correction_hyper)
        kept = effective_mask(rows.mask, weights, parts.correction_hyper)
        num_tokens, num_sequences = jnp.sum(kept), count_sequences(kept, rows.segment_ids)
    return Whole(hyper, num_tokens, num_sequences)


def _gradient(parts: Parts, params, frozen, batch: PackedBatch, whole: Whole):
    """(loss, gradient of params in float32, sums, maxima) of the mini-batch, folded over its micro-batches."""
    params, frozen = _cast(params, parts.dtype), _cast(frozen, parts.dtype)

    def share(params, micro):
        return _micro_loss(parts, join(frozen, params), micro, whole)

    gradient = jax.value_and_grad(share, has_aux=True)
    (_, (sums, maxima)), _ = jax.eval_shape(gradient, params, _micro(batch, 0))

    def one(i, carry):
        total, grads, sums, maxima = carry
        (value, (s, m)), g = gradient(params, _micro(batch, i))
        grads = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, g)
        grads = lax.with_sharding_constraint(grads, parts.gradients)
        return total + value, grads, jax.tree.map(jnp.add, sums, s), jax.tree.map(jnp.maximum, maxima, m)

    grads = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    grads = lax.with_sharding_constraint(grads, parts.gradients)
    lowest = jax.tree.map(lambda s: jnp.full(s.shape, -jnp.inf, s.dtype), maxima)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
    start = (jnp.zeros((), jnp.float32), grads, zeros, lowest)
    return lax.fori_loop(0, batch.num_micro, one, start)


# --- one micro-batch ----------------------------------------------------------------------------------------------


def _micro_loss(parts: Parts, params, micro: PackedBatch, whole: Whole):
    """(share of the mini-batch's loss, (sums, maxima) of statistics) of one micro-batch."""
    objective = parts.objective
    pair, load = _forward(parts, params, micro)
    inputs = _inputs(parts, micro, *pair)
    mask, entropy = inputs.mask, inputs.entropy
    token_loss, sums = parts.loss.fn(inputs, whole.hyper)
    weights, weight_sums = parts.correction.fn(inputs, parts.correction_hyper)
    if objective.correction != "none":
        token_loss = token_loss * weights
        sums |= {f"correction/{k}": v for k, v in weight_sums.items()}
    if objective.kl_coef:
        old = inputs.old_logp if objective.kl_unbiased else None
        kl = kl_estimate(inputs.logp, inputs.ref_logp, objective.kl_kind, objective.kl_value_clamp, old) * mask
        token_loss += objective.kl_coef * kl
        sums["kl"] = lax.stop_gradient(jnp.sum(kl))
    if objective.entropy_coef:
        token_loss += entropy_bonus(entropy, objective.entropy_coef)
    kept = effective_mask(mask, weights, parts.correction_hyper)
    total = aggregate(token_loss, kept, inputs.segment_ids, objective.aggregation or parts.loss.aggregation,
                      whole.num_tokens, whole.num_sequences, objective.norm_length)
    mismatch = mismatch_stats(inputs)
    sums |= {"entropy": lax.stop_gradient(jnp.sum(entropy * mask)), "logprob_diff": mismatch["logprob_diff"]}
    log_ratio = lax.stop_gradient(inputs.log_ratio) * mask
    maxima = {"logprob_diff/max": mismatch["logprob_diff_max"], "log_ratio": jnp.max(log_ratio)}
    if load is not None:
        tokens, live = jnp.sum(mask), jnp.sum(micro.segment_ids > 0)
        balance = balance_loss(*load, live)
        total += objective.balance_coef * balance * tokens / jnp.maximum(micro.num_tokens, 1)
        even = jnp.maximum(live, 1) * parts.model.config.experts_per_token / load[0].shape[-1]
        maxima["moe/load_max"] = lax.stop_gradient(jnp.max(load[0]) / even)
        sums["moe/balance_loss"] = lax.stop_gradient(balance) * tokens
    return total, (sums, maxima)


def _forward(parts: Parts, params, micro: PackedBatch):
    """((logp, entropy) [R, T], load) of a micro-batch. load: by layer, what models.moe.balance says of the experts;
    None without experts."""
    load = None
    with use(parts.mesh, parts.rules):
        arguments = (micro.tokens, micro.positions, micro.segment_ids, None, micro.parents, micro.experts)
        if parts.model.config.num_experts:
            (hidden, _), found = parts.model.apply({"params": params}, *arguments, mutable=[AUXILIARY])
            load = found[AUXILIARY]["layers"]["mlp"]["load"]
        else:
            hidden, _ = parts.model.apply({"params": params}, *arguments)
    matrix = params["embed"]["embedding"] if parts.head.tied else params["lm_head"]["kernel"]
    where = micro.response_mask, micro.capacity
    return response_logprobs(hidden, matrix, micro.tokens, *where, settings=parts.head, least=micro.least), load


def _inputs(parts: Parts, batch: PackedBatch, logp, entropy) -> LossInputs:
    """What the loss sees of a batch [..., R, T], given the current policy's log-probs and entropies there."""
    objective = parts.objective
    scored = lax.stop_gradient(logp) if objective.on_policy else batch.old_logprobs
    advantages = batch.advantages
    if objective.entropy_advantage is not None and entropy is not None:
        advantages = entropy_advantages(advantages, entropy, *objective.entropy_advantage) * batch.response_mask
    return LossInputs(
        logp=logp,
        old_logp=jnp.where(batch.stale > 0, batch.sampler_logprobs, scored),
        advantages=advantages,
        mask=batch.response_mask,
        segment_ids=batch.segment_ids,
        sampler_logp=batch.sampler_logprobs,
        entropy=entropy,
        ref_logp=batch.ref_logprobs if objective.scores_reference else None,
    )


def _micro(batch: PackedBatch, i) -> PackedBatch:
    """Micro-batch i: the same record with [R, T] arrays."""
    names = (*PER_TOKEN, *(name for name in OPTIONAL if getattr(batch, name) is not None))
    return batch.replace(**{k: lax.dynamic_index_in_dim(getattr(batch, k), i, 0, keepdims=False) for k in names})


def _cast(params, dtype):
    """Parameters in the compute dtype, once per program and before any gather over the mesh; norms and int8 stay."""
    stays = lambda kind, x: kind == NORM or x.dtype == jnp.int8  # noqa: E731
    return jax.tree.map(lambda kind, x: x if stays(kind, x) else x.astype(dtype), kinds(params), params)


# --- after the gradient -------------------------------------------------------------------------------------------


def _apply(state: TrainState, grads, optimizer: Optimizer, ok) -> tuple[TrainState, Any]:
    """(the state after one optimizer step, True); or (the same state with the skip counted, False) where not ok, or
    where the step itself is not finite: a learning rate of NaN, 0 / 0, or a moment beyond the number format."""
    updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
    params = add_updates(state.params, updates, state.step)
    ok &= _all_finite((params, opt_state))
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)  # noqa: E731
    return state.replace(
        step=state.step + ok,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + ~ok,
        skipped_in_a_row=jnp.where(ok, 0, state.skipped_in_a_row + 1),
    ), ok


def _all_finite(tree):
    """bool []: no NaN and no infinity anywhere."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in floats])


def _metrics(loss, grad_norm, sums, maxima, num_tokens, *, lr, ok):
    """Sums over response tokens become means; names as in metrics.jsonl. What a loss reports beyond the usual
    goes under "policy/"."""
    mean = {k: v / jnp.maximum(num_tokens, 1) for k, v in sums.items()}
    names = {"clip_low": "clip_fraction/low", "clip_high": "clip_fraction/high", "ratio": "ratio/mean",
             "logprob_diff": "logprob_diff/mean", "entropy": "entropy", "kl": "kl"}
    out = {names.get(k, k if "/" in k else f"policy/{k}"): v for k, v in mean.items()}
    out |= {"loss": loss, "grad_norm": grad_norm, "lr": lr, "nonfinite": 1 - ok.astype(jnp.float32)}
    out |= {"ratio/max": jnp.exp(maxima["log_ratio"]), **{k: v for k, v in maxima.items() if k != "log_ratio"}}
    return {k: jnp.asarray(v, jnp.float32) for k, v in out.items()}


# --- batches on the mesh ------------------------------------------------------------------------------------------


def place_batch(batch: PackedBatch, mesh: Mesh) -> PackedBatch:
    """The batch on the mesh, rows split over data, fsdp and expert. Every process gives the rows of its own shards
    (`runtime.mesh.own_shards`); a single process gives all."""
    own, shards = own_shards(mesh), num_batch_shards(mesh)

    def put(x):
        x = np.asarray(x)
        if x.ndim < 3:
            return jax.make_array_from_callback(x.shape, replicated(mesh), lambda index: x[index])
        depth = x.shape[1] // len(own)  # rows of a shard

        def part(index):
            place = np.searchsorted(own, (index[1].start or 0) // depth) * depth
            return x[:, place : place + depth]

        whole = (x.shape[0], depth * shards, *x.shape[2:])
        return jax.make_array_from_callback(whole, NamedSharding(mesh, P(None, BATCH)), part)

    return jax.tree.map(put, batch)


def own_rows(array: jax.Array) -> np.ndarray:
    """The inverse of `place_batch` for one array [M, R, T]: this process's rows of it."""
    parts = {shard.index[1].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis=1)


def abstract_batch(mesh: Mesh, shape: tuple[int, int, int], capacity: int, *, share_prompts: bool = False,
                   replay: bool = False, experts: jax.ShapeDtypeStruct | None = None) -> PackedBatch:
    """PackedBatch of jax.ShapeDtypeStruct for [M, R, T] = shape. experts: [L, k] of a token, if they are replayed."""
    rows = NamedSharding(mesh, P(None, BATCH))
    fields: dict[str, Any] = {
        k: jax.ShapeDtypeStruct(shape, jnp.int32 if i < 3 else jnp.float32, sharding=rows)
        for i, k in enumerate(PER_TOKEN)
    }
    fields["parents"] = fields["segment_ids"] if share_prompts else None
    fields["least"] = fields["advantages"] if replay else None
    if experts is not None:
        fields["experts"] = jax.ShapeDtypeStruct((*shape, *experts.shape), experts.dtype, sharding=rows)
    scalar = lambda d: jax.ShapeDtypeStruct((), d, sharding=replicated(mesh))  # noqa: E731
    return PackedBatch(**fields, num_micro=scalar(jnp.int32), num_tokens=scalar(jnp.float32),
                       num_sequences=scalar(jnp.float32), capacity=capacity)
