"""Sharded arrays as safetensors files: every process writes the shards it holds, and reads the ranges it needs.

A file holds some shards of some arrays. A tensor is named after its array and the offsets of the shard in it. The
checkpoint's manifest says, too, where each tensor lies, so that a restore reads no headers. Any mesh can read what any
other has written: a device's part of an array is put together from the saved shards that overlap it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrl.runtime import storage

SMALL = 32 * 2**20  # bytes: a file of at most this size is read at once
FILE_BYTES = 256 * 2**20  # at most in a file, unless one shard is larger: files are written in parallel
_TAGS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
         "float8_e5m2": "F8_E5M2", "bool": "BOOL"} | {f"{s}int{n}": f"{t}{n}" for s, t in (("", "I"), ("u", "U"))
                                                     for n in (8, 16, 32, 64)}

Shard = tuple[str, tuple[int, ...], np.ndarray]  # name of the array, offsets of the shard in it, content


def check(name: str, array: Any) -> None:
    """Raises TypeError for what cannot be written: no array, or a dtype that the file format does not have."""
    if not isinstance(array, jax.Array | np.ndarray):
        raise TypeError(f"checkpoint: {name} is a {type(array).__name__}; arrays must hold jax or NumPy "
                        "arrays, other values belong in host")
    if str(array.dtype) not in _TAGS:
        raise TypeError(f"checkpoint: {name} has dtype {array.dtype}; need one of {', '.join(_TAGS)}")


def to_host(arrays: Mapping[str, Any]) -> list[Shard]:
    """Copies of the shards that this process writes. Of a replicated shard, one replica of all processes is written."""
    mine = []
    for name, array in arrays.items():
        if isinstance(array, jax.Array) and not (array.is_fully_addressable and jax.process_count() > 1):
            held = [s for s in array.addressable_shards if s.replica_id == 0]
            mine += [(name, tuple(s.start or 0 for s in shard.index), shard.data) for shard in held]
        elif jax.process_index() == 0:  # the same in every process
            mine.append((name, (0,) * array.ndim, array))
    for _, _, data in mine:
        if isinstance(data, jax.Array):
            data.copy_to_host_async()
    return [(name, start, _owned(data)) for name, start, data in mine if data.size]


def _owned(data: Any) -> np.ndarray:
    """A copy. On a CPU, NumPy would return a view of the device's buffer, which the next step may reuse."""
    here = isinstance(data, np.ndarray) or next(iter(data.devices())).platform == "cpu"
    return np.array(data, order="C", copy=True) if here else np.asarray(data, order="C")


def write(directory: str | os.PathLike, shards: Sequence[Shard], process: int) -> tuple[dict, dict]:
    """Writes shards into files of the directory. Returns ({file: [bytes, sha256]}, {array: [[file, offset, start,
    shape], ...]}).

    Raises OSError.
    """
    groups, size = [[]], 0
    for shard in shards:
        if groups[-1] and size + shard[2].nbytes > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard[2].nbytes
    calls, parts = {}, {}
    for number, group in enumerate(g for g in groups if g):
        file = f"arrays-{process:05d}-{number:03d}.safetensors"
        header, offsets = _header(group)
        for (name, start, data), offset in zip(group, offsets, strict=True):
            parts.setdefault(name, []).append([file, offset, list(start), list(data.shape)])
        chunks = [header, *(data.reshape(-1).view(np.uint8).data for _, _, data in group)]
        calls[file] = functools.partial(storage.write_chunks, epath.Path(directory) / file, chunks)
    return dict(zip(calls, storage.in_threads(calls.values()), strict=True)), parts


def _header(group: Sequence[Shard]) -> tuple[bytes, list[int]]:
    """The header of a safetensors file, and where each tensor begins in the file."""
    entries, at = {}, 0
    for name, start, data in group:
        entries[":".join([name, *map(str, start)])] = {
            "dtype": _TAGS[str(data.dtype)], "shape": list(data.shape), "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [begin + e["data_offsets"][0] for e in entries.values()]


def read(directory: str | os.PathLike, wanted: Mapping[str, Any], parts: Mapping[str, list]) -> dict[str, Any]:
    """Arrays by name, as `wanted` describes them: (shape, dtype, sharding or None for NumPy).

    Each process reads the ranges that its devices need, several at a time. parts: what `write` returned, of all
    processes.
    """
    jobs = {}
    for name, (shape, _, sharding) in wanted.items():
        indices = [(slice(None),) * len(shape)] if sharding is None else \
            sharding.addressable_devices_indices_map(shape).values()
        for index in indices:
            jobs[name, _spans(index, shape)] = None
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        fetch = _reader(epath.Path(directory), {k: (v[1], parts.get(k, ())) for k, v in wanted.items()}, pool)
        for name, spans in jobs:
            jobs[name, spans] = pool.submit(_region, fetch, name, spans, wanted[name][1], parts.get(name, ()))
        out = {}
        for name, (shape, _, sharding) in wanted.items():
            def part(index, name=name, shape=shape):
                return jobs[name, _spans(index, shape)].result()

            out[name] = part((slice(None),) * len(shape)) if sharding is None else \
                jax.make_array_from_callback(shape, sharding, part)
        return out


def _reader(directory: epath.Path, arrays: Mapping[str, tuple], pool) -> Callable[[str, int, int], bytes]:
    """A function (file, start, stop) -> bytes. Small files are read whole; a run of a small model has only one."""
    ends: dict[str, int] = {}
    for dtype, pieces in arrays.values():
        for file, offset, _, size in pieces:
            ends[file] = max(ends.get(file, 0), offset + math.prod(size) * jnp.dtype(dtype).itemsize)
    whole = {f: pool.submit(storage.read, directory / f, 0, n) for f, n in ends.items() if n <= SMALL}

    def fetch(file: str, start: int, stop: int) -> bytes:
        return whole[file].result()[start:stop] if file in whole else storage.read(directory / file, start, stop)

    return fetch


def _spans(index: Sequence[slice], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _region(fetch: Callable, name: str, spans, dtype, parts: Sequence) -> np.ndarray:
    """One block of an array, from the shards that overlap it."""
    dtype, shape = jnp.dtype(dtype), [hi - lo for lo, hi in spans]
    out, filled = np.empty(shape, dtype), 0
    for file, offset, start, size in parts:
        low = [max(lo, s) for (lo, _), s in zip(spans, start, strict=True)]
        high = [min(hi, s + n) for (_, hi), s, n in zip(spans, start, size, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        first, last = (low[0] - start[0], high[0] - start[0]) if size else (0, 1)
        row = math.prod(size[1:]) * dtype.itemsize
        data = fetch(file, offset + first * row, offset + last * row)
        block = np.frombuffer(data, dtype).reshape([last - first, *size[1:]] if size else [])
        inner = tuple(slice(a - s, b - s) for a, b, s in zip(low[1:], high[1:], start[1:], strict=True))
        block = block[(slice(None), *inner)] if size else block
        out[tuple(slice(a - lo, b - lo) for a, b, (lo, _) in zip(low, high, spans, strict=True))] = block
        filled += block.size
    if filled != out.size:
        raise ValueError(f"{name}: {out.size - filled} of its {out.size} values are in no file of the checkpoint")
    return out
