"""Reads image files inside shards. Each process can read the files directly, in any order."""

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

# Number of shards that each process keeps open.
_OPEN = 32
# Maximum size of one read-ahead, as a fraction of the machine's memory. A larger read-ahead could evict other
# shards from the page cache before their images are read.
_MEMORY_FRACTION = 0.125


class _Descriptor:
    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


class OpenFiles:
    """Files that are read in parts. Each file is opened at its first use; only a few files stay open.

    Forked processes can share an instance, because `pread` does not use the file position that they would share.

    Args:
        paths: the files.
        sizes: size of each file in bytes.
    """

    def __init__(self, paths: list[str], sizes: list[int]) -> None:
        self.paths, self.sizes = paths, sizes
        self._descriptor = functools.lru_cache(_OPEN)(lambda file: _Descriptor(paths[file]))

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Read `size` bytes at `offset` of a file; `file` is the index of the file in `paths`.

        Raises:
            OSError: the file cannot be read.
            EOFError: the file is too short.
        """
        # This reference keeps the descriptor open during the read, even if another thread evicts it from the cache.
        descriptor = self._descriptor(file)
        content = os.pread(descriptor.number, size, offset)
        if len(content) < size:
            raise EOFError(f"the shard ends at byte {offset + len(content)}")
        return content

    def read_ahead(self, files: Iterable[int]) -> None:
        """Let the system read whole files into its page cache, as far as memory allows; ignore errors."""
        room = _MEMORY_FRACTION * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for file in files:
            room -= self.sizes[file]
            if room < 0:
                return
            try:
                os.posix_fadvise(self._descriptor(file).number, 0, 0, os.POSIX_FADV_WILLNEED)
            except OSError:
                # The read of an image will report the error.
                return


@dataclass(frozen=True)
class _Stored:
    """One image file in a shard. `offset` and `size` are in bytes."""

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
    """The image files in shards, as arrays that forked workers share without a copy.

    Args:
        files: the S shards.
        firsts: int64 (S + 1,), the position of each shard's first image among all N images; the last entry is N.
        offsets, sizes: int64 (N,), the start of each image in its shard and its length, in bytes.
        digest: one hash over the sha256 of all shards.
        chosen: int64 (n,), the positions of the images that belong to this object, in this order; None: all.
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
        """Return the images at the given positions, int64 (n,). The result uses the same arrays."""
        return replace(self, chosen=positions if self.chosen is None else self.chosen[positions])

    def shards(self) -> Tensor:
        """For each image, return the number of its shard, counted from 0: int64 (n,)."""
        numbers = np.arange(len(self)) if self.chosen is None else self.chosen
        return torch.from_numpy(np.searchsorted(self.firsts, numbers, side="right") - 1)

    def identity(self) -> str:
        """Return a string with a hash of `digest` and `chosen`."""
        chosen = b"" if self.chosen is None else self.chosen.tobytes()
        return f"sha256 of shards {hashlib.sha256(self.digest.encode() + chosen).hexdigest()[:16]}"

    def read_ahead(self, groups: Sequence[int]) -> None:
        """Let the system read shards into its page cache; `groups` are the numbers of the shards."""
        self.files.read_ahead(groups)
