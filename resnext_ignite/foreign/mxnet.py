"""MXNet's .params files, read without MXNet: apache/mxnet src/ndarray/ndarray.cc, NDArray::Save and ::Load."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resnext_ignite.foreign.blocks import with_our_eps
from resnext_ignite.foreign.bounded import Cursor, content_of, float_tensor
from resnext_ignite.foreign.keys import Statistics, Weights
from resnext_ignite.runtime.errors import CheckpointError

# An unsigned 64-bit number before all arrays.
MAGIC = struct.pack("<Q", 0x112)
# The first number of an array: the format's versions 1 to 3; before these it was the count of dimensions.
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DTYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")
_MOST_DIMENSIONS = 32
# Of every BatchNorm in the symbol zoo's ResNeXt, the one of the pictures too.
_EPS = 2e-5
# What the shortest array takes: its first number and an empty shape.
_LEAST_ARRAY = 4


def load_params(file: Path) -> dict[str, Tensor]:
    """The arrays in a file by their names, in float32, without `arg:` and `aux:`.

    Raises:
        CheckpointError: it is damaged, or holds arrays without names.
    """
    cursor = Cursor(content_of(file), file)
    if bytes(cursor.take(len(MAGIC))) != MAGIC:
        raise cursor.failure("not a .params file of MXNet")
    cursor.take(8)
    arrays = [_array(cursor) for _ in range(cursor.count("Q", _LEAST_ARRAY))]
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
    # An array without a shape is none, but for version 3, to which it is a single number.
    if not shape and version != _V3:
        return None
    cursor.take(8)  # the device, which is not ours
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


def adapt_symbol_zoo(weights: Weights) -> None:
    """Make the variances, which were trained with another eps, those that give the same with this project's."""
    for name in weights:
        if name.endswith("running_var") and not name.startswith("bn_data"):
            weights[name] = with_our_eps(weights[name], _EPS)


def statistics_of_data(weights: Weights, file: Path) -> tuple[Statistics, Statistics] | None:
    """Take out the BatchNorm of the pictures, as their mean and std, 0 to 1; None where there is none.

    With gamma 1 (fix_gamma, whatever the file holds): (x - m) / s + b = (x - (m - b * s)) / s, x from 0 to 255.

    Raises:
        CheckpointError: a part of it is missing, or gives no std.
    """
    parts = {name: weights.pop(f"bn_data.{name}", None) for name in ("weight", "bias", "running_mean", "running_var")}
    if all(value is None for value in parts.values()):
        return None
    shift, mean, var = (parts[name] for name in ("bias", "running_mean", "running_var"))
    if shift is None or mean is None or var is None or {shift.shape, mean.shape, var.shape} != {torch.Size([3])}:
        raise CheckpointError(f"{file}: bn_data: beta, moving_mean and moving_var must be there, of 3 channels each")
    std = (var.double() + _EPS).sqrt() / 255
    centre = mean.double() / 255 - shift.double() * std
    if not (torch.isfinite(centre).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise CheckpointError(f"{file}: bn_data: its statistics are not those of pictures: moving_var {var.tolist()}")
    return _three(centre), _three(std)


def _three(values: Tensor) -> Statistics:
    red, green, blue = values.tolist()
    return red, green, blue
