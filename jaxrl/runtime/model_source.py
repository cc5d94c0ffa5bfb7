"""A model argument is a Hugging Face directory or a run directory; this file makes the two look alike.

A run directory holds `model/` (Hugging Face config.json and the tokenizer, written when the run starts) and
`checkpoints/`, from which only the parameters are read.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.errors import UserError
from jaxrl.runtime import checkpoint, manifest
from models.config import DecoderConfig, from_hf
from models.decoder import abstract_params
from models.tokenizers import Tokenizer, load_tokenizer
from models.weights import load_params


def is_run(path: str | os.PathLike) -> bool:
    """Whether `path` is a run directory, as opposed to a Hugging Face directory."""
    return (pathlib.Path(path) / "model" / "config.json").exists()


def checkpoint_steps(path: str | os.PathLike) -> list[int]:
    """Steps of a run's checkpoints, ascending; [] for a Hugging Face directory."""
    return sorted(step for step, _ in manifest.step_paths(pathlib.Path(path) / "checkpoints"))


def run_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The configuration of a run, as a nested dict; {} for a Hugging Face directory."""
    config = pathlib.Path(path) / "config.json"
    return json.loads(config.read_text()) if is_run(path) and config.exists() else {}


def load_model(
    path: str | os.PathLike, dtype: Any = jnp.float32, shardings: Any = None, step: int | None = None
) -> tuple[DecoderConfig, dict[str, Any], Tokenizer]:
    """Config, parameters and tokenizer of a Hugging Face directory or of a run.

    Args:
      dtype: of the returned parameters, whatever was stored.
      shardings: tree of jax.sharding.Sharding like the parameters, for loading straight to their devices, or
        a function of the config that gives it.
      step: which checkpoint of a run; None is the newest whole one. Not allowed for a Hugging Face directory.

    Raises UserError, one line naming the file, if anything is missing, damaged or does not fit.
    """
    root = pathlib.Path(path)
    try:
        if not root.is_dir():
            raise UserError(f"{root}: no such directory; need a Hugging Face model or a run directory")
        home = root / "model" if is_run(root) else root
        config, tokenizer = from_hf(home), load_tokenizer(home)
        shardings = shardings(config) if callable(shardings) else shardings
        if is_run(root):
            return config, _run_params(root, config, dtype, shardings, step), tokenizer
        if step is not None:
            raise UserError(f"{root}: a Hugging Face directory has no checkpoint of step {step}")
        return config, load_params(root, config, shardings, dtype), tokenizer
    except ValueError as e:
        raise e if isinstance(e, UserError) else UserError(str(e)) from e


def _run_params(root: pathlib.Path, config: DecoderConfig, dtype, shardings, step) -> dict[str, Any]:
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


def stored_dtype(root: str | os.PathLike, step: int | None):
    """The parameters' dtype in a checkpoint, so that a run need not tell how it was configured."""
    paths = dict(manifest.step_paths(pathlib.Path(root) / "checkpoints"))
    for s in sorted(paths, reverse=True) if step is None else [step]:
        try:
            return jnp.dtype(manifest.read_manifest(paths[s])["arrays"]["params/final_norm/scale"]["dtype"])
        except (KeyError, manifest.Damaged):  # restore() says what is wrong with it
            continue
    return jnp.float32
