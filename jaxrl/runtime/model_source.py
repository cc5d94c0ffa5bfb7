"""A model argument is a Hugging Face directory or a run directory; this file makes the two look alike.

A run directory holds `model/` (Hugging Face config.json and the tokenizer, written when the run starts) and
`checkpoints/`, from which only the parameters are read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxrl.errors import UserError
from jaxrl.runtime import checkpoint, manifest, storage
from models import lora
from models.config import DecoderConfig, from_hf
from models.decoder import abstract_params
from models.tokenizers import Tokenizer, load_tokenizer
from models.weights import load_params


def is_run(path: str | os.PathLike) -> bool:
    """Whether `path` is a run directory, as opposed to a Hugging Face directory."""
    with storage.user_errors():
        return storage.exists(epath.Path(path) / "model" / "config.json")


def description(path: str | os.PathLike, key: str) -> pathlib.Path:
    """A local directory with config.json and tokenizer of a Hugging Face or run directory; key: of `path`, for errors.

    Raises UserError for a path that cannot be read.
    """
    home = storage.as_path(path, key)
    return storage.local_copy(str(home / "model" if is_run(home) else home), key, _small)


def _small(names: list[str]) -> list[str]:
    return [n for n in names if "/" not in n and not n.endswith((".safetensors", ".bin", ".pth", ".gguf"))]


def checkpoint_steps(path: str | os.PathLike) -> list[int]:
    """Steps of a run's committed checkpoints, ascending; [] for a Hugging Face directory."""
    return [checkpoint.step for checkpoint in manifest.list_checkpoints(epath.Path(path) / "checkpoints")]


def run_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The configuration of a run, as a nested dict; {} for a Hugging Face directory."""
    config = epath.Path(path) / "config.json"
    return json.loads(storage.read(config)) if is_run(path) and storage.exists(config) else {}


def load_model(
    path: str | os.PathLike, dtype: Any = jnp.float32, shardings: Any = None, step: int | None = None,
    key: str = "--model",
) -> tuple[DecoderConfig, dict[str, Any], Tokenizer]:
    """Config, parameters and tokenizer of a Hugging Face directory or of a run.

    Args:
      dtype: of the returned parameters, whatever was stored.
      shardings: tree of jax.sharding.Sharding like the parameters, for loading straight to their devices, or
        a function of the config that gives it.
      step: which checkpoint of a run; None is the newest whole one. Not allowed for a Hugging Face directory.
      key: the setting that `path` comes from, for errors.

    Raises UserError, one line naming the file, if anything is missing, damaged or does not fit.
    """
    root = storage.as_path(path, key)
    try:
        if not storage.is_remote(root) and not root.is_dir():
            raise UserError(f"{root}: no such directory; need a Hugging Face model or a run directory")
        home = description(root, key)
        config, tokenizer = from_hf(home), load_tokenizer(home)
        shardings = shardings(config) if callable(shardings) else shardings
        if is_run(root):
            return config, _run_params(root, home, config, dtype, shardings, step=step), tokenizer
        if step is not None:
            raise UserError(f"{root}: a Hugging Face directory has no checkpoint of step {step}")
        return config, load_params(root, config, shardings, dtype), tokenizer
    except ValueError as e:
        raise e if isinstance(e, UserError) else UserError(str(e)) from e
    except Exception as e:
        if storage.is_remote(root):  # whatever the store's client raises
            raise UserError(f"{key}={root}: {storage.explain(e)[0]}") from e
        raise


def _run_params(root: epath.Path, home, config: DecoderConfig, dtype, shardings, *, step) -> dict[str, Any]:
    """home: a local directory with the run's description."""
    if (home / lora.CONFIG).exists():
        return _merged_params(root, home, config, dtype, shardings, step=step)
    stored, _ = abstract_params(config, stored_dtype(root, step))
    if shardings is not None:
        stored = jax.tree.map(
            lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), stored, shardings
        )
    found = checkpoint.restore(root / "checkpoints", {"params": stored}, step=step, partial=True)
    if found is None:
        raise UserError(f"{root}: the run has no checkpoint yet")
    params = found.arrays["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _merged_params(root: epath.Path, home, config: DecoderConfig, dtype, shardings, *, step) -> dict[str, Any]:
    """The parameters of a run that trained adapters, merged into their base: an ordinary model."""
    settings, found = _adapters(root, home, config, step)
    model = run_settings(root)["model"]
    kind = model["lora"]["base"]
    if kept := checkpoint.restore(root / "base", {"params": lora.abstract_base(config, kind)[0]}):
        base = kept.arrays["params"]
    else:
        rests = jnp.float32 if kind == "float32" else jnp.bfloat16
        base = lora.frozen_base(load_model(model["path"], rests, shardings)[1], config, kind)
    if lora.fingerprint(base) != found.host["base"]:
        raise UserError(f"{model['path']}: not the weights that the adapters of {root} were trained beside")
    config = dataclasses.replace(config, lora_scale=settings.scale)
    merge = jax.jit(lambda params: lora.merge(params, config, dtype), out_shardings=shardings)
    return merge(lora.join(base, found.arrays["params"]))


def _adapters(root: epath.Path, home, config: DecoderConfig, step) -> tuple[lora.LoRA, checkpoint.Restored]:
    settings = lora.read_lora(home, config)
    stored, _ = lora.abstract_adapters(config, settings, stored_dtype(root, step))
    found = checkpoint.restore(root / "checkpoints", {"params": stored}, step=step, partial=True)
    if found is None:
        raise UserError(f"{root}: the run has no checkpoint yet")
    return settings, found


def load_run_adapters(path: str | os.PathLike, step: int | None = None) -> tuple[DecoderConfig, lora.LoRA, Any, str]:
    """(decoder config, LoRA, adapters, path of the base as the run names it) of a run that trained adapters; step as
    for `load_model`. Raises UserError if it did not, or has no such checkpoint."""
    root, home = storage.as_path(path, "RUN"), description(path, "RUN")
    if not (home / lora.CONFIG).exists():
        raise UserError(f"{path}: this run trained the whole model, not adapters")
    settings, found = _adapters(root, home, config := from_hf(home), step)
    return config, settings, found.arrays["params"], run_settings(path)["model"]["path"]


def stored_dtype(root: str | os.PathLike, step: int | None):
    """The parameters' dtype in a checkpoint, so that the run's configuration is not needed for it."""
    paths = dict(manifest.step_paths(epath.Path(root) / "checkpoints"))
    for s in sorted(paths, reverse=True) if step is None else [step]:
        try:
            arrays = manifest.read_manifest(paths[s])["arrays"]
            return jnp.dtype(next(spec["dtype"] for name, spec in arrays.items() if name.startswith("params/")))
        except (KeyError, StopIteration, manifest.Damaged):  # restore() says what is wrong with it
            continue
    return jnp.float32
