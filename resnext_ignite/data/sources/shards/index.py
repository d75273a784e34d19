"""Builds the index of the images in the shards of a split. The index is cached, and valid until a shard changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from resnext_ignite.data.sources.disk_cache import Array, get_or_build
from resnext_ignite.data.sources.shards.listing import LIST_NAME, ShardList, read_shard_list
from resnext_ignite.data.sources.shards.members import Members, OpenFiles
from resnext_ignite.data.sources.shards.tar import Tar
from resnext_ignite.runtime.errors import DataError

log = logging.getLogger(__name__)
_VERSION = 1
# Do not cache a smaller index: building it takes no noticeable time.
_WORTH_KEEPING = 5_000
_PARTS = ("firsts", "offsets", "sizes", "labels")
_LONGEST_LABEL = 20


@dataclass(frozen=True)
class ShardIndex:
    """The images of a split, in the order of its shards.

    Args:
        paths: N image files.
        labels: int64 (N,).
        classes: the names of the labels.
    """

    paths: Members
    labels: Tensor
    classes: tuple[str, ...]


def index_shards(root: Path, split: str, classes: tuple[str, ...] | None = None) -> ShardIndex:
    """Index the images in the shards of `root/split`.

    The index of a large split is cached in the user's cache folder (`XDG_CACHE_HOME`). A cached index is used only
    while `shards.json` and the shards are unchanged (see `_state_of`).

    Args:
        classes: the allowed classes (the classes of the training split); None: the classes that `shards.json` lists.

    Raises:
        DataError: `shards.json` or a shard is missing, damaged or truncated, or `shards.json` lists a class that is not
            in `classes`; the message names the file.
    """
    folder = root / split
    listed = read_shard_list(folder / LIST_NAME)
    unknown = sorted(set(listed.classes) - set(classes or listed.classes))
    if unknown:
        raise DataError(f"{folder / LIST_NAME}: classes: '{unknown[0]}' is not a class of the training images")
    known = classes or listed.classes
    firsts, offsets, sizes, labels = get_or_build(
        "shards",
        folder,
        _PARTS,
        lambda: _state_of(folder, listed),
        lambda: _walk(folder, listed),
        lambda parts: len(parts[1]) >= _WORTH_KEEPING,
    )
    names = tuple(shard.name for shard in listed.shards)
    digest = hashlib.sha256("".join(shard.sha256 for shard in listed.shards).encode()).hexdigest()
    files = OpenFiles([str(folder / name) for name in names], [shard.bytes for shard in listed.shards])
    places = np.array([known.index(name) for name in listed.classes], np.int64)
    return ShardIndex(Members(files, firsts, offsets, sizes, digest), torch.from_numpy(places[labels]), known)


def shard_classes(root: Path, split: str) -> tuple[str, ...]:
    """Return the classes that `shards.json` of `root/split` lists, without reading the shards.

    Raises:
        DataError: as `read_shard_list`.
    """
    return read_shard_list(root / split / LIST_NAME).classes


def _state_of(folder: Path, listed: ShardList) -> tuple[float, str]:
    """Return the time of the newest change among the shards (ctime, in seconds since 1970), and a hash.

    The hash is over everything that the index depends on: the folder's path, the suffixes of image files, the content
    of `shards.json`, and the inode, mtime and ctime of each shard.

    Raises:
        DataError: a shard is missing, or its size differs from the listed size.
    """
    stats = []
    for shard in listed.shards:
        path = folder / shard.name
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; {LIST_NAME} lists it") from None
        if stat.st_size != shard.bytes:
            fault = "cut short" if stat.st_size < shard.bytes else "too long"
            raise DataError(
                f"{path}: {fault}: {stat.st_size} bytes, but {LIST_NAME} lists {shard.bytes}; pack or copy it again"
            )
        stats.append(stat)
    # Include ctime, because programs that copy files can restore mtime.
    times = [(stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]
    text = json.dumps([_VERSION, os.fsdecode(folder.resolve()), IMG_EXTENSIONS, listed.model_dump(), times])
    return max(stat.st_ctime_ns for stat in stats) / 1e9, hashlib.sha256(os.fsencode(text)).hexdigest()


def _walk(folder: Path, listed: ShardList) -> list[Array]:
    total = sum(shard.images for shard in listed.shards)
    if total >= _WORTH_KEEPING:
        log.info(f"{folder}: indexing {total} images in {len(listed.shards)} shards")
    firsts, rows = [0], []
    for shard in listed.shards:
        with Tar(folder / shard.name) as tar:
            found = np.array(list(_samples(tar, firsts[-1], len(listed.classes))), np.int64).reshape(-1, 3)
        if len(found) != shard.images:
            raise DataError(
                f"{folder / shard.name}: holds {len(found)} images, but {LIST_NAME} lists {shard.images}; "
                "pack or copy it again"
            )
        firsts.append(firsts[-1] + len(found))
        rows.append(found)
    # (N, 3) -> (3, N): the cache stores each column as a contiguous array.
    return [np.array(firsts, np.int64), *np.ascontiguousarray(np.concatenate(rows).T)]


def _samples(tar: Tar, first: int, classes: int) -> Iterator[tuple[int, int, int]]:
    """Yield the offset, size and label of each image in a shard; check that the images are numbered from `first` on.

    Raises:
        DataError: a member is missing or out of order, or a label is not an integer from 0 to `classes` - 1.
    """
    members = tar.members()
    for number, one in enumerate(members, start=first):
        pair = (one, next(members, one))
        kinds = {member.name.removeprefix(f"{number:08}").lower(): member for member in pair}
        picture = next((member for kind, member in kinds.items() if kind in IMG_EXTENSIONS), None)
        if picture is None or ".cls" not in kinds:
            raise DataError(
                f"{tar.path}:{one.name}: expected {number:08}.cls and its image ({' '.join(IMG_EXTENSIONS)}); "
                "pack the data again"
            )
        label = kinds[".cls"]
        text = tar.read(label.offset, min(label.size, _LONGEST_LABEL + 1))
        if len(text) > _LONGEST_LABEL or not text.strip().isdigit() or int(text) >= classes:
            raise DataError(
                f"{tar.path}:{label.name}: {text!r} is no class from 0 to {classes - 1}; pack the data again"
            )
        yield picture.offset, picture.size, int(text)
