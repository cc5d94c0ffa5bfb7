"""A safetensors file read by ranges: of a file on an object store, only the bytes that are asked for cross the
network."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import fsspec
import ml_dtypes
import numpy as np

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class RangeFile:
    """The part of safetensors' reader that loading needs: keys() and get_slice(name), for any path fsspec knows.

    Raises ValueError naming the file if it is truncated or not a safetensors file; OSError if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = os.fspath(path)
        self._fs, self._name = fsspec.core.url_to_fs(self._path)
        size = int(self._fs.info(self._name)["size"])
        try:
            length = int.from_bytes(self.bytes(0, 8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            self._header = json.loads(self.bytes(8, 8 + length))
            self._header.pop("__metadata__", None)
            self._begin = 8 + length
            end = max((entry["data_offsets"][1] for entry in self._header.values()), default=0)
            if self._begin + end != size:
                raise ValueError(f"{size} bytes instead of {self._begin + end}")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{self._path}: truncated or not a safetensors file ({e})") from None

    def bytes(self, start: int, stop: int) -> bytes:
        """The bytes from start to stop."""
        return self._fs.cat_file(self._name, start=start, end=stop)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._header)

    def get_slice(self, name: str) -> _Slice:
        """One tensor, of which nothing is read yet."""
        return _Slice(self, self._header[name], self._begin)


class _Slice:
    def __init__(self, file: RangeFile, entry: dict[str, Any], begin: int):
        self._file, self._entry, self._begin = file, entry, begin + entry["data_offsets"][0]

    def get_shape(self) -> list[int]:
        return list(self._entry["shape"])

    def get_dtype(self) -> str:
        return self._entry["dtype"]

    def __getitem__(self, index: Sequence[slice]) -> np.ndarray:
        """A block: the range of its rows is read, and the other axes are cut from it."""
        shape, dtype = self.get_shape(), np.dtype(DTYPES[self.get_dtype()])
        if not shape:
            return np.frombuffer(self._file.bytes(self._begin, self._begin + dtype.itemsize), dtype).reshape(())
        first, last, _ = index[0].indices(shape[0])
        row = math.prod(shape[1:]) * dtype.itemsize
        data = self._file.bytes(self._begin + first * row, self._begin + last * row)
        return np.frombuffer(data, dtype).reshape(-1, *shape[1:])[(slice(None), *index[1:])]
