"""Named arrays to bytes and back, bit for bit."""

import io

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.runtime.blobs import pack_arrays, unpack_arrays

DTYPES = [np.dtype(x) for x in ("f4", "f8", "i4", "i8", "u1", "?", "<U7", ml_dtypes.bfloat16,
                                ml_dtypes.float8_e4m3fn, ml_dtypes.int4)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trip_is_bitwise(data):
    arrays = {}
    for i, dtype in enumerate(DTYPES):
        shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        raw = data.draw(hnp.arrays(np.uint8 if dtype.kind in "V?" else dtype, shape))
        arrays[f"file/{i}"] = raw.astype(bool) if dtype.kind == "?" else (
            (raw % 8).astype(dtype) if dtype.name == "int4" else raw.view(dtype) if dtype.itemsize == 1
            else raw.astype(dtype))
    back = unpack_arrays(pack_arrays(arrays))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


def test_plain_types_are_readable_with_numpy():
    data = pack_arrays({"file": np.arange(3), "allow_pickle": np.float32(2)})
    with np.load(io.BytesIO(data), allow_pickle=False) as z:
        assert z["file"].tolist() == [0, 1, 2] and z["allow_pickle"] == 2


def test_bfloat16_nan_payload_survives():
    bits = np.array([0x7FC1, 0xFF81, 0x8000], np.uint16).view(ml_dtypes.bfloat16)
    assert unpack_arrays(pack_arrays({"x": bits}))["x"].view(np.uint16).tolist() == [0x7FC1, 0xFF81, 0x8000]


def test_objects_are_refused():
    with pytest.raises(TypeError, match="'x' of dtype object"):
        pack_arrays({"x": np.array([{}])})
