"""Finds the images of ILSVRC2012, either in its original tar files or in folders with the contents of the tar files."""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torchvision.datasets.folder import IMG_EXTENSIONS

from resnext_ignite.packing.archives import content_in, entries_of, files_in, opened
from resnext_ignite.packing.devkit import GROUND_TRUTH, Devkit
from resnext_ignite.runtime.errors import DataError

_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
Picture = bytes | Path
"""The content of an image file, or its path."""


@dataclass(frozen=True)
class TrainClass:
    """A training class. Its images are in a folder, a tar file, or a tar file (`member`) inside another tar file."""

    path: Path
    member: tarfile.TarInfo | None = None

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        """Yield each image of the class, with its file name (without folders).

        Raises:
            DataError: the folder or tar file of the class cannot be read; the message names it.
        """
        if self.path.is_dir():
            for entry in entries_of(self.path):
                if _is_picture(entry.name):
                    yield entry.name, Path(entry.path)
            return
        with contextlib.ExitStack() as stack:
            name = str(self.path)
            archive = stack.enter_context(opened(self.path, name))
            if self.member is not None:
                inner, name = archive.extractfile(self.member), f"{self.path}: {self.member.name}"
                if inner is not None:
                    archive = stack.enter_context(opened(inner, name))
            for member in files_in(archive, name):
                if _is_picture(member.name):
                    yield PurePosixPath(member.name).name, content_in(archive, member)


def train_classes(path: Path) -> dict[str, TrainClass]:
    """Return a dict of the training classes: WordNet ID -> class.

    Args:
        path: `ILSVRC2012_img_train.tar`, or a folder that holds a folder or a tar file for each class.

    Raises:
        DataError: the tar file is damaged, or the folder cannot be read.
    """
    if path.is_dir():
        files = [entry for entry in entries_of(path) if entry.is_dir() or entry.name.endswith(".tar")]
        return {entry.name.removesuffix(".tar"): TrainClass(Path(entry.path)) for entry in files}
    with opened(path, str(path)) as archive:
        members = {PurePosixPath(member.name): member for member in files_in(archive, str(path))}
    return {name.stem: TrainClass(path, member) for name, member in members.items() if name.suffix == ".tar"}


@dataclass(frozen=True)
class ValImage:
    """A validation image: its file name, the WordNet ID of its class, and `place`, which is a tar entry or a path."""

    name: str
    wnid: str
    place: tarfile.TarInfo | Path


def val_images(path: Path, devkit: Devkit) -> list[ValImage]:
    """Return the validation images, sorted by file name.

    Args:
        path: `ILSVRC2012_img_val.tar`, or a folder of the images, with or without class folders.
        devkit: the development kit, which gives the class of each image.

    Raises:
        DataError: the tar file is damaged; or an image exists twice, is in the folder of another class, or does not
            have the name of a validation image.
    """
    found: dict[str, ValImage] = {}
    if path.is_dir():
        for folder, folders, files in os.walk(path):
            folders.sort()
            for name in filter(_is_picture, files):
                picture = ValImage(name, _class_of(name, path, devkit), Path(folder, name))
                of_folder = os.path.basename(folder)
                if of_folder in devkit.synsets and of_folder != picture.wnid:
                    raise DataError(f"{picture.place}: the development kit says that it shows {picture.wnid}")
                _add(found, picture, path)
    else:
        with opened(path, str(path)) as archive:
            for member in files_in(archive, str(path)):
                name = PurePosixPath(member.name).name
                if _is_picture(name):
                    _add(found, ValImage(name, _class_of(name, path, devkit), member), path)
    return [found[name] for name in sorted(found)]


def contents_of(path: Path, pictures: Sequence[ValImage]) -> Iterator[tuple[ValImage, Picture]]:
    """Yield validation images, each with its content or path; raise DataError if the tar file is damaged."""
    with contextlib.ExitStack() as stack:
        archive = None if path.is_dir() else stack.enter_context(opened(path, str(path)))
        for picture in pictures:
            if isinstance(picture.place, Path):
                yield picture, picture.place
            elif archive is not None:
                yield picture, content_in(archive, picture.place)


def _add(found: dict[str, ValImage], picture: ValImage, path: Path) -> None:
    if picture.name in found:
        raise DataError(f"{path}: {picture.name}: exists twice")
    found[picture.name] = picture


def _class_of(name: str, path: Path, devkit: Devkit) -> str:
    number = _VAL_NAME.fullmatch(name)
    if number is None:
        raise DataError(f"{path}: {name}: is not the name of a validation image (ILSVRC2012_val_00000001.JPEG)")
    if not 1 <= int(number[1]) <= len(devkit.ground_truth):
        raise DataError(f"{path}: {name}: {GROUND_TRUTH} of {devkit.path} has {len(devkit.ground_truth)} lines")
    return devkit.ground_truth[int(number[1]) - 1]


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not PurePosixPath(name).name.startswith(".")
