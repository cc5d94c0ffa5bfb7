"""Builds the parts of a run from the configuration. Functions only; nothing here trains."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl import memory
from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner, lora_of, needs_reference
from jaxrl.rollout.engine import Engine
from jaxrl.rollout.placement import place
from jaxrl.rollout.requests import decodable
from jaxrl.runtime import cli, distributed, hardware, storage
from jaxrl.runtime import mesh as meshes
from jaxrl.runtime.checkpoint import Checkpointer, restore
from jaxrl.runtime.metrics import MetricsWriter
from jaxrl.runtime.model_source import description, load_model
from jaxrl.runtime.rundir import RunDir, open_run_dir
from jaxrl.runtime.storage import atomic_write
from jaxrl.runtime.watchdog import Watchdog
from jaxrl.tasks import dial
from models.config import DecoderConfig, from_hf, to_hf
from models.decoder import abstract_params, init_params
from models.lora import CONFIG as ADAPTER_CONFIG
from models.lora import abstract_adapters, fingerprint, frozen_base, read_lora, to_peft
from models.tokenizers import Tokenizer, load_tokenizer, vocab_tokenizer


def start_backend(config) -> None:
    """Join the other hosts, if any, and set jax's compilation cache. Call it before anything touches a device.

    On GPUs it also sets the share of memory that jax allocates at the start to what preflight assumes; jax's own
    default is three quarters.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(hardware.GPU_MEMORY))
    if config.distributed:
        distributed.initialize(config.watchdog.heartbeat, config.hosts)
    else:
        distributed.refuse_alone(config.hosts)
    if config.compilation_cache:
        cli.use_compilation_cache(str(config.run_dir))


def mesh(config, devices=None):
    """The device mesh of config.mesh over `devices`, default all of them."""
    m = config.mesh
    return meshes.make_mesh(m.data, m.fsdp, m.tensor, devices, m.slices, expert=m.expert)


def decoder_config(config, tokenizer: Tokenizer | None = None) -> DecoderConfig:
    """The decoder config of config.model, from its directory or from its shape (vocab_size 0: the tokenizer's)."""
    decoder = _model_config(config.model.path) if config.model.path else _shape_config(config, tokenizer)
    lora = lora_of(config, decoder)
    decoder = dataclasses.replace(decoder, narrow=config.model.products == "bfloat16")
    return dataclasses.replace(decoder, lora_scale=lora.scale) if lora else decoder


def _shape_config(config, tokenizer: Tokenizer | None) -> DecoderConfig:
    shape = dict(config.model.shape)
    if shape["vocab_size"] == 0:
        if tokenizer is None:
            raise UserError("config.model.shape.vocab_size is 0 and there is no tokenizer to take it from")
        shape["vocab_size"] = tokenizer.vocab_size
    try:
        return DecoderConfig(**shape)
    except ValueError as e:
        raise UserError(f"config.model.shape: {e}") from e


def _model_config(path: str) -> DecoderConfig:
    """Decoder config of a Hugging Face or run directory; UserError naming the file if it does not fit."""
    try:
        return from_hf(description(path, "config.model.path"))
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from e


def tokenizer(config) -> Tokenizer:
    """The tokenizer of config.model.tokenizer ("dial", a path, or "" for the one beside the model)."""
    source = config.model.tokenizer or config.model.path
    if source == "dial":
        return vocab_tokenizer(dial.PIECES, eos=dial.END, pad=dial.PAD, name="dial")
    if not source:
        raise UserError("config.model.tokenizer is empty and there is no config.model.path to take it from")
    key = f"config.model.{'tokenizer' if config.model.tokenizer else 'path'}"
    try:
        return load_tokenizer(description(source, key))
    except UserError:
        raise
    except (ValueError, OSError) as e:
        raise UserError(f"{key}={source}: {e}") from e


def param_shardings(decoder: DecoderConfig, on) -> tuple[Any, Any]:
    """(abstract fp32 parameters, their NamedShardings on the mesh `on`)."""
    abstract, logical = abstract_params(decoder)
    rules = meshes.logical_rules(on, decoder.num_kv_heads, decoder.vocab_size)
    return abstract, meshes.shardings(on, logical, rules, abstract)


def params_maker(config, decoder: DecoderConfig, on) -> Callable[[], Any]:
    """A function that loads or initialises the parameters, straight into their shards."""
    lora = config.model.lora
    frozen = (lora.rank or lora.path) and not config.sft.steps  # then no float32 copy of the model is ever needed
    rests = "float32" if lora.base == "float32" else "bfloat16"
    dtype = jnp.dtype(rests if frozen else config.model.param_dtype)
    _, where = param_shardings(decoder, on)
    if config.model.path:
        return lambda: load_model(config.model.path, dtype, where, key="config.model.path")[1]
    key = jax.random.key(config.seed)
    return lambda: jax.jit(lambda k: init_params(decoder, k, dtype), out_shardings=where)(key)


def _placement(config, decoder: DecoderConfig, on):
    elsewhere = on.devices.flat[0].platform != jax.default_backend()  # preflight: one chip that is not here
    int8 = config.sampling.weights == "int8"
    return place(decoder, on, config.sampling.tensor, int8=int8) if on.size > 1 or elsewhere else None


def _sampler_dtype(config):
    return jnp.dtype(config.model.sampler_dtype or config.model.dtype)


def _sampler_sizes(config) -> dict[str, int]:
    s = config.sampling
    return dict(max_prompt=s.max_prompt, max_tokens=max(s.max_tokens, config.eval.max_tokens), slots=s.slots)


def cache_sizes(config, decoder: DecoderConfig, on) -> dict[str, int]:
    """config.sampling.pages and cache_tokens, resolved for the chips of the mesh `on`; see memory.cache_sizes."""
    s, placement = config.sampling, _placement(config, decoder, on)
    device = (placement.mesh if placement else on).devices.flat[0]
    return memory.cache_sizes(
        decoder, _sampler_dtype(config), placement, device, **_sampler_sizes(config), pages=s.pages,
        tokens=s.cache_tokens, chunk=s.chunk, int8_weights=s.weights == "int8", int8_cache=s.cache == "int8",
        lives=lambda: memory.of_learner(config, Learner(config, decoder, on)),
    )


def sampler(config, decoder: DecoderConfig, tok: Tokenizer, on) -> Engine:
    """The sampler of config.sampling, on the devices of this host that belong to the mesh `on`."""
    s, placement = config.sampling, _placement(config, decoder, on)
    if placement and s.slots % placement.row_multiple:
        raise UserError(
            f"config.sampling.slots={s.slots} must be a multiple of {placement.row_multiple}, this host's copies of "
            "the sampler's weights"
        )
    if s.max_prompt + s.max_tokens > decoder.max_position_embeddings:
        raise UserError(
            f"config.sampling.max_prompt={s.max_prompt} + max_tokens={s.max_tokens} is above the model's context of "
            f"{decoder.max_position_embeddings}"
        )
    return Engine(
        decoder,
        tok.eos_ids,
        **_sampler_sizes(config),
        **cache_sizes(config, decoder, on),
        chunk=s.chunk,
        prefill_chunk=s.prefill_chunk,
        window=s.window,
        dtype=_sampler_dtype(config),
        placement=placement,
        weights=s.weights,
        cache=s.cache,
        allowed=decodable(tok, decoder.vocab_size),
        record=("kept",) * s.replay + ("experts",) * s.router_replay,
    )


def checkpointer(config, run: RunDir) -> Checkpointer:
    """The checkpoints of a run, kept as config.checkpoint says."""
    kept = dict(keep_last=config.checkpoint.keep, keep_best=config.checkpoint.keep_best)
    return Checkpointer(run.checkpoints, **kept, before_commit=run.publish)


def writer(config, run: RunDir, state: dict | None, rewound: bool = False) -> MetricsWriter:
    """The writer of a run's metrics. state: its state in a checkpoint, None for a new run. rewound: the run has gone
    back to that checkpoint."""
    trackers = [name for name in ("tensorboard", "wandb") if config.log[name]]
    return MetricsWriter(
        run.local,
        trackers,
        state=state,
        config=config.to_dict(),
        wandb={"project": config.log.wandb_project},
        rewound=rewound,
        enabled=distributed.is_main(),
    )


def watchdog(config, run: RunDir):
    """The watchdog, or a stand-in with the same `beat` when it is off."""
    if config.watchdog.seconds > 0:
        return Watchdog(run.root, config.watchdog.seconds)

    return contextlib.nullcontext(types.SimpleNamespace(beat=lambda *_: None))


def run_dir(config) -> RunDir:
    """The run directory, locked. Only process 0 writes there, and before `describe_run` it writes only the lock."""
    if not distributed.is_main():
        return RunDir(storage.as_path(config.run_dir, "config.run_dir"))
    return open_run_dir(config.run_dir, config.resume)


def describe_run(run: RunDir, config, decoder: DecoderConfig, tok: Tokenizer, step: int) -> list[str]:
    """Writes what others need to read the run: the resolved config, the decoder's config.json, the tokenizer.

    Call it only when the checkpoints are known to fit: a start with another model must leave the run readable.
    step: the step from which the run continues; rollout samples of later steps are removed, as they are made again.

    Returns one line for each setting that has changed since the last start of the run.
    """
    if not distributed.is_main():
        return []
    run.drop_samples_after(step)
    changed = run.write_config(config.to_dict())
    home = run.local / "model"
    home.mkdir(exist_ok=True)
    tok.save(home)
    atomic_write(home / "config.json", json.dumps(to_hf(decoder), indent=2) + "\n")
    if lora := lora_of(config, decoder):
        atomic_write(home / ADAPTER_CONFIG, json.dumps(to_peft(decoder, lora, config.model.path), indent=2) + "\n")
    atomic_write(home / "generation_config.json", json.dumps({"eos_token_id": list(tok.eos_ids)}) + "\n")
    return [f"config.{key} is {now!r}, was {before!r}" for key, (before, now) in changed.items()]


def reference(config, run: RunDir, learner, params):
    """Parameters of the frozen reference model (those at step 0), or None if nothing in the config needs it. With
    adapters it is their frozen base, which takes no extra memory.

    They are kept in run_dir/reference, so that a resumed run compares with the same model. params: the parameters of a
    new run, which are copied; None reads the reference back. Raises UserError if it is not there.
    """
    if not needs_reference(config) or learner.lora:
        return learner.frozen
    with Checkpointer(run.root / "reference", keep_last=1) as store:
        if params is not None:
            copy = jax.tree.map(jnp.copy, params)
            store.save(0, {"params": copy}, {})
            return copy
        found = store.restore({"params": learner.abstract_state().params})
        if found is None:
            raise UserError(f"{run.root}/reference is missing: this run began without a reference model "
                            "(config.algorithm.kl_coef=0)")
        return found.arrays["params"]


def keep_base(config, run: RunDir, learner) -> str:
    """Fingerprint of the frozen base of a new run's adapters; "" in full training. A base from random weights or from a
    warm start is saved in run_dir/base; a base that was read from a directory will be read from there again."""
    if not learner.lora:
        return ""
    if config.sft.steps or not config.model.path:
        with Checkpointer(run.root / "base", keep_last=1) as store:
            store.save(0, {"params": learner.frozen}, {})
    return fingerprint(learner.frozen)


def find_base(config, run: RunDir, learner, decoder: DecoderConfig, on, *, identity: str) -> None:
    """Gives the learner of a continued run its frozen base. Raises UserError if it differs from the original base, or
    if the adapters now count with another factor: the checkpoints would mean other models."""
    if not learner.lora:
        return
    before = read_lora(description(run.root, "config.run_dir"), decoder)
    if before.scale != learner.lora.scale:
        raise UserError(f"config.model.lora.alpha={learner.lora.alpha}, rslora={learner.lora.rslora}: the adapters of "
                        f"{run.root} were trained with alpha={before.alpha}, rslora={before.rslora}")
    found = restore(run.root / "base", {"params": learner.abstract_base()})
    if found:
        learner.frozen = found.arrays["params"]
    else:
        learner.frozen = frozen_base(params_maker(config, decoder, on)(), decoder, config.model.lora.base)
    if fingerprint(learner.frozen) != identity:
        raise UserError(f"config.model.path={config.model.path}: not the weights that the adapters of {run.root} were "
                        "trained beside; name those, or start a new run")


def describe(config, decoder: DecoderConfig, on) -> str:
    """One line: model size, method, devices."""
    abstract, _ = abstract_params(decoder)
    count = sum(a.size for a in jax.tree.leaves(abstract))
    a, lora = config.algorithm, lora_of(config, decoder)
    trained = sum(a.size for a in jax.tree.leaves(abstract_adapters(decoder, lora)[0])) if lora else count
    adapters = f", {trained:,} of them in adapters of rank {lora.rank}" if lora else ""
    count += trained if lora else 0
    return (
        f"{decoder.model_type} with {count:,} parameters{adapters}; loss {a.loss}, advantage {a.advantage}, selection "
        f"{a.selection}, length {config.length.reward}; {on.size} {on.devices.flat[0].platform} device(s)"
    )
