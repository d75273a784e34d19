"""Reads Torch7's binary files as Python values, without Torch7 and without running code from the files.

The format is that of torch/torch7 (File.lua, Tensor.c, Storage.c). `torch7_network.py` finds the ResNeXt in the values.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.weights.foreign.binary import Cursor, content_of, float_tensor

_NIL, _NUMBER, _STRING, _TABLE, _OBJECT, _BOOLEAN, _FUNCTION = range(7)
# Later versions of Torch7 use these two types for functions. Such a function has a number, like a table, because it may
# contain itself.
_RECURSIVE_FUNCTIONS = (7, 8)
# NumPy's types by Torch7's class name, without the prefixes `torch.` and `Cuda` and the suffix `Tensor` or `Storage`.
_DTYPES = {
    "": "<f4",  # CudaTensor
    "Float": "<f4",
    "Double": "<f8",
    "Half": "<f2",
    "Byte": "u1",
    "Char": "i1",
    "Short": "<i2",
    "Int": "<i4",
    "Long": "<i8",
}
_NUMBERS = re.compile(rf"torch\.(?:Cuda)?({'|'.join(_DTYPES)})(Tensor|Storage)")
_DEEPEST = 200
_MOST_DIMENSIONS = 32


@dataclass(frozen=True)
class Storage:
    """Consecutive numbers; the data is a view of the file's bytes."""

    dtype: np.dtype[Any]
    data: memoryview

    def __len__(self) -> int:
        return len(self.data) // self.dtype.itemsize


@dataclass(frozen=True)
class Array:
    """A view of a storage; `offset` and `strides` count numbers, not bytes."""

    storage: Storage | None
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self, where: str) -> Tensor:
        """Return a copy in float32.

        Raises:
            CheckpointError: the view extends beyond the storage, or has more numbers than the storage; the message
                begins with `where`.
        """
        count = math.prod(self.sizes) if self.sizes else 0
        last = self.offset + sum((size - 1) * step for size, step in zip(self.sizes, self.strides, strict=True))
        if self.storage is None or count == 0:
            return float_tensor(b"", np.dtype("<f4"), (0,))
        # Check the count too: with a stride of 0, a small storage could give a tensor of any size.
        if min(*self.strides, self.offset) < 0 or max(last + 1, count) > len(self.storage):
            raise CheckpointError(
                f"{where}: sizes {self.sizes} with strides {self.strides} from {self.offset} "
                f"leave a storage of {len(self.storage)}; damaged"
            )
        numbers = np.frombuffer(self.storage.data, self.storage.dtype)[self.offset :]
        bytes_apart = [step * self.storage.dtype.itemsize for step in self.strides]
        view = np.lib.stride_tricks.as_strided(numbers, self.sizes, bytes_apart, writeable=False)
        return float_tensor(view.astype("<f4").tobytes(), np.dtype("<f4"), self.sizes)


@dataclass(frozen=True)
class Object:
    """An object that is neither a tensor nor a storage: the name of its class, without the package, and its fields."""

    kind: str
    fields: dict[Any, Any] = field(default_factory=dict)


def load_t7(file: Path) -> Any:
    """Return a file's content: None, bool, float, str, dict (for a table), Array, Storage or Object.

    A function becomes None.

    Raises:
        CheckpointError: the file is damaged, or of another format.
    """
    return _Reader(Cursor(content_of(file), file)).value(0)


class _Reader:
    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        # Tables and objects by their number: Torch7 writes each one once, and later only its number.
        self.known: dict[int, Any] = {}

    def value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise self.cursor.failure(f"tables and objects nested over {_DEEPEST} deep")
        kind = self.cursor.integer("i")
        if kind == _NIL:
            return None
        if kind == _NUMBER:
            return struct.unpack("<d", self.cursor.take(8))[0]
        if kind == _STRING:
            return bytes(self.cursor.take(self.cursor.count("i", 1))).decode("utf-8", "replace")
        if kind == _BOOLEAN:
            return self.cursor.integer("i") == 1
        if kind == _FUNCTION:
            return self._drop_function(depth)
        if kind not in (_TABLE, _OBJECT, *_RECURSIVE_FUNCTIONS):
            raise self.cursor.failure(f"a value of the unknown type {kind}; not a .t7 file, or damaged")
        number = self.cursor.integer("i")
        if number in self.known:
            return self.known[number]
        if kind == _TABLE:
            table: dict[Any, Any] = {}
            # Register the table before its content is read, because it may contain itself.
            self.known[number] = table
            self._fill(table, depth)
            return table
        if kind == _OBJECT:
            return self._object(number, depth)
        self.known[number] = None
        return self._drop_function(depth)

    def _fill(self, table: dict[Any, Any], depth: int) -> None:
        # An entry takes at least 8 bytes: the types of its key and of its value.
        for _ in range(self.cursor.count("i", 8)):
            key, value = self.value(depth + 1), self.value(depth + 1)
            if isinstance(key, str | float | bool):
                table[key] = value

    def _drop_function(self, depth: int) -> None:
        self.cursor.take(self.cursor.count("i", 1))
        self.value(depth + 1)

    def _object(self, number: int, depth: int) -> Any:
        name = self.cursor.text("i")
        if re.fullmatch(r"V \d{1,9}", name):
            name = self.cursor.text("i")
        numbers = _NUMBERS.fullmatch(name)
        if numbers is None:
            made = Object(name.rpartition(".")[2])
            self.known[number] = made
            content = self.value(depth + 1)
            if isinstance(content, dict):
                made.fields.update(content)
            return made
        dtype = np.dtype(_DTYPES[numbers[1]])
        self.known[number] = None
        read = self._storage(dtype) if numbers[2] == "Storage" else self._array(name, depth)
        self.known[number] = read
        return read

    def _storage(self, dtype: np.dtype[Any]) -> Storage:
        return Storage(dtype, self.cursor.take(self.cursor.count("q", dtype.itemsize) * dtype.itemsize))

    def _array(self, name: str, depth: int) -> Array:
        dimensions = self.cursor.integer("i")
        if not 0 <= dimensions <= _MOST_DIMENSIONS:
            raise self.cursor.failure(f"{name} of {dimensions} dimensions; damaged")
        sizes, strides = self.cursor.integers("q", dimensions), self.cursor.integers("q", dimensions)
        # Lua's offsets begin at 1.
        offset = self.cursor.integer("q") - 1
        if any(size < 0 for size in sizes):
            raise self.cursor.failure(f"{name} of sizes {sizes}; damaged")
        storage = self.value(depth + 1)
        if storage is not None and not isinstance(storage, Storage):
            raise self.cursor.failure(f"{name} without a valid storage; damaged")
        return Array(storage, offset, sizes, strides)
