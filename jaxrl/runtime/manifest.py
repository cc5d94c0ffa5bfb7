"""What makes a directory of files a checkpoint: a digest of every file, and a marker written last.

    00000012/
      arrays/...       orbax
      host.json        host state
      manifest.json    step, metrics, shapes and dtypes by name, {file: [bytes, sha256]}
      COMMITTED        sha256 of manifest.json

The directory is written as `00000012.tmp` and gets its name by a rename at the very end, so a name of digits
only is a finished checkpoint on a POSIX file system. Where a directory's rename is not atomic (object stores
mounted as files), the marker and the digests still tell a half-moved one from a whole one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import threading
from collections.abc import Iterable, Sequence

from jaxrl.runtime.rundir import atomic_write, fsync_dir

MANIFEST, MARKER = "manifest.json", "COMMITTED"
FORMAT = 1


class Damaged(Exception):
    """A checkpoint that must not be used; the message says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: step, where it is, and the scalar metrics given when it was saved."""

    step: int
    path: pathlib.Path
    metrics: dict[str, float]


def step_path(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Where the checkpoint of a step lies."""
    return directory / f"{step:08d}"


def step_paths(directory: str | os.PathLike) -> list[tuple[int, pathlib.Path]]:
    """(step, path) of everything that is named like a checkpoint, oldest first, whole or not."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    return sorted((int(p.name), p) for p in directory.iterdir() if p.name.isdigit() and p.is_dir())


def list_checkpoints(directory: str | os.PathLike) -> list[Checkpoint]:
    """The committed checkpoints, oldest first. Only markers are checked here, not the digests of the
    files."""
    out = []
    for step, path in step_paths(directory):
        try:
            out.append(Checkpoint(step, path, read_manifest(path)["metrics"]))
        except Damaged:
            continue
    return out


def files_below(root: pathlib.Path) -> list[str]:
    """Relative names (with "/") of all files of a checkpoint that the manifest covers, sorted."""
    names = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return sorted(n for n in names if n not in (MANIFEST, MARKER))


def digest_files(root: pathlib.Path, names: Iterable[str], sync: bool, threads: int = 4) -> dict[str, list]:
    """{name: [bytes, sha256]}; `sync` also flushes each file to the disk. Raises OSError.

    Plain threads and not an executor: executors refuse work while the interpreter shuts down, which is when
    the last save of a run may still be under way.
    """
    todo, out, errors = list(names), {}, []

    def work():
        while todo and not errors:
            try:
                name = todo.pop()
            except IndexError:
                return
            try:
                with open(root / name, "rb") as f:
                    out[name] = [os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()]
                    if sync:
                        os.fsync(f.fileno())
            except OSError as e:
                errors.append(e)

    workers = [threading.Thread(target=work) for _ in range(min(threads, len(todo)))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    if errors:
        raise errors[0]
    return {name: out[name] for name in sorted(out)}


def commit(tmp: pathlib.Path, final: pathlib.Path, manifest: dict) -> None:
    """Seals `tmp` with its manifest and marker and gives it its final name. Raises OSError.

    A checkpoint of the same name is replaced; at no moment is there none of that step on disk that was whole
    before.
    """
    text = json.dumps({"format": FORMAT, **manifest})
    atomic_write(tmp / MANIFEST, text)
    atomic_write(tmp / MARKER, hashlib.sha256(text.encode()).hexdigest() + "\n")
    for folder in {p.parent for p in tmp.rglob("*")}:
        fsync_dir(folder)
    old = final.with_name(final.name + ".old")
    if final.exists():
        os.rename(final, old)
    os.rename(tmp, final)
    fsync_dir(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(path: pathlib.Path) -> dict:
    """The manifest of a checkpoint whose marker fits it. Raises Damaged."""
    try:
        marker = (path / MARKER).read_text().strip()
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError as e:
        raise Damaged(f"half-written, {pathlib.Path(e.filename).name} is missing") from None
    except (OSError, UnicodeDecodeError) as e:
        raise Damaged(f"unreadable: {e}") from None
    if hashlib.sha256(text).hexdigest() != marker:
        raise Damaged(f"{MANIFEST} does not match {MARKER}")
    manifest = json.loads(text)
    if manifest["format"] != FORMAT:
        raise Damaged(f"its format is {manifest['format']}, this version reads {FORMAT}")
    return manifest


def find_damage(path: pathlib.Path, manifest: dict, share: int = 0, shares: int = 1) -> str | None:
    """Reads the files again and compares digests; None if all is well, else what is wrong with the first bad
    one.

    share of shares: which part of the files to check, so that processes can divide the work.
    """
    names = list(manifest["files"])[share::shares]
    for name in names:  # cheap checks first, so that a truncated file is named as such
        want = manifest["files"][name][0]
        if not (path / name).is_file():
            return f"{name} is missing"
        have = (path / name).stat().st_size
        if have != want:
            return f"{name} has {have} bytes instead of {want}"
    try:
        digests = digest_files(path, names, sync=False)
    except OSError as e:
        return f"unreadable: {e}"
    for name in names:
        if digests[name] != manifest["files"][name]:
            return f"{name} has changed content (sha256)"
    return None


def retained(checkpoints: Sequence[Checkpoint], keep_last: int, metric: str) -> set[int]:
    """Steps to keep: the newest `keep_last`, and the one with the highest `metric` (ties: the newer one).

    Checkpoints without the metric, or with NaN, are never the best.
    """
    last = sorted(c.step for c in checkpoints)[-keep_last:]
    scored = [(c.metrics[metric], c.step) for c in checkpoints if math.isfinite(c.metrics.get(metric, math.nan))]
    return {*last, *(step for _, step in sorted(scored)[-1:])}


def remove(path: pathlib.Path) -> None:
    """Deletes a checkpoint; a kill half way leaves a name that nobody takes for a checkpoint. Raises
    OSError."""
    doomed = path if path.suffix else path.with_name(path.name + ".old")
    if doomed != path:
        os.rename(path, doomed)
    shutil.rmtree(doomed)
