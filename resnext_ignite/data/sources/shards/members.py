"""The pictures' files in shards: each is read where it lies, by any process, in any order."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnext_ignite.data.sources.shards.tar import BLOCK, header_name

# Descriptors that each process holds open.
_OPEN = 32
# What is read ahead at once must not push out what is being read.
_MEMORY_FRACTION = 0.125


class _Descriptor:
    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


class OpenFiles:
    """Files that are read in parts: each is opened when it is first needed, and few are open at a time.

    Forked processes may share one: no place in a file is remembered.

    Args:
        paths: the files.
        sizes: of each, in bytes.
    """

    def __init__(self, paths: list[str], sizes: list[int]) -> None:
        self.paths, self.sizes = paths, sizes
        self._descriptor = functools.lru_cache(_OPEN)(lambda file: _Descriptor(paths[file]))

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Raises OSError or EOFError."""
        # Held by its name while it is read: another thread may have it closed.
        descriptor = self._descriptor(file)
        content = os.pread(descriptor.number, size, offset)
        if len(content) < size:
            raise EOFError(f"the shard ends at byte {offset + len(content)}")
        return content

    def read_ahead(self, files: Iterable[int]) -> None:
        """Have the system read whole files into its memory, as far as there is room; no error says that it did not."""
        room = _MEMORY_FRACTION * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for file in files:
            room -= self.sizes[file]
            if room < 0:
                return
            try:
                os.posix_fadvise(self._descriptor(file).number, 0, 0, os.POSIX_FADV_WILLNEED)
            except OSError:
                # What is wrong with it will be said of a picture.
                return


@dataclass(frozen=True)
class _Stored:
    """One picture's file in a shard."""

    files: OpenFiles
    shard: int
    offset: int
    size: int

    def __str__(self) -> str:
        try:
            name = header_name(self.files.read(self.shard, self.offset - BLOCK, BLOCK))
        except (OSError, EOFError):
            name = f"byte {self.offset}"
        return f"{self.files.paths[self.shard]}:{name}"

    def open(self) -> IO[bytes]:
        return io.BytesIO(self._content)

    @functools.cached_property
    def _content(self) -> bytes:
        return self.files.read(self.shard, self.offset, self.size)


@dataclass(frozen=True)
class Members:
    """The pictures' files in shards, in arrays that workers share untouched.

    Args:
        files: the S shards.
        firsts: int64 (S + 1,), the first picture of each, and what would be a next one's.
        offsets, sizes: int64 (N,), where each picture begins in its shard, and its length, in bytes.
        digest: of all shards.
        chosen: int64 (n,), which of the pictures these are, in this order; None: all.
    """

    files: OpenFiles
    firsts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    digest: str
    chosen: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.offsets if self.chosen is None else self.chosen)

    def __getitem__(self, position: int) -> _Stored:
        number = range(len(self))[position] if self.chosen is None else int(self.chosen[position])
        shard = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return _Stored(self.files, shard, int(self.offsets[number]), int(self.sizes[number]))

    def take(self, positions: NDArray[np.int64]) -> Members:
        """Some of them, int64 (n,), sharing the arrays."""
        return replace(self, chosen=positions if self.chosen is None else self.chosen[positions])

    def shards(self) -> Tensor:
        """The number of each picture's shard: int64 (n,)."""
        numbers = np.arange(len(self)) if self.chosen is None else self.chosen
        return torch.from_numpy(np.searchsorted(self.firsts, numbers, side="right") - 1)

    def identity(self) -> str:
        """The hash of the shards' own hashes, and of which pictures these are."""
        chosen = b"" if self.chosen is None else self.chosen.tobytes()
        return f"sha256 of shards {hashlib.sha256(self.digest.encode() + chosen).hexdigest()[:16]}"

    def read_ahead(self, groups: Sequence[int]) -> None:
        """Have the system read shards into its memory."""
        self.files.read_ahead(groups)
