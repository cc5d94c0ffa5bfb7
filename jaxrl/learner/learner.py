"""The learner as the training loop sees it: batches in, a new state and one record of metrics out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.errors import UserError
from jaxrl.learner.packing import PackedBatch
from jaxrl.learner.state import (
    TrainState,
    abstract_state,
    build_optimizer,
    init_state,
    placed,
    sharding_of,
)
from jaxrl.learner.update import Objective, attention_kernel, build_programs, place_batch
from jaxrl.runtime import compiles, storage
from models.attention import SHARES_PROMPTS
from models.config import DecoderConfig
from models.lora import LoRA, abstract_base, frozen_base, join, load_adapters, read_lora, targeted


def objective(config) -> Objective:
    """What config.algorithm minimises."""
    a = config.algorithm
    shaping = (a.entropy_advantage_alpha, a.entropy_advantage_kappa) if a.entropy_advantage else None
    return Objective(
        loss=a.loss,
        loss_hyper=dict(a.loss_hyper[a.loss]),
        aggregation=a.aggregation,
        norm_length=float(a.norm_length or config.sampling.max_tokens),
        temperature=config.sampling.temperature,
        on_policy=config.batch.updates * config.batch.epochs == 1,
        kl_coef=0.0 if a.kl_in_reward else a.kl_coef,
        kl_kind=a.kl_kind,
        kl_value_clamp=a.kl_value_clamp,
        kl_unbiased=a.kl_unbiased,
        entropy_coef=a.entropy_coef,
        balance_coef=a.balance_coef,
        entropy_advantage=shaping,
        correction=a.correction,
        correction_hyper=dict(a.correction_hyper[a.correction]),
    )


def optimizer(config):
    """The optimizer of config.optimizer; decaying schedules end with the last update of the run."""
    o = config.optimizer
    return build_optimizer(
        o.learning_rate,
        warmup_steps=o.warmup_steps,
        schedule=o.schedule,
        total_steps=config.steps * config.batch.updates * config.batch.epochs,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        grad_clip=o.grad_clip,
        state_dtype=jnp.dtype(o.state_dtype),
        offload=o.offload,
    )


def needs_reference(config) -> bool:
    """Whether a run keeps a frozen reference model: for a KL term in loss or reward, or because the loss needs it."""
    return bool(config.algorithm.kl_coef) or objective(config).scores_reference


def lora_of(config, decoder: DecoderConfig) -> LoRA | None:
    """The adapters of config.model.lora; None in full training. Raises UserError for targets that the model lacks or
    a PEFT directory that does not fit."""
    c = config.model.lora
    try:
        if c.path:
            return read_lora(storage.local_copy(c.path, "config.model.lora.path"), decoder)
        if not c.rank:
            return None
        targeted(decoder, c.targets)
        return LoRA(c.rank, c.alpha, tuple(c.targets), c.rslora)
    except (ValueError, OSError) as e:
        raise UserError(f"config.model.lora.{'path' if c.path else 'targets'}: {e}") from e


class Learner:
    """Builds the programs of a configuration once and runs them on the mini-batches of each step.

    lora: the adapters that are trained, or None. frozen: their base, once `init` or `build.find_base` has set it. It is
    not part of the state, so no update copies it and no checkpoint holds it.
    """

    def __init__(self, config, decoder: DecoderConfig, mesh):
        row, tensor = config.batch.row_tokens or 128, mesh.shape["tensor"]
        if config.mesh.sequence_parallel and row % tensor:
            raise UserError(
                f"config.mesh.sequence_parallel: mesh.tensor={tensor} does not divide config.batch.row_tokens={row}"
            )
        kernel = attention_kernel(config.model.attention, mesh)
        if config.batch.share_prompts and kernel not in SHARES_PROMPTS:
            raise UserError(
                f"config.batch.share_prompts: attention {kernel} cannot; set config.model.attention to "
                f"{' or '.join(SHARES_PROMPTS)}"
            )
        if mesh.shape["expert"] > 1 and not decoder.num_experts:
            raise UserError(f"config.mesh.expert={mesh.shape['expert']}, but the model has no experts")
        if config.sampling.router_replay and not decoder.num_experts:
            raise UserError("config.sampling.router_replay=True, but the model has no experts")
        self.decoder, self.mesh = decoder, mesh
        self.param_dtype = jnp.dtype(config.model.param_dtype)
        self.objective, self.optimizer = objective(config), optimizer(config)
        self.lora, self.frozen, self.config = lora_of(config, decoder), None, config
        self.programs = build_programs(
            decoder,
            mesh,
            self.optimizer,
            self.objective,
            dtype=jnp.dtype(config.model.dtype),
            remat=config.model.remat,
            attention=config.model.attention,
            sequence_parallel=config.mesh.sequence_parallel,
            lora=self.lora,
        )

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state, for restoring a checkpoint onto this mesh."""
        return abstract_state(
            self.decoder, self.optimizer, self.mesh, param_dtype=self.param_dtype, lora=self.lora
        )

    def abstract_base(self):
        """Shapes and shardings of the frozen base; None in full training."""
        return self.lora and placed(self.mesh, self.decoder, *abstract_base(self.decoder, self.config.model.lora.base))

    def init(self, params) -> TrainState:
        """A fresh state around params, which must not be used afterwards. With adapters they become the base."""
        parts = self.decoder, self.optimizer, self.mesh
        if self.lora is None:
            return init_state(*parts, params=params, param_dtype=self.param_dtype)
        self.frozen, start = frozen_base(params, self.decoder, self.config.model.lora.base), None
        if self.config.model.lora.path:
            where = sharding_of(self.abstract_state().params)
            files = storage.local_copy(self.config.model.lora.path, "config.model.lora.path")
            start = load_adapters(files, self.decoder, where, self.param_dtype)[1]
        key = jax.random.key(self.config.seed)
        return init_state(*parts, key=key, params=start, param_dtype=self.param_dtype, lora=self.lora)

    def weights(self, state: TrainState):
        """All parameters of the model, adapters beside their matrices: for `score` and the sampler's layout."""
        return join(self.frozen, state.params)

    @property
    def compiles(self) -> int:
        """Programs compiled so far: of update and of score, one for each shape and capacity of the batches seen."""
        return self.programs.update._cache_size() + self.programs.score._cache_size()

    def score(self, params, batch: PackedBatch, *, reference: bool = False):
        """Log-probs of every response token under params: float32 [M, R, T], zero elsewhere. reference: params are of
        another model than the one that sampled, so they choose their own experts."""
        batch = batch.replace(experts=None) if reference else batch
        return self.programs.score(params, place_batch(batch, self.mesh))[0]

    def update(self, state: TrainState, batches: list[PackedBatch], reference: Any = None):
        """Apply one optimizer update per mini-batch, in order.

        Unless the step has exactly one update, old log-probs are scored before the first of them. reference:
        parameters of the frozen reference model, when the objective scores it.

        Returns:
          (state, metrics): means over the updates, maxima for names ending in /max, a sum for "nonfinite"; if that
          is not 0, "nonfinite/updates" lists the numbers of the updates that were skipped.
        """
        scored, records = [self._scored(state, batch, reference) for batch in batches], []
        for batch, scores in zip(batches, scored, strict=True):
            ready = place_batch(batch, self.mesh).replace(**scores)
            jax.block_until_ready(records[-1:])  # so that at most two mini-batches are on the devices
            with compiles.program("update", batch.tokens.shape):
                state, metrics = self.programs.update(state, ready, self.frozen)
            records.append(metrics)
        records = jax.device_get(records)
        skipped = [i for i, record in enumerate(records) if record["nonfinite"]]
        return state, combine(records) | ({"nonfinite/updates": skipped} if skipped else {})

    def _scored(self, state: TrainState, batch: PackedBatch, reference) -> dict[str, Any]:
        """The log-probs that must be known before the first update: fields of PackedBatch, on the devices."""
        models = {} if self.objective.on_policy else {"old_logprobs": self.weights(state)}
        models |= {"ref_logprobs": reference} if self.objective.scores_reference else {}
        return {name: self.score(params, batch, reference=name == "ref_logprobs") for name, params in models.items()}


def combine(records: list[dict]) -> dict[str, float]:
    """Metrics of several updates as one record of Python floats."""
    out = {}
    for name in records[0] if records else ():
        values = np.array([r[name] for r in records], np.float64)
        how = np.max if name.endswith("/max") else np.sum if name == "nonfinite" else np.mean
        out[name] = float(how(values))
    return out
