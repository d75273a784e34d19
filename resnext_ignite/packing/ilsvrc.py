"""Unpacks ILSVRC2012's archives into class folders: `train/<wnid>/*`, `val/<wnid>/*`.

Each training class is first unpacked into the folder `.unpacking`. When the class is complete, its folder is moved into
`train/`. The validation split is unpacked and moved in the same way, but as a whole. The command can therefore resume
after it was killed. After a power failure, some files may be empty; the check at the end finds them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from resnext_ignite.packing.archives import entries_of
from resnext_ignite.packing.devkit import GROUND_TRUTH, Devkit, read_devkit
from resnext_ignite.packing.images import content_of, shrunk
from resnext_ignite.packing.options import Encoding, locked
from resnext_ignite.packing.sources import Picture, TrainClass, ValImage, contents_of, train_classes, val_images
from resnext_ignite.packing.workers import in_workers, storage_error
from resnext_ignite.runtime.errors import ConfigError, DataError, RunFolderError
from resnext_ignite.runtime.storage import write_durably

_RECORD, _UNPACKING = "prepared.json", ".unpacking"
_CHUNK = 250


@dataclass(frozen=True)
class Archives:
    """The three archives of ILSVRC2012, or folders with their contents."""

    train: Path
    val: Path
    devkit: Path


@dataclass(frozen=True)
class Expected:
    """The required numbers of classes, training images and validation images."""

    classes: int
    train_images: int
    val_images: int


def prepare(sources: Archives, output: Path, expected: Expected, encoding: Encoding, workers: int) -> None:
    """Unpack the images into class folders, shrink them if requested, and check the numbers of classes and images.

    If the training source lacks classes of the development kit, the validation images of these classes are left out.
    If a source is a folder, images that are not shrunk are hard-linked, or copied if links are impossible.

    Args:
        sources: the archives or folders.
        output: folder for `train/`, `val/` and `classes.txt`.
        expected: the numbers to check.
        encoding: whether and how images are shrunk.
        workers: number of processes that unpack; 0: this process unpacks.

    Raises:
        DataError: a file or class is missing or damaged, or the number of classes or images is not as expected; the
            message names the file, class or folder.
        ConfigError: the output lies in a source, or a source lies in the output's `train/` or `val/`.
        RunFolderError: the output holds other files, was begun with another encoding, or is used by another process.
        StorageError: the disk is full.
    """
    for option, folder in (("--train", sources.train), ("--val", sources.val)):
        _refuse_overlap(option, folder, output)
    devkit = read_devkit(sources.devkit)
    classes = train_classes(sources.train)
    _check_classes(classes, sources.train, devkit, expected.classes)
    val = [picture for picture in val_images(sources.val, devkit) if picture.wnid in classes]
    _check_val(val, sources.val, devkit, expected)
    with locked(output):
        try:
            _begin(output, encoding)
            _unpack_train(classes, output, expected.train_images, encoding, workers)
            _unpack_val(sources.val, val, output, encoding, workers)
            shutil.rmtree(output / _UNPACKING)
            _check_images(output / "train", expected.train_images, devkit)
            _check_images(output / "val", expected.val_images, devkit)
            lines = (f"{wnid} {devkit.synsets[wnid].words}\n" for wnid in sorted(classes))
            write_durably(output / "classes.txt", "".join(lines))
        except OSError as error:
            raise storage_error(error) from None


def _refuse_overlap(option: str, source: Path, output: Path) -> None:
    if not source.exists():
        raise DataError(f"{option} {source}: does not exist")
    source, output = source.resolve(), output.resolve()
    inside = any(source.is_relative_to(output / split) for split in ("train", "val"))
    if source.is_dir() and (inside or output.is_relative_to(source)):
        raise ConfigError(f"{option} {source}: lies in --output {output}, or contains it; choose another --output")


def _check_classes(classes: dict[str, TrainClass], train: Path, devkit: Devkit, expected: int) -> None:
    unknown, missing = sorted(classes.keys() - devkit.synsets.keys()), sorted(devkit.synsets.keys() - classes.keys())
    if unknown:
        raise DataError(f"{train}: {unknown[0]}: is not a class of {devkit.path}")
    if len(classes) != expected:
        first = (
            f"the first missing class of the development kit is {missing[0]}"
            if missing
            else "no class of the development kit is missing"
        )
        raise DataError(f"{train}: holds {len(classes)} classes, not {expected}; {first}")


def _check_val(val: list[ValImage], path: Path, devkit: Devkit, expected: Expected) -> None:
    lines = len(devkit.ground_truth)
    if len(devkit.synsets) == expected.classes and lines != expected.val_images:
        raise DataError(f"{devkit.path}: {GROUND_TRUTH} has {lines} lines, not {expected.val_images}")
    if len(val) != expected.val_images:
        raise DataError(f"{path}: holds {len(val)} validation images of these classes, not {expected.val_images}")


def _begin(output: Path, encoding: Encoding) -> None:
    record, asked = output / _RECORD, asdict(encoding)
    if record.exists():
        try:
            before = json.loads(record.read_bytes())
        except ValueError:
            before = None
        if before != asked:
            raise RunFolderError(
                f"{output}: was begun with the encoding {before}, not {asked}; choose another --output"
            )
    else:
        for split in ("train", "val"):
            if (output / split).exists():
                raise RunFolderError(
                    f"{output / split}: exists already, and not from this command; choose another --output"
                )
        write_durably(record, json.dumps(asked) + "\n")
    shutil.rmtree(output / _UNPACKING, ignore_errors=True)
    for folder in (output / _UNPACKING, output / "train"):
        folder.mkdir(exist_ok=True)


def _unpack_train(classes: dict[str, TrainClass], output: Path, images: int, encoding: Encoding, workers: int) -> None:
    left = [wnid for wnid in sorted(classes) if not (output / "train" / wnid).exists()]

    def unpack(number: int) -> int:
        wnid = left[number]
        temporary, count = output / _UNPACKING / wnid, 0
        temporary.mkdir()
        for count, (name, picture) in enumerate(classes[wnid].pictures(), start=1):  # noqa: B007
            _place(picture, temporary / name, encoding)
        if not count:
            raise DataError(f"{classes[wnid].path}: {wnid}: a class without an image")
        temporary.rename(output / "train" / wnid)
        return count

    _run(unpack, len(left), workers, desc="unpacking train", total=images if len(left) == len(classes) else None)


def _unpack_val(path: Path, val: list[ValImage], output: Path, encoding: Encoding, workers: int) -> None:
    if (output / "val").exists():
        return
    temporary = output / _UNPACKING / "val"
    for wnid in sorted({picture.wnid for picture in val}):
        (temporary / wnid).mkdir(parents=True)
    chunks = [val[start : start + _CHUNK] for start in range(0, len(val), _CHUNK)]

    def unpack(number: int) -> int:
        for picture, content in contents_of(path, chunks[number]):
            _place(content, temporary / picture.wnid / picture.name, encoding)
        return len(chunks[number])

    _run(unpack, len(chunks), workers, desc="unpacking val", total=len(val))
    temporary.rename(output / "val")


def _run(unpack: Callable[[int], int], count: int, workers: int, *, desc: str, total: int | None) -> None:
    with tqdm(total=total, desc=desc, unit=" images", disable=None) as bar:
        for images in in_workers(unpack, count, workers):
            bar.update(images)


def _place(picture: Picture, target: Path, encoding: Encoding) -> None:
    """Write an image to `target`, shrunk if requested. If `picture` is a path and is not shrunk, hard-link it."""
    try:
        if isinstance(picture, bytes):
            # Mode x: two images with the same name are an error.
            with target.open("xb") as file:
                file.write(picture)
            picture = target
        if picture.stat().st_size == 0:
            raise DataError(f"{picture}: is empty; download it again")
        content = shrunk(picture, encoding) if encoding.short_side is not None else None
        if content is not None:
            target.write_bytes(content)
        elif picture is not target:
            _link(picture, target)
    except FileExistsError:
        raise DataError(f"{target.parent.name}/{target.name}: exists twice") from None
    except FileNotFoundError:
        raise DataError(
            f"{target.parent.name}/{target.name}: is a broken link, or was removed during this run"
        ) from None
    except OSError as error:
        # If a write to an open file fails, the error does not name the file.
        error.filename = error.filename or str(target)
        raise


def _link(source: Path, target: Path) -> None:
    try:
        # If the source is a symbolic link, link to the file behind it: a relative symbolic link would be broken in
        # another folder.
        os.link(os.path.realpath(source), target)
    except FileExistsError:
        raise
    except OSError:
        # The source is on another file system, or the file system has no hard links.
        target.write_bytes(content_of(source))


def _check_images(folder: Path, expected: int, devkit: Devkit) -> None:
    counts: dict[str, int] = {}
    for entry in entries_of(folder):
        for file in entries_of(Path(entry.path)):
            if file.stat().st_size == 0:
                raise DataError(f"{file.path}: is empty; remove its folder, and run this again")
            counts[entry.name] = counts.get(entry.name, 0) + 1
    total = sum(counts.values())
    if total != expected:
        raise DataError(f"{folder}: holds {total} images, not {expected}{_first_odd(folder, counts, devkit)}")


def _first_odd(folder: Path, counts: dict[str, int], devkit: Devkit) -> str:
    """Return the end of the error message. For `train`, it names the first class with a wrong number of images."""
    if folder.name != "train":
        return "; remove that folder, and run this again"
    for wnid, count in counts.items():
        stated = devkit.synsets[wnid].train_images if wnid in devkit.synsets else 0
        if count != stated:
            return f": {wnid} has {count}, the development kit says {stated}; fix it, remove that folder and run again"
    return "; each class has as many as the development kit says"
