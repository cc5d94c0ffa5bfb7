"""Named NumPy arrays to bytes and back, exactly: a plain .npz that also knows bfloat16 and its relatives.

Used for host arrays of a checkpoint and for gathering arrays of unequal sizes over processes. No pickle.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import ml_dtypes  # noqa: F401  (teaches np.dtype the names bfloat16, float8_...)
import numpy as np


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The arrays (any shape; numbers, bool or fixed-width strings) as the bytes of an .npz file.

    Types that .npy does not know are stored as unsigned integers under "name::bfloat16".
    Raises TypeError for object arrays, which could only be pickled.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name, array in arrays.items():
            array = np.asarray(array)
            if array.dtype.hasobject or "::" in name:
                raise TypeError(f"array {name!r} of dtype {array.dtype} cannot be stored")
            if array.dtype.kind == "V":
                name, array = f"{name}::{array.dtype.name}", array.view(f"u{array.dtype.itemsize}")
            with z.open(f"{name}.npy", "w", force_zip64=True) as f:
                np.lib.format.write_array(f, array, allow_pickle=False)
    return buffer.getvalue()


def unpack_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Inverse of `pack_arrays`: same names, order, dtypes, shapes and bits."""
    out = {}
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        for entry in z.namelist():
            name, _, dtype = entry.removesuffix(".npy").partition("::")
            with z.open(entry) as f:
                array = np.lib.format.read_array(f, allow_pickle=False)
            out[name] = array.view(np.dtype(dtype)) if dtype else array
    return out
