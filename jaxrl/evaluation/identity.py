"""Digests of what a result depends on: two evaluations are the same only if these are equal.

A path is not enough, because weights can be replaced, a run trained again, or a reward function edited.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib
from collections.abc import Iterable

from etils import epath

from jaxrl.errors import UserError
from jaxrl.runtime import manifest, storage
from jaxrl.runtime.model_source import description, is_run

WEIGHTS = ("*.safetensors",)
TEXT = ("*.json", "*.model", "*.txt", "*.jinja")  # config, tokenizer, chat template, generation config


def digest_files(paths: Iterable[pathlib.Path]) -> str:
    """16 hexadecimal digits over the names and contents of files, whatever their order and folder."""
    whole = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        whole.update(path.name.encode() + b"\0" + bytes.fromhex(storage.sha256(path)))
    return whole.hexdigest()[:16]


def model_identity(model: str, step: int | None) -> dict[str, str]:
    """{"weights", "tokenizer"}: digests of the weights of a Hugging Face directory or of a run's checkpoint, and of the
    text files beside them (config, tokenizer, chat template)."""
    root, home = epath.Path(model), description(model, "--model")
    if is_run(root):
        # a checkpoint's manifest holds the digests of all its files
        path = dict(manifest.step_paths(root / "checkpoints")).get(step)
        weights = digest_files([path / manifest.MANIFEST]) if path and storage.exists(path / manifest.MANIFEST) else ""
    elif storage.is_remote(root):  # the store's own digests: otherwise all weights would be downloaded
        weights = storage.fingerprint(root, ".safetensors")
    else:
        weights = digest_files(p for pattern in WEIGHTS for p in root.glob(pattern))
    return {"weights": weights, "tokenizer": digest_files(p for pattern in TEXT for p in home.glob(pattern))}


def reward_identity(spec: str) -> str:
    """The reward function "module:function" with the digest of its file; "" for none.

    Raises UserError if there is no such module.
    """
    if not spec:
        return ""
    module = spec.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.origin:
        raise UserError(f"--reward={spec}: no module {module!r}")
    return f"{spec} {digest_files([pathlib.Path(found.origin)])}"
