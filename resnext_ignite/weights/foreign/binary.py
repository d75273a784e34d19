"""Reads binary files that may be damaged or hostile. The cursor never reads past the end of the file."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resnext_ignite.runtime.errors import CheckpointError

_LONGEST_NAME = 1000


def content_of(file: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None


class Cursor:
    """A position in the bytes of a little-endian file. Every read is checked against the number of bytes left.

    Args:
        content: the whole file.
        file: path of the file, for errors.
    """

    def __init__(self, content: bytes, file: Path) -> None:
        self.content, self.file, self.position = content, file, 0

    @property
    def left(self) -> int:
        """The number of bytes that are not read yet."""
        return len(self.content) - self.position

    def failure(self, reason: str) -> CheckpointError:
        """Return an error that names the file, the position and the reason."""
        return CheckpointError(f"{self.file}: byte {self.position}: {reason}")

    def take(self, size: int) -> memoryview:
        """Return the next `size` bytes without a copy.

        Raises:
            CheckpointError: fewer than `size` bytes are left. The methods below raise the same error when they would
                read past the end of the file.
        """
        if not 0 <= size <= self.left:
            raise self.failure(f"{size} bytes should follow, but only {self.left} do; damaged or cut off")
        self.position += size
        return memoryview(self.content)[self.position - size : self.position]

    def integer(self, code: str) -> int:
        """Read one integer; `code` is its format character in `struct`."""
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def integers(self, code: str, count: int) -> tuple[int, ...]:
        """Read `count` integers; `code` is their format character in `struct`."""
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def count(self, code: str, size: int) -> int:
        """Read the number of the items that follow, and check that `size` bytes are left for each item."""
        count = self.integer(code)
        if not 0 <= count * size <= self.left:
            raise self.failure(f"a count of {count}, but only {self.left} bytes follow; damaged or cut off")
        return count

    def text(self, code: str) -> str:
        """Read a UTF-8 string that follows its length in bytes; `code` is the length's format character in `struct`."""
        length = self.count(code, 1)
        if length > _LONGEST_NAME:
            raise self.failure(f"a name of {length} bytes; damaged")
        return bytes(self.take(length)).decode("utf-8", "replace")


def float_tensor(data: memoryview | bytes, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Tensor:
    """Copy the numbers in `data` into a float32 tensor. The caller must check that `data` is long enough."""
    numbers = np.frombuffer(data, dtype, math.prod(shape))
    return torch.from_numpy(numbers.astype(np.float32)).reshape(shape)
