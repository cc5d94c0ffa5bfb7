"""Asynchronous checkpoints that are whole or not there, and restore from the newest one that is whole.

Orbax writes the arrays (each process its own shards, in the background); the commit protocol around it is in
manifest.py. A checkpoint holds

  arrays   a pytree of jax or NumPy arrays (parameters, optimizer, counters, typed PRNG keys), by name and
           sharding-free: it can be restored onto any mesh, and in part
  host     a JSON-able dict (data position, selection statistics, metrics writer position)
  blobs    a flat dict of NumPy arrays (columns of pending rollouts), whole and the same on every process

`host` and `blobs` are written by process 0 and must be the same on every process (gather first, see distributed.py).
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import logging
import os
import pathlib
import shutil
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxrl.errors import UserError
from jaxrl.runtime import distributed, manifest
from jaxrl.runtime.manifest import Damaged

log = logging.getLogger(__name__)

BLOBS = "host.npz"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore` found: step, arrays (the template's structure), host state and its NumPy arrays by name."""

    step: int
    arrays: Any
    host: dict
    blobs: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Checkpointer:
    """Saves and restores in one directory, which it alone writes. Use as a context manager, or call `close`.

    keep_last: newest checkpoints kept (>= 1). keep_best: a name among the metrics given to `save`, whose highest
    value keeps one more; "" for none. timeout_seconds bounds a background save.
    timings: of the last finished save: perf/checkpoint_blocking_seconds (the caller waited, also for the save
        before), perf/checkpoint_seconds (until committed), perf/checkpoint_bytes.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 3, keep_best: str = "",
                 timeout_seconds: int = 1800):
        self.directory = pathlib.Path(directory).absolute()
        self._keep = (keep_last, keep_best)
        self._timeout = timeout_seconds
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=timeout_seconds)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._committed: int | None = None
        self._saves = 0
        self.timings: dict[str, float] = {}
        # A program that ends without `close` still finishes its save: executors, which orbax needs, are shut
        # down in the reverse order of these registrations, before threads are joined and long before atexit.
        me = weakref.ref(self)
        threading._register_atexit(lambda: me() and me().wait())

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def save(self, step: int, arrays: Any, host: Mapping, metrics: Mapping | None = None,
             blobs: Mapping[str, np.ndarray] | None = None) -> None:
        """Starts a save and returns when everything has been copied from the devices; waits for the one
        before.

        The caller may donate or change the arrays afterwards. A save that fails for lack of disk space or
        another fault of the storage is a warning, and the older checkpoints stay; any other failure is raised
        here or by the next `save`, `wait` or `close`. Saving the step that was committed last does nothing.
        Raises TypeError for state that would not come back as it was.
        """
        begin = time.perf_counter()
        self.wait()
        if step == self._committed:
            return
        start = time.perf_counter()
        _check_json(host, "host")
        files = {"host.json": json.dumps(host).encode(), **({BLOBS: _npz(blobs)} if blobs else {})}
        flat = {k: _check_array(k, v) for k, v in _flatten(arrays).items()}
        numbers = {k: float(v) for k, v in (metrics or {}).items() if isinstance(v, int | float | np.number)}
        meta = {"step": step, "metrics": {k: v for k, v in numbers.items() if np.isfinite(v)},
                "arrays": {k: _spec(v) for k, v in flat.items()}}
        tmp = self.directory / f"{step:08d}.tmp"
        self._saves += 1
        try:
            if distributed.is_main():
                shutil.rmtree(tmp, ignore_errors=True)
                tmp.mkdir(parents=True)
            self._orbax.save(tmp / "arrays", args=ocp.args.PyTreeSave(
                {k: _storable(v) for k, v in flat.items() if v.size}))
        except Exception as e:
            self._give_up(step, tmp, e)
            return
        blocked = time.perf_counter() - begin
        self._thread = threading.Thread(target=self._finish, args=(step, tmp, files, meta, start, blocked))
        self._thread.start()

    def _finish(self, step, tmp, files, meta, start, blocked) -> None:
        try:
            self._orbax.wait_until_finished()
            self._digest_and_commit(step, tmp, files, meta)
            self._committed = step
            self.timings = {"perf/checkpoint_blocking_seconds": blocked,
                            "perf/checkpoint_seconds": time.perf_counter() - start,
                            "perf/checkpoint_bytes": sum(n for n, _ in meta.get("files", {}).values())}
        except Exception as e:
            self._give_up(step, tmp, e)

    def _digest_and_commit(self, step, tmp, files, meta) -> None:
        """Each process digests what it wrote; process 0 the rest, the manifest, the rename and the
        clean-up."""
        process, processes = jax.process_index(), jax.process_count()
        # Orbax's own barrier talks to the coordinator, not to the devices, so it is safe in this thread.
        sync = ocp.multihost.get_barrier_sync_fn()
        final = manifest.step_path(self.directory, step)
        mine = f"arrays/ocdbt.process_{process}/"
        error = None
        try:
            if distributed.is_main():
                for name, content in files.items():
                    (tmp / name).write_bytes(content)
            names = [n for n in manifest.files_below(tmp) if n.startswith(mine)
                     or (process == 0 and not n.startswith("arrays/ocdbt.process_"))]
            digests = manifest.digest_files(tmp, names, sync=True)
            if processes > 1:
                (tmp / f"{process}.digests").write_text(json.dumps(digests))
        except OSError as e:
            error = e
        sync(key=f"jaxrl_digests_{self._saves}", timeout_ms=self._timeout * 1000)
        if distributed.is_main() and error is None:
            try:
                for other in range(processes if processes > 1 else 0):
                    part = tmp / f"{other}.digests"
                    if not part.exists():
                        raise OSError(errno.EIO, f"process {other} could not write its part", str(tmp))
                    digests |= json.loads(part.read_text())
                    part.unlink()
                meta["files"] = digests
                manifest.commit(tmp, final, meta)
            except OSError as e:
                error = e
        sync(key=f"jaxrl_commit_{self._saves}", timeout_ms=self._timeout * 1000)
        if error is not None:
            raise error
        if distributed.is_main():
            self._clean_up()
        elif not (final / manifest.MARKER).exists():
            raise OSError(errno.EIO, "process 0 could not commit the checkpoint", str(final))

    def _give_up(self, step: int, tmp: pathlib.Path, error: Exception) -> None:
        if distributed.is_main():
            shutil.rmtree(tmp, ignore_errors=True)
        if not _is_storage_fault(error):
            self._error = error
            return
        kept = [c.step for c in manifest.list_checkpoints(self.directory)]
        log.warning("checkpoint of step %d was NOT saved to %s: %s; the run goes on, a restart would begin "
                    "at %s", step, self.directory, _one_line(error), f"step {kept[-1]}" if kept else "step 0")

    def _clean_up(self) -> None:
        """Removes what keep_last and keep_best do not cover, and leftovers of kills and of damage."""
        found = manifest.list_checkpoints(self.directory)
        keep = manifest.retained(found, *self._keep)
        doomed = [c.path for c in found if c.step not in keep]
        doomed += [p for p in self.directory.iterdir() if p.suffix in (".old", ".damaged", ".tmp")]
        for path in doomed:
            try:
                manifest.remove(path)
            except OSError as e:
                log.warning("could not remove old checkpoint %s: %s", path, e)

    def wait(self) -> int | None:
        """Waits for the save in flight; returns the last step committed by this process, if any.

        Raises what made the save fail, unless it was a fault of the storage (then a warning was given).
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._committed

    def close(self) -> None:
        """Waits for the save in flight and ends the background machinery."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def restore(self, template: Any) -> Restored | None:
        """The newest whole checkpoint (see `restore`), or None if there is none yet; makes the directory
        ready for going on from there: half-written leftovers are removed, newer damaged ones set aside, each
        with a warning."""
        self.wait()
        if distributed.is_main() and self.directory.is_dir():
            for path in self.directory.glob("*.tmp"):
                log.warning("checkpoint %s is half-written (the process died during the save); ignored", path)
                manifest.remove(path)
        distributed.barrier("jaxrl_restore_clean")
        found = restore(self.directory, template)
        if distributed.is_main():
            for step, path in manifest.step_paths(self.directory):
                if found is None or step > found.step:
                    shutil.rmtree(path.with_name(path.name + ".damaged"), ignore_errors=True)
                    os.rename(path, path.with_name(path.name + ".damaged"))
        distributed.barrier("jaxrl_restore_done")
        self._committed = found.step if found else None
        return found


def restore(directory: str | os.PathLike, template: Any, *, step: int | None = None,
            partial: bool = False) -> Restored | None:
    """Reads the newest whole checkpoint of a directory (or exactly `step`) without changing anything there.

    template: pytree of jax.ShapeDtypeStruct or arrays. Leaves come back as NumPy where the template has
        NumPy, else as jax arrays with the leaf's sharding (any mesh, not only the one saved from); without a
        sharding, uncommitted.
    partial: the template may name only some of the saved arrays, e.g. {"params": ...}.
    Damaged or half-written checkpoints are named in a warning and the one before is used.
    Returns None if there is no checkpoint. Raises UserError if all there are damaged, if `step` is missing or
    damaged, or if the saved arrays have other names, shapes or dtypes than the template (the first difference
    is named).
    """
    directory = pathlib.Path(directory).absolute()
    paths = dict(distributed.broadcast([[s, p.name] for s, p in manifest.step_paths(directory)]))
    if step is not None and step not in paths:
        have = ", ".join(map(str, sorted(paths))) or "none"
        raise UserError(f"{directory}: no checkpoint of step {step}; there are: {have}")
    damaged = []
    for s in [step] if step is not None else sorted(paths, reverse=True):
        path = directory / paths[s]
        try:
            meta = _verified(path)
        except Damaged as e:
            log.warning("checkpoint %s is damaged (%s); using the one before", path, e)
            damaged.append(f"{path.name}: {e}")
            continue
        arrays = _restore_arrays(path, meta["arrays"], template, partial)
        return Restored(s, arrays, json.loads((path / "host.json").read_bytes()), _read_blobs(path, meta))
    # A first checkpoint without its marker is what a kill leaves behind; damage to one that was whole is
    # another thing.
    if any("half-written" not in d for d in damaged) or (step is not None and damaged):
        raise UserError(f"{directory}: no usable checkpoint ({'; '.join(damaged)}); restore these files from "
                        "a backup, or start anew in another config.run_dir")
    return None


def _verified(path: pathlib.Path) -> dict:
    """The manifest, after all processes together have read and compared every file. Raises Damaged on all."""
    meta, damage = {}, None
    try:
        meta = manifest.read_manifest(path)
        damage = manifest.find_damage(path, meta, jax.process_index(), jax.process_count())
    except Damaged as e:
        damage = str(e)
    damages = [d for d in distributed.allgather(damage) if d]
    if damages:
        raise Damaged(damages[0])
    return meta


def _restore_arrays(path, saved: dict[str, dict], template: Any, partial: bool) -> Any:
    want = _flatten(template)
    _check_same(path, saved, want, partial)
    items, args = {}, {}
    for name, leaf in want.items():
        data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        if 0 in data.shape:
            continue
        items[name] = jax.ShapeDtypeStruct(data.shape, data.dtype)
        sharding = _sharding(leaf)
        args[name] = ocp.RestoreArgs(restore_type=np.ndarray) if sharding is None else ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=data.shape, dtype=data.dtype)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        flat = reader.restore(path / "arrays", args=ocp.args.PyTreeRestore(
            item=items, restore_args=args, partial_restore=True)) if items else {}
    leaves = []
    for name, leaf in want.items():
        array = flat[name] if name in items else np.zeros(leaf.shape, leaf.dtype)
        if not isinstance(leaf, np.ndarray) and not isinstance(array, jax.Array):
            array = jnp.asarray(array)
        leaves.append(jax.random.wrap_key_data(array, impl=saved[name]["key"]) if _is_key(leaf) else array)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check_same(path, saved: dict[str, dict], want: dict[str, Any], partial: bool) -> None:
    """Raises UserError about the first array whose name, shape or dtype is another in the checkpoint."""
    other = f"checkpoint {path} is of another model or optimizer:"
    for name, leaf in want.items():
        if name not in saved:
            raise UserError(f"{other} it has no {name} {list(leaf.shape)}")
        if saved[name]["shape"] != list(leaf.shape):
            raise UserError(f"{other} {name} has shape {saved[name]['shape']} there, {list(leaf.shape)} here")
        if saved[name]["dtype"] != str(leaf.dtype):
            raise UserError(f"{other} {name} has dtype {saved[name]['dtype']} there, {leaf.dtype} here")
    extra = [name for name in saved if name not in want]
    if extra and not partial:
        raise UserError(f"{other} it also has {extra[0]} {saved[extra[0]]['shape']}")


def _flatten(tree: Any) -> dict[str, Any]:
    """{"params/layers/attn/q": leaf}: names that do not depend on the container types."""
    flat, _ = jax.tree.flatten_with_path(tree)
    out = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(out) != len(flat):
        raise TypeError("two arrays of the state have the same name")
    return out


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where to put a restored leaf; None means where JAX likes, as it was with an uncommitted array."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return getattr(leaf, "sharding", None)


def _spec(leaf: Any) -> dict:
    key = {"key": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {}
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), **key}


def _storable(leaf: Any) -> Any:
    """What orbax gets: keys as their integers. (It copies NumPy arrays before `save` returns; a test holds it
    to.)"""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _check_array(name: str, leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise TypeError(f"checkpoint: {name} is a {type(leaf).__name__}; arrays must hold jax or NumPy "
                        "arrays, other values belong in host")
    return leaf


def _npz(blobs: Mapping[str, np.ndarray]) -> bytes:
    """The arrays as a file. Raises TypeError for what would come back changed (objects, bfloat16, no array)."""
    for name, array in blobs.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufcUS":
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"checkpoint: blobs[{name!r}] is {kind}; need NumPy arrays of numbers, bools or text")
    buffer = io.BytesIO()
    np.savez(buffer, **blobs)
    return buffer.getvalue()


def _read_blobs(path, meta: dict) -> dict[str, np.ndarray]:
    if BLOBS not in meta["files"]:
        return {}
    with np.load(io.BytesIO((path / BLOBS).read_bytes()), allow_pickle=False) as found:
        return dict(found)


def _check_json(value: Any, where: str) -> None:
    """Raises TypeError for what JSON would change (tuples, integer keys) or cannot hold; NaN and inf are
    fine."""
    if isinstance(value, dict):
        for k, v in value.items():
            if not isinstance(k, str):
                raise TypeError(f"checkpoint: {where} has the key {k!r}; keys must be strings")
            _check_json(v, f"{where}[{k!r}]")
    elif isinstance(value, list):
        for i, v in enumerate(value):
            _check_json(v, f"{where}[{i}]")
    elif not (value is None or type(value) in (str, bool, int, float)):
        raise TypeError(f"checkpoint: {where} is a {type(value).__name__}; host state must be None, bool, "
                        "int, float, str, list or dict")


# Orbax and TensorStore report a full disk as ValueError or RuntimeError with the system's words in it.
# (RESOURCE_EXHAUSTED alone also means device memory; DEADLINE_EXCEEDED is how the other processes see such a
# fault.)
_STORAGE_WORDS = ("no space left", "disk quota", "input/output error", "read-only file system",
                  "stale file handle", "deadline_exceeded")


def _is_storage_fault(error: BaseException) -> bool:
    return isinstance(error, OSError) or any(w in str(error).lower() for w in _STORAGE_WORDS)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 300 else text[:100] + ' ... ' + text[-150:]}"
