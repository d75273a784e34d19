"""Folders of pictures: `<split>/<class>/*`, decoded by PIL in the workers or once into memory."""

from __future__ import annotations

import contextlib
import os
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

from resnext_ignite.data.images import Images
from resnext_ignite.data.sampling import Purpose, uniform
from resnext_ignite.errors import DataError

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

    def load(self, positions: Tensor) -> Tensor:
        """Decode, resize and centre-crop: int64 (n,) -> uint8 (n, size, size, 3).

        Raises:
            DataError: a picture cannot be read; the line names it.
        """
        pictures = np.empty((len(positions), self.size, self.size, 3), dtype=np.uint8)
        for place, position in enumerate(positions.tolist()):
            pictures[place] = center_crop(_open(self.paths[position]), self.size, self.crop_share)
        return torch.from_numpy(pictures)

    def load_random_crops(self, positions: Tensor, seed: int, epoch: int) -> Tensor:
        """Decode and take each picture's keyed random-resized crop: int64 (n,) -> uint8 (n, size, size, 3).

        Raises:
            DataError: as `load`.
        """
        indices = self.indices[positions]
        purposes = range(Purpose.RESIZED_CROP, Purpose.RESIZED_CROP + 4 * _ATTEMPTS)
        # Shape (n, attempts, 4).
        draws = torch.stack([uniform(seed, epoch, indices, k) for k in purposes], dim=1).view(-1, _ATTEMPTS, 4)
        pictures = []
        for position, draw in zip(positions.tolist(), draws.tolist(), strict=True):
            picture = _open(self.paths[position])
            box = random_box(picture.width, picture.height, draw)
            pictures.append(np.asarray(picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box)))
        return torch.from_numpy(np.stack(pictures))


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
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; an imagefolder holds {split}/<class>/*.jpg") from None
    if not found:
        raise DataError(f"{folder}: holds no class folder; an imagefolder holds {split}/<class>/*.jpg")
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise DataError(f"{folder / unknown[0]}: not a class of the training images")
    known = classes or tuple(found)
    paths: list[str] = []
    labels: list[int] = []
    for name in found:
        with os.scandir(folder / name) as entries:
            files = sorted(entry.path for entry in entries if entry.name.lower().endswith(IMG_EXTENSIONS))
        if not files:
            raise DataError(f"{folder / name}: a class without a picture ({' '.join(IMG_EXTENSIONS)})")
        paths += files
        labels += [known.index(name)] * len(files)
    return paths, torch.tensor(labels), known


def _open(path: str) -> Image.Image:
    with _named_errors(path), Image.open(path) as picture:
        pixels = picture.width * picture.height
        # PIL itself warns here, and refuses at twice as many.
        if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{pixels} pixels are more than a picture should have ({Image.MAX_IMAGE_PIXELS})")
        return picture.convert("RGB")


def _size(path: str) -> tuple[int, int]:
    with _named_errors(path), Image.open(path) as picture:
        return picture.size


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a picture; remove or replace it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove or replace it") from None


def center_crop(picture: Image.Image, size: int, share: float = 1.0) -> NDArray[np.uint8]:
    """The central square of `share` of the shorter side, resized with antialiasing: (size, size, 3)."""
    if picture.size == (size, size) and share == 1.0:
        return np.asarray(picture)
    side = min(picture.size) * share
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
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


def decode_into_memory(files: ImageFiles, *, any_size: bool, progress: bool) -> Images | None:
    """Decode a whole split once, in parallel; None where it does not fit, or a picture has not `size` as it is.

    Args:
        any_size: resize pictures of other sizes instead of giving up.
        progress: draw a bar on standard error.

    Raises:
        DataError: a picture cannot be read.
    """
    needed = len(files) * files.size**2 * 3
    if needed > _SHARE_OF_MEMORY * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    # A look at a few headers spares large pictures a decoding in vain.
    step = max(1, len(files) // _PROBES)
    if not any_size and any(_size(path) != (files.size, files.size) for path in files.paths[::step]):
        return None
    pictures = np.empty((len(files), files.size, files.size, 3), dtype=np.uint8)

    def decode(position: int) -> bool:
        picture = _open(files.paths[position])
        if picture.size != (files.size, files.size) and not any_size:
            return False
        pictures[position] = center_crop(picture, files.size, files.crop_share)
        return True

    bar: Any = tqdm(total=len(files), desc="decoding", unit=" images", disable=None if progress else True)
    # Threads: PIL decodes outside the interpreter's lock.
    with bar, ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(files), 1024):
            fits = list(pool.map(decode, range(start, min(start + 1024, len(files)))))
            bar.update(len(fits))
            if not all(fits):
                return None
    return Images(torch.from_numpy(pictures), files.labels, files.indices)
