"""Pictures in tar shards, as WebDataset writes them: `<split>/shards.json`, and where each picture lies in them."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from resnext_ignite.data.kept import SETTLED_S, Array, keep, kept_path, read_kept
from resnext_ignite.data.shard_list import LIST_NAME, ShardList, read_shard_list
from resnext_ignite.data.tar import BLOCK, Tar, header_name
from resnext_ignite.errors import DataError

log = logging.getLogger(__name__)
_VERSION = 1
# Fewer pictures are found faster than a person would notice.
_WORTH_KEEPING = 5_000
_PARTS = ("firsts", "offsets", "sizes", "labels")
_LONGEST_LABEL = 20
# Descriptors that each process holds open.
_OPEN = 32
# What is read ahead at once must not push out what is being read.
_SHARE_OF_MEMORY = 0.125


@dataclass(frozen=True)
class ShardIndex:
    """The pictures of a split, as they lie in its shards.

    Args:
        paths: N pictures' files.
        labels: int64 (N,).
        classes: the names that labels stand for.
    """

    paths: Members
    labels: Tensor
    classes: tuple[str, ...]


def index_shards(root: Path, split: str, classes: tuple[str, ...] | None = None) -> ShardIndex:
    """The pictures in the shards of `root/split`.

    Where many lie is kept in the user's cache folder (`XDG_CACHE_HOME`), with the size, times and sha256 of each shard.

    Args:
        classes: the classes there may be (those of the training split); None: those that `shards.json` lists.

    Raises:
        DataError: `shards.json` or a shard is missing, damaged or cut short, or has a class that training does not
            know; the line names it.
    """
    folder = root / split
    listed = read_shard_list(folder / LIST_NAME)
    unknown = sorted(set(listed.classes) - set(classes or listed.classes))
    if unknown:
        raise DataError(f"{folder / LIST_NAME}: classes: '{unknown[0]}' is not a class of the training images")
    known = classes or listed.classes
    kept, now = kept_path("shards", folder), time.time()
    changed_s, state = _state_of(folder, listed)
    parts = read_kept(kept, state, _PARTS)
    if parts is None:
        parts = _walk(folder, listed)
        if len(parts[1]) >= _WORTH_KEEPING and changed_s < now - SETTLED_S:
            keep(kept, state, dict(zip(_PARTS, parts, strict=True)))
    firsts, offsets, sizes, labels = parts
    names = tuple(shard.name for shard in listed.shards)
    digest = hashlib.sha256("".join(shard.sha256 for shard in listed.shards).encode()).hexdigest()
    files = OpenFiles([str(folder / name) for name in names], [shard.bytes for shard in listed.shards])
    places = np.array([known.index(name) for name in listed.classes], np.int64)
    return ShardIndex(Members(files, firsts, offsets, sizes, digest), torch.from_numpy(places[labels]), known)


def shard_classes(root: Path, split: str) -> tuple[str, ...]:
    """The classes that `shards.json` of `root/split` lists, without a look at the shards; raises as `index_shards`."""
    return read_shard_list(root / split / LIST_NAME).classes


def _state_of(folder: Path, listed: ShardList) -> tuple[float, str]:
    """When a shard was last changed, and all that would tell other pictures from these; sizes are checked."""
    facts = []
    for shard in listed.shards:
        path = folder / shard.name
        try:
            fact = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; {LIST_NAME} lists it") from None
        if fact.st_size != shard.bytes:
            fault = "cut short" if fact.st_size < shard.bytes else "too long"
            raise DataError(
                f"{path}: {fault}: {fact.st_size} bytes, where {LIST_NAME} has {shard.bytes}; pack or copy it again"
            )
        facts.append(fact)
    # The time of change besides that of modification, which copying programs set back.
    times = [(fact.st_ino, fact.st_mtime_ns, fact.st_ctime_ns) for fact in facts]
    text = json.dumps([_VERSION, os.fsdecode(folder.resolve()), IMG_EXTENSIONS, listed.model_dump(), times])
    return max(fact.st_ctime_ns for fact in facts) / 1e9, hashlib.sha256(os.fsencode(text)).hexdigest()


def _walk(folder: Path, listed: ShardList) -> list[Array]:
    total = sum(shard.images for shard in listed.shards)
    if total >= _WORTH_KEEPING:
        log.info(f"{folder}: looking for its {total} images in {len(listed.shards)} shards")
    firsts, rows = [0], []
    for shard in listed.shards:
        with Tar(folder / shard.name) as tar:
            found = np.array(list(_samples(tar, firsts[-1], len(listed.classes))), np.int64).reshape(-1, 3)
        if len(found) != shard.images:
            raise DataError(
                f"{folder / shard.name}: holds {len(found)} images, where {LIST_NAME} has {shard.images}; "
                "pack or copy it again"
            )
        firsts.append(firsts[-1] + len(found))
        rows.append(found)
    # (N, 3) -> (3, N): each column an array of its own, as it is kept.
    return [np.array(firsts, np.int64), *np.ascontiguousarray(np.concatenate(rows).T)]


def _samples(tar: Tar, first: int, classes: int) -> Iterator[tuple[int, int, int]]:
    """Offset, size and label of each picture of a shard; names are checked to count on from `first`."""
    members = tar.members()
    for number, one in enumerate(members, start=first):
        pair = (one, next(members, one))
        kinds = {member.name.removeprefix(f"{number:08}").lower(): member for member in pair}
        picture = next((member for kind, member in kinds.items() if kind in IMG_EXTENSIONS), None)
        if picture is None or ".cls" not in kinds:
            raise DataError(
                f"{tar.path}:{one.name}: where {number:08}.cls and its picture ({' '.join(IMG_EXTENSIONS)}) were due; "
                "pack the data again"
            )
        label = kinds[".cls"]
        text = tar.read(label.offset, min(label.size, _LONGEST_LABEL + 1))
        if len(text) > _LONGEST_LABEL or not text.strip().isdigit() or int(text) >= classes:
            raise DataError(
                f"{tar.path}:{label.name}: {text!r} is no class from 0 to {classes - 1}; pack the data again"
            )
        yield picture.offset, picture.size, int(text)


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
        room = _SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
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
