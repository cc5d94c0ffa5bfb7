"""Safetensors in and out, under the Hugging Face names, one tensor at a time.

Import reads only what each local device needs: every parameter is assembled from slices of the files, so no
host ever holds the whole model. Export gathers one file's worth of tensors at a time. Hugging Face stores
matrices as [out, in], this code as [in, out]; layers are separate tensors there and stacked on axis 0 here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from models.config import DecoderConfig, read_json, to_hf
from models.ranges import RangeFile
from models.table import LINEAR, Weight, get_path, set_path, weights, whole_shape

INDEX = "model.safetensors.index.json"
# present in some checkpoints, derived from the config here
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")


def load_params(
    directory: str | os.PathLike, config: DecoderConfig, shardings: Any = None, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Parameters of a Hugging Face directory as the tree that Decoder(config) takes.

    Args:
      directory: holds model.safetensors, or model.safetensors.index.json and the files that it lists.
      shardings: tree of jax.sharding.Sharding like the parameters; each process then reads only the slices of
        its own devices. None puts everything on the default device.
      dtype: of the returned arrays, whatever the file holds.

    Raises ValueError, one line naming file and tensor: missing, unexpected or misshapen tensors, values that
    are not finite in `dtype`, truncated or missing files.
    """
    # some tied models carry a copy of the embedding as their head
    ignored = ("lm_head.weight",) if config.tie_embeddings else ()
    return read_table(epath.Path(directory), weights(config), config, shardings, dtype=dtype, ignored=ignored)


def read_table(root: epath.Path, table: dict[tuple[str, ...], Weight], config: DecoderConfig, shardings=None,
               *, dtype=jnp.float32, ignored=(), single: str = "model.safetensors") -> dict[str, Any]:
    """The parameters of a table from its files; see `load_params`. ignored: copies of the embedding that may be there.
    single: the file that holds all of them, if there is no index."""
    dtype = np.dtype(dtype)
    with contextlib.ExitStack() as stack:
        where = _open_tensors(root, stack, single)
        _check(root, where, table, config, ignored)
        params: dict = {}
        for path, row in table.items():
            shape = whole_shape(row, config)
            parts: dict[str, np.ndarray] = {}  # devices that hold copies of each other share what is read

            def read(index, row=row, shape=shape, parts=parts):
                if str(index) not in parts:
                    parts[str(index)] = _read(where, row, index, shape, dtype)
                return parts[str(index)]

            if shardings is None:
                array = jnp.asarray(read((slice(None),) * len(shape)))
            else:
                array = jax.make_array_from_callback(shape, get_path(shardings, path), read, dtype=dtype)
            set_path(params, path, array)
    return params


def _open_tensors(root: epath.Path, stack: contextlib.ExitStack, file: str = "model.safetensors"
                  ) -> dict[str, tuple[epath.Path, Any]]:
    """Tensor name -> (file, open safetensors handle); local files stay mapped until the stack closes."""
    from safetensors import SafetensorError, safe_open

    def open_file(path):
        if "://" in str(path):
            return RangeFile(path)
        try:
            return stack.enter_context(safe_open(path, "numpy"))
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path}: truncated or not a safetensors file ({e})") from None

    single, index = root / file, root / INDEX
    if single.exists():
        handle = open_file(single)
        return {name: (single, handle) for name in handle.keys()}
    if not index.exists():
        old = any(root.glob("pytorch_model*.bin"))
        hint = "; pytorch_model.bin is not read, convert it to safetensors" if old else ""
        raise ValueError(f"{root}: no {file} and no {INDEX}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: key 'weight_map' is missing or empty: need tensor name -> file name")
    handles = {}
    for file in sorted(set(weight_map.values())):
        if not (root / file).is_file():
            tensor = min(n for n, f in weight_map.items() if f == file)
            raise ValueError(f"{root / file}: no such file, but {INDEX} lists it (for {tensor} and others)")
        handles[file] = open_file(root / file)
    held = {file: set(handle.keys()) for file, handle in handles.items()}
    for name, file in weight_map.items():
        if name not in held[file]:
            raise ValueError(f"{root / file}: does not hold tensor {name}, but {INDEX} says so")
    return {name: (root / file, handles[file]) for name, file in weight_map.items()}


def _check(root, where, table, config, ignored) -> None:
    """All names, shapes and dtypes, from the file headers alone, so that errors come before any reading."""
    expected = {}
    for row in table.values():
        whole = whole_shape(row, config)
        for place in np.ndindex(*whole[: row.stacked]):
            inner = whole[row.stacked :]
            expected[row.hf.format(*place)] = inner[::-1] if row.kind in LINEAR else inner
    hint = f"expected a {config.model_type} of {config.num_layers} layers"
    if missing := [name for name in expected if name not in where]:
        raise ValueError(f"{root}: tensor {missing[0]} is missing ({len(missing)} in all; {hint})")
    extra = sorted(n for n in where if n not in expected and n not in ignored and not _DERIVED.fullmatch(n))
    if extra:
        file = where[extra[0]][0]
        raise ValueError(f"{file}: tensor {extra[0]} is unexpected ({len(extra)} in all; {hint})")
    for name, shape in expected.items():
        file, handle = where[name]
        view = handle.get_slice(name)
        if (found := view.get_shape()) != list(shape):
            raise ValueError(f"{file}: tensor {name} has shape {found}, config needs {list(shape)}")
        if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{file}: tensor {name} has dtype {view.get_dtype()}, need F32, F16 or BF16")
    for name in set(ignored) & set(where):
        _check_same(where, name, "model.embed_tokens.weight")


def _check_same(where, name: str, other: str) -> None:
    """transformers does not tie a head that differs from the embedding, whatever the config says."""
    views = [where[n][1].get_slice(n) for n in (name, other)]
    (shape, dtype), embedding = ((view.get_shape(), view.get_dtype()) for view in views)
    rows = [(start, min(start + 4096, shape[0])) for start in range(0, shape[0], 4096)]
    if (shape, dtype) != embedding or not all(np.array_equal(*(v[a:b] for v in views)) for a, b in rows):
        raise ValueError(
            f"{where[name][0]}: tensor {name} differs from {other}, but config.json has tie_word_embeddings true: "
            "set it to false, so that both are used"
        )


def _read(where, row: Weight, index, shape, dtype) -> np.ndarray:
    """The part `index` (a slice per axis) of one of our arrays, of the whole `shape`, read from its files."""
    spans = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
    stacked, inner = spans[: row.stacked], spans[row.stacked :]
    if not stacked:
        return _read_tensor(where, row.hf, inner, row.kind in LINEAR, dtype)
    out = np.empty([len(s) for s in spans], dtype)
    for place in np.ndindex(*out.shape[: row.stacked]):
        name = row.hf.format(*(span[i] for span, i in zip(stacked, place, strict=True)))
        out[place] = _read_tensor(where, name, inner, row.kind in LINEAR, dtype)
    return out


def _read_tensor(where, name, spans, transposed, dtype) -> np.ndarray:
    file, handle = where[name]
    spans = spans[::-1] if transposed else spans
    part = handle.get_slice(name)[tuple(slice(s.start, s.stop) for s in spans)]
    with np.errstate(over="ignore"):  # an overflow of the cast is reported below, with its place
        part = part.astype(dtype)
    if not np.isfinite(part).all():
        at = tuple(int(i[0]) for i in np.nonzero(~np.isfinite(part)))
        place = [i + s.start for i, s in zip(at, spans, strict=True)]
        raise ValueError(f"{file}: tensor {name} at {place} is {part[at]} as {dtype}: need finite values")
    return np.ascontiguousarray(part.T) if transposed else part


def save_params(
    directory: str | os.PathLike,
    params: Any,
    config: DecoderConfig,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a directory that transformers, and load_params, read back as the same model, bit for bit.

    Args:
      params: the training tree (layers stacked), in the dtype to be written. May be sharded, also over
        several processes; then all of them must call this, and process 0 writes.
      tokenizer: a models.tokenizers.Tokenizer, saved alongside together with its EOS set, or None.
      max_shard_bytes: above this the weights are split over files with an index; at most about this much
        is held in host memory at a time.

    config.json is written last, so that an interrupted export is not taken for a model.
    Raises ValueError when params do not have the shapes of config.
    """
    from safetensors.numpy import save_file

    root, writer = pathlib.Path(directory), jax.process_index() == 0
    hf = to_hf(config) | {"torch_dtype": np.dtype(params["embed"]["embedding"].dtype).name}
    if tokenizer is not None:
        eos = list(tokenizer.eos_ids)
        hf |= {"eos_token_id": eos[0] if len(eos) == 1 else eos, "pad_token_id": tokenizer.pad_id}
        hf |= {"bos_token_id": tokenizer.bos_id}
    files = _plan(params, weights(config), config, max_shard_bytes)
    if writer:
        root.mkdir(parents=True, exist_ok=True)
        for old in (*root.glob("model*.safetensors"), root / INDEX, root / "config.json"):
            old.unlink(missing_ok=True)
    weight_map, total = {}, 0
    for number, entries in enumerate(files, 1):
        file = "model.safetensors"
        if len(files) > 1:
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: np.ascontiguousarray(_to_host(part())) for name, part in entries}
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
        if writer:
            save_file(tensors, root / file, metadata={"format": "pt"})
    if not writer:
        return
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (root / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(root)
    (root / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def write_tensors(file: pathlib.Path, params, table: dict[tuple[str, ...], Weight], config: DecoderConfig) -> None:
    """The parameters of a table as one safetensors file, written by process 0."""
    from safetensors.numpy import save_file

    tensors = {name: np.ascontiguousarray(_to_host(part())) for name, part, _ in _tensors(params, table, config)}
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, metadata={"format": "pt"})


def _plan(params, table, config, max_shard_bytes) -> list[list[tuple[str, Any]]]:
    """The (name, function giving the array) of every tensor, grouped into files, without reading any."""
    files, used = [[]], 0
    for name, part, nbytes in _tensors(params, table, config):
        if files[-1] and used + nbytes > max_shard_bytes:
            files.append([])
            used = 0
        files[-1].append((name, part))
        used += nbytes
    return files


def _tensors(params, table, config) -> Iterator[tuple[str, Any, int]]:
    """(name, function giving the array, bytes) of every tensor, layer by layer, so that a file of a sharded
    checkpoint holds whole layers as far as possible."""
    for path, row in table.items():
        array, shape = get_path(params, path), whole_shape(row, config)
        if array is None or array.shape != shape:
            found = "missing" if array is None else f"of shape {list(array.shape)}"
            raise ValueError(f"parameter {'/'.join(path)} is {found}, config needs {list(shape)}")
    rows = list(table.values())
    ends = [(row, None) for row in rows if not row.layered]
    order = [(r, i) for i in range(config.num_layers) for r in rows if r.layered]
    for row, layer in (*ends[:1], *order, *ends[1:]):
        array = get_path(params, row.path)
        inner = whole_shape(row, config)[row.layered :]
        for place in np.ndindex(*inner[: row.stacked - row.layered]):
            place = place if layer is None else (layer, *place)

            def part(array=array, place=place, flip=row.kind in LINEAR):
                x = array[place] if place else array
                return x.T if flip else x

            yield row.hf.format(*place), part, array.nbytes // math.prod(array.shape[: len(place)])


def _to_host(array) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
