"""What pictures are read from; and many file names in two arrays.

What a million names cost is their letters, and workers share them untouched.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, Protocol, overload

import numpy as np
from numpy.typing import NDArray

_BETWEEN = b"\n"


class ArchivedFile(Protocol):
    """A picture's file inside another; its string names it."""

    def open(self) -> IO[bytes]:
        """Its bytes; raises OSError or EOFError."""


ImagePath = str | ArchivedFile
"""A picture's file: where it lies, or what opens it."""


class ImagePaths(Protocol):
    """Many pictures' files."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: int) -> ImagePath: ...
    def take(self, positions: NDArray[np.int64]) -> ImagePaths:
        """Some of them, int64 (n,)."""

    def identity(self) -> str:
        """What tells them from others, in a few words."""

    def read_ahead(self, groups: Sequence[int]) -> None:
        """Prepare groups of them (`TrainOrder`'s) to be read soon; by themselves files have none."""


@dataclass(frozen=True)
class Paths(Sequence[str]):
    """Paths below a folder.

    A list of as many strings would be copied into each worker, page by page, as its objects' references are counted.

    Args:
        folder: what all of them begin with; may be empty.
        letters: uint8, the names, a line feed between two.
        starts: int64 (N + 1,), where each begins, and where a next one would.
        chosen: int64 (n,), which of them these are, in this order; None: all.
    """

    folder: str
    letters: NDArray[np.uint8]
    starts: NDArray[np.int64]
    chosen: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, names: Sequence[str], folder: str = "") -> Paths:
        """Of names below a folder."""
        encoded = [os.fsencode(name) for name in names]
        lengths = np.fromiter((len(name) + len(_BETWEEN) for name in encoded), np.int64, len(encoded))
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return cls(folder, np.frombuffer(_BETWEEN.join(encoded), np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1 if self.chosen is None else len(self.chosen)

    @overload
    def __getitem__(self, position: int) -> str: ...
    @overload
    def __getitem__(self, position: slice) -> list[str]: ...
    def __getitem__(self, position: int | slice) -> str | list[str]:
        """A path; of a slice, those paths as a list."""
        if isinstance(position, slice):
            return [self[place] for place in range(*position.indices(len(self)))]
        return os.path.join(self.folder, os.fsdecode(self._name(range(len(self))[position])))

    def _name(self, position: int) -> bytes:
        place = position if self.chosen is None else int(self.chosen[position])
        return self.letters[self.starts[place] : self.starts[place + 1] - len(_BETWEEN)].tobytes()

    def take(self, positions: NDArray[np.int64]) -> Paths:
        """Some of them, int64 (n,), sharing the names."""
        return replace(self, chosen=positions if self.chosen is None else self.chosen[positions])

    def digest(self) -> str:
        """The sha256 of the names below the folder, a line feed between two, in hexadecimal."""
        names = self.letters.tobytes() if self.chosen is None else _BETWEEN.join(map(self._name, range(len(self))))
        return hashlib.sha256(names).hexdigest()

    def identity(self) -> str:
        """The hash of the names below the folder, in order."""
        return f"sha256 of names {self.digest()[:16]}"

    def read_ahead(self, groups: Sequence[int]) -> None:
        """Nothing: each is read once an epoch, from wherever it lies."""
