"""Lists the images of an image folder. The list is cached on disk, and valid until a class folder changes."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from resnext_ignite.data.sources.disk_cache import Array, get_or_build
from resnext_ignite.data.sources.paths import Paths
from resnext_ignite.runtime.errors import DataError, data_error

# Mean and standard deviation of ImageNet, as published by torchvision.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_VERSION = 1
# Do not cache shorter lists: listing so few files takes no noticeable time.
_WORTH_KEEPING = 20_000


@dataclass(frozen=True)
class ImageIndex:
    """The images of a folder, sorted by class and name.

    Args:
        paths: N files; their names below the folder have the form class/file.
        labels: int64 (N,).
        classes: the names of the labels.
    """

    paths: Paths
    labels: Tensor
    classes: tuple[str, ...]


def index_images(root: Path, split: str, classes: tuple[str, ...] | None = None) -> ImageIndex:
    """List the images of `root/split`.

    The list of a large folder is cached in the user's cache folder (`XDG_CACHE_HOME`). A cached list is used only while
    the class folders are unchanged (see `_state_of`).

    Args:
        classes: the allowed classes (the classes of the training split); None: the class folders define them.

    Raises:
        DataError: a folder cannot be read, there is no class, a class has no image or is not in `classes`, or a link
            is broken.
    """
    folder = root / split
    found = _class_folders(folder, split)
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise DataError(f"{folder / unknown[0]}: not a class of the training images")
    known = classes or tuple(found)
    starts, letters, counts = get_or_build(
        "images",
        folder,
        _PARTS,
        lambda: _state_of(folder, found),
        lambda: _list_files(folder, split, found),
        lambda listed: len(listed[0]) - 1 >= _WORTH_KEEPING,
    )
    places = np.array([known.index(name) for name in found], np.int64)
    return ImageIndex(Paths(str(folder), letters, starts), torch.from_numpy(np.repeat(places, counts)), known)


def folder_classes(root: Path, split: str) -> tuple[str, ...]:
    """Return the classes of `root/split` without listing the images.

    Raises:
        DataError: the folder cannot be read, has no class, or holds a broken link.
    """
    return tuple(_class_folders(root / split, split))


# The cached arrays: the start of each name, int64 (N + 1,); the bytes of all names, uint8; and the number of images in
# each class, int64 (C,).
_PARTS = ("starts", "letters", "counts")


def _class_folders(folder: Path, split: str) -> list[str]:
    entries = _entries(folder, split)
    found = sorted(entry.name for entry in entries if entry.is_dir())
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            # The link may have pointed to a class folder.
            raise DataError(f"{entry.path}: a link to {os.readlink(entry.path)}, which does not exist; remove it")
    if not found:
        raise DataError(f"{folder}: holds no class folder; an imagefolder holds {split}/<class>/*.jpg")
    return found


def _list_files(folder: Path, split: str, classes: list[str]) -> list[Array]:
    names: list[str] = []
    counts = []
    for name in classes:
        entries = _entries(folder / name, split)
        files = sorted(entry.name for entry in entries if entry.name.lower().endswith(IMG_EXTENSIONS))
        if not files:
            raise DataError(f"{folder / name}: a class without an image ({' '.join(IMG_EXTENSIONS)})")
        names += [f"{name}/{file}" for file in files]
        counts.append(len(files))
    paths = Paths.of(names)
    return [paths.starts, paths.letters, np.array(counts, np.int64)]


def _entries(folder: Path, split: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise data_error(folder, error, f"an imagefolder holds {split}/<class>/*.jpg") from None


def _state_of(folder: Path, classes: list[str]) -> tuple[float, str]:
    """Return the time of the newest change among the class folders (ctime, in seconds since 1970), and a hash.

    The hash is over everything that the list depends on: the folder's path, the suffixes of image files, and the name,
    inode, mtime and ctime of each class folder.
    """
    try:
        stats = [os.stat(folder / name) for name in classes]
    except OSError as error:
        raise data_error(error.filename, error, "the folder changed while it was read; run again") from None
    # Include ctime, because programs that copy files can restore mtime.
    folders = [
        (name, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in zip(classes, stats, strict=True)
    ]
    text = json.dumps([_VERSION, os.fsdecode(folder.resolve()), IMG_EXTENSIONS, folders])
    return max(stat.st_ctime_ns for stat in stats) / 1e9, hashlib.sha256(os.fsencode(text)).hexdigest()
