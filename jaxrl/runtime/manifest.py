"""What makes a directory of files a checkpoint: a digest of every file, and a marker written last.

    00000012/
      arrays-00000-000.safetensors ...   arrays.py
      host.json, host.npz                host state
      manifest.json                      step, metrics, {array: shape, dtype, parts}, {file: [bytes, sha256]}
      COMMITTED                          sha256 of manifest.json

The same on a disk and on an object store: nothing is renamed or appended to. A directory without a marker is
half-written, or about to be removed, and does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Sequence

from etils import epath

from jaxrl.runtime import storage
from jaxrl.runtime.storage import atomic_write, fsync_dir

MANIFEST, MARKER = "manifest.json", "COMMITTED"
FORMAT = 2


class Damaged(Exception):
    """A checkpoint that must not be used; the message says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: step, where it is, and the scalar metrics given when it was saved."""

    step: int
    path: epath.Path
    metrics: dict[str, float]


def step_path(directory: str | os.PathLike, step: int) -> epath.Path:
    """Where the checkpoint of a step lies."""
    return epath.Path(directory) / f"{step:08d}"


def step_paths(directory: str | os.PathLike) -> list[tuple[int, epath.Path]]:
    """(step, path) of everything that is named like a checkpoint, oldest first, whole or not."""
    return sorted((int(n), epath.Path(directory) / n) for n in storage.children(directory) if n.isdigit())


def list_checkpoints(directory: str | os.PathLike) -> list[Checkpoint]:
    """The committed checkpoints, oldest first. Only markers are checked here, not the digests of the files."""
    out = []
    for step, path in step_paths(directory):
        try:
            out.append(Checkpoint(step, path, read_manifest(path)["metrics"]))
        except Damaged:
            continue
    return out


def commit(path: str | os.PathLike, manifest: dict) -> None:
    """Seals a directory with its manifest and, at the very end, its marker. Raises OSError."""
    path = epath.Path(path)
    text = json.dumps({"format": FORMAT, **manifest})
    atomic_write(path / MANIFEST, text)
    fsync_dir(path.parent)
    atomic_write(path / MARKER, hashlib.sha256(text.encode()).hexdigest() + "\n")


def unseal(path: str | os.PathLike) -> None:
    """Takes the marker away: from now on this is no checkpoint. Raises OSError."""
    storage.remove_file(epath.Path(path) / MARKER)
    with contextlib.suppress(FileNotFoundError):
        fsync_dir(path)


def remove(path: str | os.PathLike) -> None:
    """Deletes a checkpoint, its marker first, so that after a kill half way the rest does not count. Raises OSError."""
    unseal(path)
    storage.remove(path)


def read_manifest(path: str | os.PathLike) -> dict:
    """The manifest of a checkpoint whose marker fits it. Raises Damaged."""
    path, name = epath.Path(path), MARKER
    try:
        marker = storage.read(path / name).decode().strip()
        name = MANIFEST
        text = storage.read(path / name)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"half-written, {name} is missing") from None
    except storage.StoreError:
        raise
    except (OSError, UnicodeDecodeError) as e:
        raise Damaged(f"unreadable: {e}") from None
    if hashlib.sha256(text).hexdigest() != marker:
        raise Damaged(f"{MANIFEST} does not match {MARKER}")
    manifest = json.loads(text)
    if manifest["format"] != FORMAT:
        raise Damaged(f"its format is {manifest['format']}, this version reads {FORMAT}")
    return manifest


def find_damage(path: str | os.PathLike, manifest: dict, share: int = 0, shares: int = 1) -> str | None:
    """Reads the files again and compares digests; None if all is well, else what is wrong with the first bad one.

    share of shares: which part of the files to check, so that processes can divide the work.
    """
    names = list(manifest["files"])[share::shares]
    try:
        there = storage.files_below(path)
        for name in names:  # cheap checks first, so that a truncated file is named as such
            want, have = manifest["files"][name][0], there.get(name)
            if have is None:
                return f"{name} is missing"
            if have != want:
                return f"{name} has {have} bytes instead of {want}"
        calls = [functools.partial(storage.sha256, epath.Path(path) / name) for name in names]
        for name, digest in zip(names, storage.in_threads(calls), strict=True):
            if digest != manifest["files"][name][1]:
                return f"{name} has changed content (sha256)"
    except storage.StoreError:
        raise
    except OSError as e:
        return f"unreadable: {e}"
    return None


def retained(checkpoints: Sequence[Checkpoint], keep_last: int, metric: str) -> set[int]:
    """Steps to keep: the newest `keep_last`, and the one with the highest `metric` (ties: the newer one).

    Checkpoints without the metric, or with NaN, are never the best.
    """
    last = sorted(c.step for c in checkpoints)[-keep_last:]
    scored = [(c.metrics[metric], c.step) for c in checkpoints if math.isfinite(c.metrics.get(metric, math.nan))]
    return {*last, *(step for _, step in sorted(scored)[-1:])}
