"""Reads MXNet's .params files without MXNet.

The format is that of NDArray::Save and NDArray::Load in apache/mxnet, src/ndarray/ndarray.cc.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from torch import Tensor

from resnext_ignite.weights.foreign.binary import Cursor, content_of, float_tensor
from resnext_ignite.weights.foreign.signatures import MXNET

# In versions 1, 2 and 3 of the format, each array begins with one of these numbers. In older files, each array begins
# with its number of dimensions.
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DTYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")
_MOST_DIMENSIONS = 32
# The shortest array is an empty array in an older file. It consists of one number of 4 bytes: 0 dimensions.
_MIN_ARRAY_BYTES = 4


def load_params(file: Path) -> dict[str, Tensor]:
    """Return the arrays in a file by name, in float32; `arg:` and `aux:` are removed from the names.

    Raises:
        CheckpointError: the file is damaged, an array is sparse, empty or without a name, or two arrays have the same
            name.
    """
    cursor = Cursor(content_of(file), file)
    if bytes(cursor.take(len(MXNET))) != MXNET:
        raise cursor.failure("not a .params file of MXNet")
    cursor.take(8)
    arrays = [_array(cursor) for _ in range(cursor.count("Q", _MIN_ARRAY_BYTES))]
    names = [cursor.text("Q") for _ in range(cursor.count("Q", 8))]
    if len(names) != len(arrays):
        raise cursor.failure(f"{len(arrays)} arrays with {len(names)} names")
    plain = [name.removeprefix("arg:").removeprefix("aux:") for name in names]
    found = {name: array for name, array in zip(plain, arrays, strict=True) if array is not None}
    if len(found) != len(arrays):
        raise cursor.failure("an array is empty, or two have the same name")
    return found


def _array(cursor: Cursor) -> Tensor | None:
    version = cursor.integer("I")
    if version in (_V2, _V3) and (storage := cursor.integer("i")) not in (-1, 0):
        raise cursor.failure(f"a sparse array (storage type {storage}); a ResNeXt's are dense")
    if version in (_V1, _V2, _V3):
        shape = cursor.integers("q", _dimensions(cursor, cursor.integer("i")))
    else:
        shape = cursor.integers("I", _dimensions(cursor, version))
    # In version 3, an empty shape means a single number. In all other versions, it means that there is no array.
    if not shape and version != _V3:
        return None
    cursor.take(8)  # the device, which does not matter here
    kind = cursor.integer("i")
    if not 0 <= kind < len(_DTYPES):
        raise cursor.failure(f"an array of type {kind}; 0 to {len(_DTYPES) - 1} are known")
    if any(size < 0 for size in shape):
        raise cursor.failure(f"an array of shape {shape}")
    dtype = np.dtype(_DTYPES[kind])
    return float_tensor(cursor.take(math.prod(shape) * dtype.itemsize), dtype, shape)


def _dimensions(cursor: Cursor, count: int) -> int:
    if not 0 <= count <= _MOST_DIMENSIONS:
        raise cursor.failure(f"an array of {count} dimensions; damaged")
    return count
