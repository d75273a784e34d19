"""Reads ILSVRC2012's development kit: the classes, and the class of each validation image.

The kit's readme.txt describes the layout in its section 'Data'.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from resnext_ignite.runtime.errors import DataError

META, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_FOLDER = "ILSVRC2012_devkit_t12"


@dataclass(frozen=True)
class Synset:
    """A class: its WordNet ID (`n01440764`), its names (`tench, Tinca tinca`), and its number of training images."""

    wnid: str
    words: str
    train_images: int


@dataclass(frozen=True)
class Devkit:
    """The content of the development kit.

    Args:
        path: the archive or folder that the kit was read from.
        synsets: WordNet ID -> class. It contains only the leaves of the WordNet hierarchy.
        ground_truth: the class (WordNet ID) of each validation image; the first entry belongs to image number 1.
    """

    path: Path
    synsets: dict[str, Synset]
    ground_truth: list[str]


def read_devkit(path: Path) -> Devkit:
    """Read the kit from `ILSVRC2012_devkit_t12.tar.gz`, or from a folder with its contents.

    Raises:
        DataError: a file of the kit is missing or damaged; the message names the file.
    """
    meta, lines = _content(path, META), _content(path, GROUND_TRUTH).decode(errors="replace").split()
    try:
        table = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        ids, synsets = zip(*(_synset(row) for row in table if row["num_children"] == 0), strict=True)
    except Exception as error:
        # For a damaged file, loadmat raises errors of many types.
        raise DataError(f"{path}: {META} cannot be read: {error}; download the development kit again") from None
    by_id = dict(zip(ids, synsets, strict=True))
    ground_truth = []
    for number, line in enumerate(lines, start=1):
        synset = by_id.get(int(line)) if line.isdecimal() else None
        if synset is None:
            raise DataError(f"{path}: {GROUND_TRUTH}:{number}: {line} is not the ILSVRC2012_ID of a class")
        ground_truth.append(synset.wnid)
    return Devkit(path, {synset.wnid: synset for synset in synsets}, ground_truth)


def _synset(row: Any) -> tuple[int, Synset]:
    return int(row["ILSVRC2012_ID"]), Synset(str(row["WNID"]), str(row["words"]), int(row["num_train_images"]))


def _content(path: Path, name: str) -> bytes:
    """Return the content of a file of the kit."""
    try:
        if path.is_dir():
            folder = next(place for place in (path, path / _FOLDER) if (place / name).is_file())
            return (folder / name).read_bytes()
        with tarfile.open(path) as archive:
            member = next(member for member in archive if member.isreg() and f"/{member.name}".endswith(f"/{name}"))
            file = archive.extractfile(member)
            return b"" if file is None else file.read()
    except StopIteration:
        raise DataError(f"{path}: holds no {name}; it is not ILSVRC2012_devkit_t12.tar.gz or its content") from None
    except (OSError, EOFError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}; it should be ILSVRC2012_devkit_t12.tar.gz") from None
