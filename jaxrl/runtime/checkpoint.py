"""Asynchronous checkpoints, which are complete or do not count, and restoring from the newest complete one.

arrays.py writes and reads the arrays (each process its own shards, in the background); what makes the files a
checkpoint is in manifest.py. A checkpoint holds

  arrays   a pytree of jax or NumPy arrays (parameters, optimizer, counters, typed PRNG keys), by name and
           sharding-free: it can be restored onto any mesh, and in part
  host     a JSON-able dict (data position, selection statistics, metrics writer position)
  blobs    a flat dict of NumPy arrays (columns of pending rollouts), whole and the same on every process

`host` and `blobs` are written by process 0 and must be the same on every process (gather first, see distributed.py).
Processes share nothing but the directory, local or on an object store: each says in a file there that it is done.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrl.errors import UserError
from jaxrl.runtime import arrays as files_of
from jaxrl.runtime import distributed, manifest, storage
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

    keep_last: newest checkpoints kept (>= 1). keep_best: name of a metric given to `save`: the checkpoint with its
    highest value is kept, too; "" for none. timeout_seconds bounds how long the processes wait for each other.
    before_commit: called in process 0 when all is written but the marker; what it raises makes the save fail.
    timings: of the last finished save: perf/checkpoint_blocking_seconds (the caller waited, also for the save
        before), perf/checkpoint_seconds (until committed), perf/checkpoint_bytes.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 3, keep_best: str = "",
                 timeout_seconds: int = 1800, before_commit: Callable[[], None] = lambda: None):
        self.directory = epath.Path(directory) if storage.is_remote(directory) else epath.Path(directory).absolute()
        self._keep = (keep_last, keep_best)
        self._timeout, self._before_commit = timeout_seconds, before_commit
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._committed: int | None = None
        self.timings: dict[str, float] = {}
        # A program that ends without `close` still finishes its save: the clients of object stores use executors, which
        # are shut down in the reverse order of these registrations, before threads are joined and long before atexit.
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
        small = {"host.json": json.dumps(host).encode(), **({BLOBS: _npz(blobs)} if blobs else {})}
        flat = {k: _storable(k, v) for k, v in _flatten(arrays).items()}
        numbers = {k: float(v) for k, v in (metrics or {}).items() if isinstance(v, int | float | np.number)}
        meta = {"step": step, "metrics": {k: v for k, v in numbers.items() if np.isfinite(v)},
                "arrays": {k: _spec(v) for k, v in _flatten(arrays).items()}}
        path = manifest.step_path(self.directory, step)
        if error := _in_main(lambda: _make_anew(path)):
            self._give_up(step, path, OSError(error))
            return
        shards = files_of.to_host(flat)
        blocked = time.perf_counter() - begin
        self._thread = threading.Thread(target=self._finish, args=(step, path, shards, small, meta, start, blocked))
        self._thread.start()

    def _finish(self, step, path, shards, small, meta, start, blocked) -> None:
        try:
            if jax.process_count() == 1:
                self._write(path, shards, small, meta)
            else:
                self._write_together(path, shards, small, meta)
            self._committed = step
            self.timings = {"perf/checkpoint_blocking_seconds": blocked,
                            "perf/checkpoint_seconds": time.perf_counter() - start,
                            "perf/checkpoint_bytes": sum(n for n, _ in meta.get("files", {}).values())}
        except Exception as e:
            self._give_up(step, path, e)
            return
        if distributed.is_main():
            self._clean_up()

    def _write(self, path, shards, small, meta) -> None:
        files, parts = files_of.write(path, shards, 0)
        self._commit(path, small, meta, [{"files": files, "parts": parts}])

    def _commit(self, path, small, meta, written: list[dict]) -> None:
        """Process 0, when all have written their shards: the rest of the files, the manifest and the marker."""
        meta["files"] = {name: storage.write_chunks(path / name, [content]) for name, content in small.items()}
        for one in written:
            meta["files"] |= one["files"]
            for name, parts in one["parts"].items():
                meta["arrays"][name].setdefault("parts", []).extend(parts)
        self._before_commit()
        manifest.commit(path, meta)

    def _write_together(self, path, shards, small, meta) -> None:
        """With several processes: each writes a note of what it wrote or why it failed, process 0 one of the result."""
        process, error, mine = jax.process_index(), None, {}
        try:
            files, parts = files_of.write(path, shards, process)
            mine = {"files": files, "parts": parts}
        except OSError as e:
            error, mine = e, {"error": storage.one_line(e)}
        storage.atomic_write(path / f"{process}.note", json.dumps(mine))
        if error is not None:
            raise error
        if not distributed.is_main():
            if failed := json.loads(self._await(path / "end.note"))["error"]:
                raise OSError(f"process 0 could not commit the checkpoint {path}: {failed}")
            return
        try:
            written = [json.loads(self._await(path / f"{i}.note")) for i in range(jax.process_count())]
            if failed := [f"process {i}: {w['error']}" for i, w in enumerate(written) if "error" in w]:
                raise OSError(failed[0])
            self._commit(path, small, meta, written)
        except Exception as e:
            storage.atomic_write(path / "end.note", json.dumps({"error": storage.one_line(e)}))
            raise
        storage.atomic_write(path / "end.note", json.dumps({"error": None}))

    def _await(self, path) -> bytes:
        """The content of a file that another process will write. Raises TimeoutError."""
        end, delay = time.monotonic() + self._timeout, 0.02
        while time.monotonic() < end:
            try:
                return storage.read(path)
            except FileNotFoundError:
                time.sleep(delay)
                delay = min(2 * delay, 1.0)
        raise TimeoutError(f"{path} did not appear within {self._timeout} s")

    def _give_up(self, step: int, path, error: Exception) -> None:
        if not isinstance(error, OSError):
            self._error = error
            return
        try:
            if distributed.is_main() and jax.process_count() == 1:  # the others may still write there
                storage.remove(path)
            kept = [c.step for c in manifest.list_checkpoints(self.directory)]
            again = f"a restart would begin at step {kept[-1] if kept else 0}"
        except OSError:
            again = "the older checkpoints cannot be looked at"
        if self._committed is None and not getattr(error, "passing", True):
            self._error = UserError(f"{self.directory}: the first checkpoint could not be saved: {error}")
        log.warning("checkpoint of step %d was NOT saved to %s: %s; the run goes on, %s", step, self.directory,
                    storage.one_line(error), again)

    def _clean_up(self) -> None:
        """Removes checkpoints that keep_last and keep_best do not cover, and half-written and damaged ones."""
        try:
            keep = manifest.retained(manifest.list_checkpoints(self.directory), *self._keep)
            doomed = [path for step, path in manifest.step_paths(self.directory) if step not in keep]
        except OSError as e:
            log.warning("could not look for old checkpoints in %s: %s", self.directory, e)
            return
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
        """Waits for the save in flight."""
        self.wait()

    def restore(self, template: Any) -> Restored | None:
        """The newest whole checkpoint (see `restore`), or None if there is none yet; makes the directory
        ready for going on from there: newer ones, which are half-written or damaged, do not count any more, and the
        next save removes them."""
        self.wait()
        found = restore(self.directory, template)

        def set_aside():
            for step, path in manifest.step_paths(self.directory):
                if found is None or step > found.step:
                    manifest.unseal(path)

        if error := _in_main(set_aside):
            raise UserError(f"{self.directory}: cannot be written: {error}")
        self._committed = found.step if found else None
        return found


def _make_anew(path) -> None:
    if storage.children(path):  # else there is nothing to delete, which an account may not be allowed to do
        manifest.remove(path)
    if not storage.is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def _in_main(call: Callable[[], None]) -> str | None:
    """Runs `call` in process 0 while the others wait; returns the storage's error, if any, on all processes."""
    error = None
    if distributed.is_main():
        try:
            call()
        except OSError as e:
            error = storage.one_line(e)
    return distributed.broadcast(error)


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
    directory = epath.Path(directory)
    with storage.user_errors():
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
        with storage.user_errors():
            arrays = _restore_arrays(path, meta["arrays"], template, partial)
            return Restored(s, arrays, json.loads(storage.read(path / "host.json")), _read_blobs(path, meta))
    # A checkpoint without its marker was left by a kill, which is no error; damage to a complete one is.
    if any("half-written" not in d for d in damaged) or (step is not None and damaged):
        raise UserError(f"{directory}: no usable checkpoint ({'; '.join(damaged)}); restore these files from "
                        "a backup, or start anew in another config.run_dir")
    return None


def _verified(path) -> dict:
    """The manifest, after all processes together have read and compared every file.

    Raises the same error on all processes: Damaged; UserError if a store cannot be asked, since that is no damage.
    """
    meta, damage, refusal = {}, None, None
    try:
        meta = manifest.read_manifest(path)
        damage = manifest.find_damage(path, meta, jax.process_index(), jax.process_count())
    except Damaged as e:
        damage = str(e)
    except storage.StoreError as e:
        refusal = str(e)
    for damaged, refused in distributed.allgather([damage, refusal]):
        if refused:
            raise UserError(refused)
        if damaged:
            raise Damaged(damaged)
    return meta


def _restore_arrays(path, saved: dict[str, dict], template: Any, partial: bool) -> Any:
    want = _flatten(template)
    _check_same(path, saved, want, partial)
    raw = {k: jax.eval_shape(jax.random.key_data, v) if _is_key(v) else v for k, v in want.items()}
    found = files_of.read(path, {k: (v.shape, v.dtype, _sharding(want[k])) for k, v in raw.items() if 0 not in v.shape},
                          {k: saved[k].get("parts", []) for k in want})
    leaves = []
    for name, leaf in want.items():
        array = found[name] if name in found else np.zeros(raw[name].shape, raw[name].dtype)
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
    """Where to put a restored leaf; None leaves it to JAX, as for an uncommitted array."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return getattr(leaf, "sharding", None)


def _spec(leaf: Any) -> dict:
    key = {"key": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {}
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), **key}


def _storable(name: str, leaf: Any) -> Any:
    """The leaf as it is written: PRNG keys as their integers."""
    leaf = jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and _is_key(leaf) else leaf
    files_of.check(name, leaf)
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
    with np.load(io.BytesIO(storage.read(path / BLOBS)), allow_pickle=False) as found:
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
