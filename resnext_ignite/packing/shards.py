"""Packs a folder of images into tar shards, which training reads sequentially, and checks packed shards.

    <split>/000000.tar      00000000.cls (number of the image's class, in ASCII), 00000000.jpeg, 00000001.cls, ...
    <split>/shards.json     names of the classes; name, size, number of images and sha256 of each shard

WebDataset can read the tar files. Packing the same images again gives byte-identical tar files.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm
from webdataset import TarWriter

from resnext_ignite.data.sampling import Purpose, permutation
from resnext_ignite.data.sources.folders import ImageIndex, index_images
from resnext_ignite.data.sources.shards import LIST_NAME, Shard, ShardList, index_shards, read_shard_list
from resnext_ignite.packing.images import read_image
from resnext_ignite.packing.options import Encoding, locked
from resnext_ignite.packing.workers import in_workers, storage_error
from resnext_ignite.runtime.errors import ConfigError, DataError, RunFolderError
from resnext_ignite.runtime.storage import HashingFile, replace_durably, sha256_of, write_durably

SPLITS = ("train", "val", "test")
# Seed of the random order in which training images are packed. It is fixed, and does not depend on the seed of a run.
_ORDER_SEED = 0
_LEFTOVERS = re.compile(r"\d{6,}\.tar|\.\d{6,}\.tar\.tmp|\.shards\.json\.tmp")
_LABEL = "cls"
_BLOCK, _RECORD = 512, 10_240


@dataclass(frozen=True)
class Limit:
    """The limits of a shard. Only a shard with a single image may exceed `size`.

    Args:
        images: maximum number of images; None: no limit.
        size: maximum size of the tar file in bytes; None: no limit.
    """

    images: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Split:
    """A packed split: its folder, its classes and shards in order, and the time to pack or check it, in seconds."""

    folder: Path
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    seconds: float

    def __str__(self) -> str:
        images, size = sum(shard.images for shard in self.shards), sum(shard.bytes for shard in self.shards)
        return (
            f"{self.folder}: {images} images, {len(self.classes)} classes, {len(self.shards)} shards, "
            f"{size} bytes, {images / self.seconds:.0f} images/s"
        )


@dataclass(frozen=True)
class _Sample:
    key: str
    label: int
    content: bytes
    suffix: str

    def as_webdataset(self) -> dict[str, str | bytes]:
        return {"__key__": self.key, _LABEL: b"%d" % self.label, self.suffix: self.content}

    def size(self) -> int:
        """Return the number of bytes that the sample takes in a tar file.

        Label and image are separate members; each has a header of one block and is padded to whole blocks.
        """
        return 2 * _BLOCK + sum(-(-length // _BLOCK) * _BLOCK for length in (len(str(self.label)), len(self.content)))


def pack_folder(source: Path, output: Path, limit: Limit, encoding: Encoding, workers: int) -> list[Split]:
    """Pack the splits of an imagefolder; the `shards.json` files are written after the shards of all splits.

    The images of the training split are shuffled once, so that each shard mixes classes. The images of other splits
    keep their order.

    Args:
        source: holds train/<class>/*, val/<class>/* or test/<class>/*.
        output: a folder without packed splits; the remains of an interrupted packing in it are removed.
        limit: the limits of each shard.
        encoding: whether and how images are shrunk.
        workers: number of processes that read; 0: this process reads.

    Raises:
        DataError: something in the source is missing or cannot be read; the message names it.
        ConfigError: the output lies in a split of the source, and would be one of its classes.
        RunFolderError: the output holds packed splits or other files, or is used by another process.
        StorageError: the disk is full.
    """
    there = [split for split in SPLITS if (source / split).is_dir()]
    if not there:
        raise DataError(f"{source}: not an imagefolder: neither train/, val/ nor test/ is there")
    for split in there:
        if output.resolve().is_relative_to((source / split).resolve()):
            raise ConfigError(f"--output {output}: lies in {source / split}, among its classes; choose another folder")
    indices: dict[str, ImageIndex] = {}
    for split in there:
        indices[split] = index_images(source, split, indices["train"].classes if "train" in indices else None)
    _check_names(source, next(iter(indices.values())).classes)
    with locked(output):
        _clear(output)
        try:
            packed = [_pack(split, index, output, limit, encoding, workers) for split, index in indices.items()]
            for done in packed:
                _write_list(done)
        except OSError as error:
            raise storage_error(error) from None
    return packed


def _check_names(source: Path, classes: tuple[str, ...]) -> None:
    # The name of a folder may hold any bytes. `shards.json`, which other programs read too, must be valid text.
    for name in classes:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise DataError(f"{source}: the class {name!a} is not valid text; rename its folder")


def is_packed(output: Path, splits: tuple[str, ...]) -> bool:
    """Return whether a folder holds all of these splits, completely packed."""
    return all((output / split / LIST_NAME).exists() for split in splits)


def _clear(output: Path) -> None:
    """Remove the files of an interrupted packing; raise RunFolderError if there are other files."""
    remains: list[Path] = []
    for split in SPLITS:
        folder = output / split
        for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
            if entry.name == LIST_NAME:
                # Refuse this even if an interrupted packing left other splits without a list: the source may have
                # changed since then.
                raise RunFolderError(f"{folder}: is packed already; choose another --output, or remove it")
            if _LEFTOVERS.fullmatch(entry.name) is None:
                raise RunFolderError(f"{entry}: is not a shard of an interrupted packing; choose another --output")
            remains.append(entry)
    for entry in remains:
        entry.unlink()
    for split in SPLITS:
        if (output / split).is_dir():
            (output / split).rmdir()


def _pack(split: str, index: ImageIndex, output: Path, limit: Limit, encoding: Encoding, workers: int) -> Split:
    folder, start = output / split, time.perf_counter()
    folder.mkdir()
    shuffled = split == "train"
    samples = _numbered(_read(index, encoding, workers, shuffled=shuffled), limit)
    bar: Any = tqdm(samples, total=len(index.labels), desc=f"packing {split}", unit=" images", disable=None)
    shards = [
        _write_shard(folder / f"{number:06d}.tar", (sample for _, sample in group))
        for number, group in groupby(bar, key=itemgetter(0))
    ]
    return Split(folder, index.classes, tuple(shards), time.perf_counter() - start)


def _read(index: ImageIndex, encoding: Encoding, workers: int, *, shuffled: bool) -> Iterator[_Sample]:
    count = len(index.labels)
    order = permutation(_ORDER_SEED, 0, count, Purpose.PACKED) if shuffled else torch.arange(count)
    labels = index.labels[order].tolist()
    paths = index.paths.take(order.numpy())
    contents = in_workers(lambda position: read_image(Path(paths[position]), encoding), count, workers)
    for position, (content, suffix) in enumerate(contents):
        yield _Sample(f"{position:08d}", labels[position], content, suffix)


def _numbered(samples: Iterator[_Sample], limit: Limit) -> Iterator[tuple[int, _Sample]]:
    """Distribute the samples over shards: yield (number of the shard, sample) for each sample."""
    number = images = size = 0
    for sample in samples:
        grown = size + sample.size()
        if images and (images == limit.images or (limit.size is not None and _tar_size(grown) > limit.size)):
            number, images, grown = number + 1, 0, sample.size()
        images, size = images + 1, grown
        yield number, sample


def _tar_size(members: int) -> int:
    # A tar file ends with two blocks of zeros, and is padded to whole records.
    return -(-(members + 2 * _BLOCK) // _RECORD) * _RECORD


def _write_shard(path: Path, samples: Iterator[_Sample]) -> Shard:
    shards: list[Shard] = []

    def write(file: IO[bytes]) -> None:
        hashing, images = HashingFile(file), 0
        with TarWriter(hashing, user="", group="", mtime=0, encoder=False) as tar:
            for images, sample in enumerate(samples, start=1):  # noqa: B007
                tar.write(sample.as_webdataset())
        sha256 = hashing.hash.hexdigest()
        shards.append(Shard(name=path.name, bytes=file.tell(), images=images, sha256=sha256))

    replace_durably(path, write)
    return shards[0]


def _write_list(split: Split) -> None:
    listed = ShardList(classes=split.classes, shards=split.shards)
    write_durably(split.folder / LIST_NAME, listed.model_dump_json(indent=1) + "\n")


def check_folder(root: Path) -> list[Split]:
    """Read all shards of a packed folder, and compare them with `shards.json`.

    Raises:
        DataError: a shard is missing or differs from its entry; the message names it.
    """
    folders = [root / split for split in SPLITS if (root / split).is_dir()]
    if not folders:
        raise DataError(f"{root}: holds no packed split: neither train/, val/ nor test/ is there")
    checked = []
    for folder in folders:
        start, listed = time.perf_counter(), read_shard_list(folder / LIST_NAME)
        # Check the sizes, and locate each image in the shards, as training does.
        index_shards(root, folder.name)
        for shard in tqdm(listed.shards, desc=f"checking {folder.name}", unit=" shards", disable=None):
            _check_sum(folder / shard.name, shard.sha256)
        checked.append(Split(folder, listed.classes, listed.shards, time.perf_counter() - start))
    return checked


def _check_sum(path: Path, expected: str) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; pack again") from None
    if found != expected:
        raise DataError(f"{path}: is damaged: its sha256 is not that of {LIST_NAME}; pack again")
