"""Defines the interfaces for image files on disk or in an archive, and `Paths`, a compact list of file names.

`Paths` stores all names in two arrays: a million names need little memory, and forked workers share the arrays.
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
    """An image file inside an archive. Its `str()` is the name of the file in messages."""

    def open(self) -> IO[bytes]:
        """Return the file's bytes as a stream.

        Raises:
            OSError: the bytes cannot be read.
            EOFError: the archive is too short.
        """


ImagePath = str | ArchivedFile
"""An image file: its path, or an object that opens it."""


class ImagePaths(Protocol):
    """A sequence of image files."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: int) -> ImagePath: ...
    def take(self, positions: NDArray[np.int64]) -> ImagePaths:
        """Return the files at the given positions: int64 (n,) -> n files."""

    def identity(self) -> str:
        """Return a short string with a hash that identifies the files."""

    def read_ahead(self, groups: Sequence[int]) -> None:
        """Prepare to read groups of files (see `TrainOrder`) that are needed soon. Plain files have no groups."""


@dataclass(frozen=True)
class Paths(Sequence[str]):
    """Paths below a folder.

    Forked workers share the arrays of names. A list of strings would not stay shared: each access to a string changes
    its reference count, and the system then copies the memory page that holds the count.

    Args:
        folder: the start of all paths; may be empty.
        letters: uint8, the bytes of the names, separated by line feeds.
        starts: int64 (N + 1,), the start of each name in `letters`; the last entry is where a further name would start.
        chosen: int64 (n,), the positions of the names that belong to this object, in this order; None: all.
    """

    folder: str
    letters: NDArray[np.uint8]
    starts: NDArray[np.int64]
    chosen: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, names: Sequence[str], folder: str = "") -> Paths:
        """Build the paths from names below a folder."""
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
        """Return a path; for a slice, return a list of paths."""
        if isinstance(position, slice):
            return [self[place] for place in range(*position.indices(len(self)))]
        return os.path.join(self.folder, os.fsdecode(self._name(range(len(self))[position])))

    def _name(self, position: int) -> bytes:
        place = position if self.chosen is None else int(self.chosen[position])
        return self.letters[self.starts[place] : self.starts[place + 1] - len(_BETWEEN)].tobytes()

    def take(self, positions: NDArray[np.int64]) -> Paths:
        """Return the paths at the given positions, int64 (n,). The result uses the same arrays of names."""
        return replace(self, chosen=positions if self.chosen is None else self.chosen[positions])

    def digest(self) -> str:
        """Return the sha256 of the names below the folder, separated by line feeds, in hexadecimal."""
        names = self.letters.tobytes() if self.chosen is None else _BETWEEN.join(map(self._name, range(len(self))))
        return hashlib.sha256(names).hexdigest()

    def identity(self) -> str:
        """Return a string with the hash of the names below the folder, in order."""
        return f"sha256 of names {self.digest()[:16]}"

    def read_ahead(self, groups: Sequence[int]) -> None:
        """Do nothing: plain files have no groups."""
