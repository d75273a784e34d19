"""Folders of pictures: `<split>/<class>/*`, decoded by PIL in the workers or once into memory."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from resnext_ignite.data.images import UNREADABLE, Images
from resnext_ignite.data.sampling import Purpose, uniform
from resnext_ignite.errors import DataError

log = logging.getLogger(__name__)

# ImageNet's, as torchvision publishes them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10
_SHARE_OF_MEMORY = 0.4
_PROBES = 64


@dataclass(frozen=True)
class ImageFiles:
    """A split as files.

    Args:
        paths: N files.
        labels: int64 (N,).
        indices: int64 (N,), each picture's index in its whole split: the key of all that is random about it.
        size: side of a decoded picture in pixels.
        crop_share: side of the central square that is kept, over the shorter side.
    """

    paths: Sequence[str]
    labels: Tensor
    indices: Tensor
    size: int
    crop_share: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> ImageFiles:
        """The files at some positions (int64), keeping their indices."""
        paths = [self.paths[position] for position in positions.tolist()]
        return ImageFiles(paths, self.labels[positions], self.indices[positions], self.size, self.crop_share)

    def contents(self) -> str:
        """How many pictures, and the hash of their names: class/file, in order."""
        names = os.fsencode("\n".join("/".join(path.rsplit(os.sep, 2)[-2:]) for path in self.paths))
        return f"{len(self)} images, sha256 of names {hashlib.sha256(names).hexdigest()[:16]}"

    def load(self, positions: Tensor) -> Tensor:
        """Decode, resize and centre-crop: int64 (n,) -> uint8 (n, size, size, 3); raises as `read`."""
        return self.read(positions)[0]

    def read(
        self, positions: Tensor, crop_key: tuple[int, int] | None = None, fill: tuple[int, int, int] | None = None
    ) -> tuple[Tensor, dict[int, str]]:
        """Decode some pictures: int64 (n,) -> uint8 (n, size, size, 3), and why some could not be read.

        Args:
            crop_key: (seed, epoch): take each picture's keyed random-resized crop; None: the centre.
            fill: the colour that stands for a picture that cannot be read, whose place among `positions` is then
                returned with the reason; None: such a picture is an error.

        Raises:
            DataError: a picture cannot be read and there is no `fill`; the line names it.
        """
        pictures = np.empty((len(positions), self.size, self.size, 3), dtype=np.uint8)
        draws = None if crop_key is None else self._crop_draws(positions, *crop_key)
        unreadable: dict[int, str] = {}
        with _no_warnings():
            for place, position in enumerate(positions.tolist()):
                try:
                    picture = _open(self.paths[position])
                except DataError as error:
                    if fill is None:
                        raise
                    pictures[place], unreadable[place] = fill, str(error)
                    continue
                if draws is None:
                    pictures[place] = center_crop(picture, self.size, self.crop_share)
                else:
                    pictures[place] = _resized(picture, self.size, random_box(*picture.size, draws[place]))
        return torch.from_numpy(pictures), unreadable

    def _crop_draws(self, positions: Tensor, seed: int, epoch: int) -> list[list[list[float]]]:
        """Uniform numbers: n times attempts times 4."""
        purposes = range(Purpose.RESIZED_CROP, Purpose.RESIZED_CROP + 4 * _ATTEMPTS)
        indices = self.indices[positions]
        draws = torch.stack([uniform(seed, epoch, indices, k) for k in purposes], dim=1)
        return draws.view(-1, _ATTEMPTS, 4).tolist()


def find_images(
    root: Path, split: str, classes: tuple[str, ...] | None = None
) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """The pictures of `root/split`, sorted by class and name: paths, labels int64 (N,), classes.

    Args:
        classes: the classes there may be (those of the training split); None: the folders are the classes.

    Raises:
        DataError: no such folder, no class, a class without a picture, or one that training does not know.
    """
    folder = root / split
    entries = _entries(folder, split)
    found = sorted(entry.name for entry in entries if entry.is_dir())
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            # It would have been a class.
            raise DataError(f"{entry.path}: a link to {os.readlink(entry.path)}, which is not there")
    if not found:
        raise DataError(f"{folder}: holds no class folder; an imagefolder holds {split}/<class>/*.jpg")
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise DataError(f"{folder / unknown[0]}: not a class of the training images")
    known = classes or tuple(found)
    paths: list[str] = []
    labels: list[int] = []
    for name in found:
        entries = _entries(folder / name, split)
        files = sorted(entry.path for entry in entries if entry.name.lower().endswith(IMG_EXTENSIONS))
        if not files:
            raise DataError(f"{folder / name}: a class without a picture ({' '.join(IMG_EXTENSIONS)})")
        paths += files
        labels += [known.index(name)] * len(files)
    return paths, torch.tensor(labels), known


def _entries(folder: Path, split: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; an imagefolder holds {split}/<class>/*.jpg") from None


def _open(path: str) -> Image.Image:
    with _opened(path) as picture:
        pixels = picture.width * picture.height
        # PIL itself warns here, and refuses at twice as many.
        if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{pixels} pixels are more than a picture should have ({Image.MAX_IMAGE_PIXELS})")
        return picture.convert("RGB")


def _has_size(path: str, size: int) -> bool:
    # What cannot be read is met when it is decoded.
    with contextlib.suppress(DataError), _opened(path) as picture:
        return picture.size == (size, size)
    return True


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with open(path, "rb", opener=_without_waiting) as file, Image.open(file) as picture:
            yield picture
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a picture; remove or replace it") from None
    except Exception as error:
        # Whatever it is: PIL's readers answer damaged files with a dozen types, TypeError among them.
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read: {reason or type(error).__name__}; remove or replace it") from None


def _without_waiting(path: str, flags: int) -> int:
    # A pipe that nobody writes to would be waited for without end.
    return os.open(path, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    # PIL warns of odd metadata, which says nothing of the pixels. Never entered in a thread: the filters are the
    # process's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def center_crop(picture: Image.Image, size: int, share: float = 1.0) -> NDArray[np.uint8]:
    """The central square of `share` of the shorter side, resized with antialiasing: (size, size, 3)."""
    if picture.size == (size, size) and share == 1.0:
        return np.asarray(picture)
    side = min(picture.size) * share
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    return _resized(picture, size, (left, top, left + side, top + side))


def _resized(picture: Image.Image, size: int, box: tuple[float, float, float, float]) -> NDArray[np.uint8]:
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box))


def random_box(width: int, height: int, draws: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """A box of random area and aspect (left, top, right, bottom), from uniform numbers (attempts, 4).

    As torchvision's RandomResizedCrop and fb.resnext.torch's RandomSizedCrop: the first attempt that fits, else the
    central box of the nearest allowed aspect.
    """
    for area_draw, aspect_draw, top_draw, left_draw in draws:
        area = width * height * (_AREA[0] + area_draw * (_AREA[1] - _AREA[0]))
        # Uniform in the logarithm, so that portrait and landscape are equally likely.
        low, high = np.log(_ASPECT)
        aspect = float(np.exp(low + aspect_draw * (high - low)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top, left = int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, _ASPECT[0]), _ASPECT[1])
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def decode_into_memory(
    files: ImageFiles,
    *,
    any_size: bool,
    report: bool,
    fill: tuple[int, int, int] | None = None,
    processes: int = 1,
    threads: int | None = None,
) -> Images | None:
    """Decode a whole split once, in parallel; None where it does not fit, or a picture has not `size` as it is.

    Args:
        any_size: resize pictures of other sizes instead of giving up.
        report: draw a bar on standard error, and warn of pictures that cannot be read.
        fill: as for `ImageFiles.read`; the label of such a picture is UNREADABLE.
        processes: that do the same on this machine, each with as much memory.
        threads: that decode; None: as many as there are cores.

    Raises:
        DataError: a picture cannot be read and there is no `fill`; the line names it.
    """
    needed = len(files) * files.size**2 * 3
    if processes * needed > _SHARE_OF_MEMORY * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    pictures = np.empty((len(files), files.size, files.size, 3), dtype=np.uint8)
    unreadable: dict[int, str] = {}

    def decode(position: int) -> bool:
        try:
            picture = _open(files.paths[position])
        except DataError as error:
            if fill is None:
                raise
            pictures[position], unreadable[position] = fill, str(error)
            return True
        if picture.size != (files.size, files.size) and not any_size:
            return False
        pictures[position] = center_crop(picture, files.size, files.crop_share)
        return True

    with _no_warnings():
        # A look at a few headers spares large pictures a decoding in vain.
        step = max(1, len(files) // _PROBES)
        if not any_size and not all(_has_size(path, files.size) for path in files.paths[::step]):
            return None
        bar: Any = tqdm(total=len(files), desc="decoding", unit=" images", disable=None if report else True)
        # Threads: PIL decodes outside the interpreter's lock.
        with bar, ThreadPoolExecutor(max_workers=threads or len(os.sched_getaffinity(0))) as pool:
            for start in range(0, len(files), 1024):
                fits = list(pool.map(decode, range(start, min(start + 1024, len(files)))))
                bar.update(len(fits))
                if not all(fits):
                    return None
    labels = files.labels.clone()
    for position, reason in sorted(unreadable.items()):
        labels[position] = UNREADABLE
        if report:
            log.warning("skipped: %s", reason)
    return Images(torch.from_numpy(pictures), labels, files.indices)
