"""Reading a binary file that may lie: a cursor that never passes the end, and tensors no larger than their bytes."""

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
    """A file's bytes.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None


class Cursor:
    """A place in a file's bytes, little-endian; everything read is checked against what is left of them.

    Args:
        content: the whole file.
        file: named in errors.
    """

    def __init__(self, content: bytes, file: Path) -> None:
        self.content, self.file, self.position = content, file, 0

    @property
    def left(self) -> int:
        """Bytes that are not read yet."""
        return len(self.content) - self.position

    def failure(self, reason: str) -> CheckpointError:
        """The error that says what is wrong here."""
        return CheckpointError(f"{self.file}: byte {self.position}: {reason}")

    def take(self, size: int) -> memoryview:
        """The next `size` bytes, not copied.

        Raises:
            CheckpointError: there are not so many; so do all that follow.
        """
        if not 0 <= size <= self.left:
            raise self.failure(f"{size} bytes are said to follow, {self.left} do; damaged or cut off")
        self.position += size
        return memoryview(self.content)[self.position - size : self.position]

    def integer(self, code: str) -> int:
        """One integer, `code` as in struct."""
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def integers(self, code: str, count: int) -> tuple[int, ...]:
        """`count` integers."""
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def count(self, code: str, size: int) -> int:
        """How many things follow, each of at least `size` bytes."""
        count = self.integer(code)
        if not 0 <= count * size <= self.left:
            raise self.failure(f"a count of {count}, where {self.left} bytes follow; damaged or cut off")
        return count

    def text(self, code: str) -> str:
        """A name behind its length."""
        length = self.count(code, 1)
        if length > _LONGEST_NAME:
            raise self.failure(f"a name of {length} bytes; damaged")
        return bytes(self.take(length)).decode("utf-8", "replace")


def float_tensor(data: memoryview | bytes, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Tensor:
    """A copy in float32 of numbers that lie one behind the other; their count is the caller's to check."""
    numbers = np.frombuffer(data, dtype, math.prod(shape))
    return torch.from_numpy(numbers.astype(np.float32)).reshape(shape)
