"""Defines `ImageFiles`, a split that consists of image files.

Workers read the files batch by batch, or `decode_into_memory` reads all files once. `decoding.py` decodes one file;
`sources/` lists the files.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from resnext_ignite.data.images import UNREADABLE, Images
from resnext_ignite.data.reading.cropping import CENTRE, Box, Crop, crop_draws, random_crop, square_crop
from resnext_ignite.data.reading.decoding import has_size, no_warnings, read_crop
from resnext_ignite.data.reading.workers import allocate_batch
from resnext_ignite.data.sources.paths import ImagePaths
from resnext_ignite.runtime.errors import DataError

log = logging.getLogger(__name__)

_MEMORY_FRACTION = 0.4
_PROBES = 64


@dataclass(frozen=True)
class ImageFiles:
    """A split that consists of image files, which are in folders or in tar shards.

    Args:
        paths: N files.
        labels: int64 (N,).
        indices: int64 (N,), the index of each image in its whole split; random numbers depend only on (seed, epoch,
            index).
        size: side of a decoded image in pixels.
        crop_ratio: side of the square crop in evaluation, divided by the shorter side of the image.
        anchor: position of this square, as for `square_crop`.
    """

    paths: ImagePaths
    labels: Tensor
    indices: Tensor
    size: int
    crop_ratio: float = 1.0
    anchor: tuple[float, float] = CENTRE

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> ImageFiles:
        """Return the files at the given positions, int64 (n,); they keep their `indices`."""
        paths = self.paths.take(positions.numpy())
        return replace(self, paths=paths, labels=self.labels[positions], indices=self.indices[positions])

    def contents(self) -> str:
        """Return a string with the number of images and a hash that identifies the files."""
        return f"{len(self)} images, {self.paths.identity()}"

    def load(self, positions: Tensor) -> Tensor:
        """Decode, crop and resize the images at the given positions: int64 (n,) -> uint8 (n, size, size, 3).

        Raises:
            DataError: as `read`.
        """
        return self.read(positions)[0]

    def read(
        self, positions: Tensor, crop_key: tuple[int, int] | None = None, fill: tuple[int, int, int] | None = None
    ) -> tuple[Tensor, dict[int, str]]:
        """Decode, crop and resize the images at the given positions; return the pixels and the unreadable images.

        Args:
            positions: int64 (n,).
            crop_key: (seed, epoch) of the random-resized crops; None: take the square crop at `anchor`.
            fill: colour (uint8 values) that fills an image that cannot be read; None: raise an error instead.

        Returns:
            Pixels uint8 (n, size, size, 3), and a dict for the unreadable images: index into `positions` -> reason.

        Raises:
            DataError: an image cannot be read and `fill` is None (the message names the image); or as `allocate_batch`.
        """
        room = allocate_batch(len(positions), self.size, self.size, 3)
        pictures = room.numpy()
        crops = self.crops(positions, crop_key)
        unreadable: dict[int, str] = {}
        with no_warnings():
            # Read the files in ascending order of position, so that each shard is read from its start to its end.
            for place in positions.argsort().tolist():
                position, crop = int(positions[place]), crops[place]
                try:
                    pictures[place] = read_crop(self.paths[position], self.size, crop, training=crop_key is not None)
                except DataError as error:
                    if fill is None:
                        raise
                    pictures[place], unreadable[place] = fill, str(error)
        return room, unreadable

    def crops(self, positions: Tensor, crop_key: tuple[int, int] | None) -> list[Crop]:
        """Return the crop function of each image at the given positions, int64 (n,); `crop_key` as for `read`."""
        if crop_key is None:
            return [square_crop(self.size, self.crop_ratio, self.anchor)] * len(positions)
        return [random_crop(draws) for draws in crop_draws(*crop_key, self.indices[positions])]


class _OtherSizeError(Exception):
    pass


def decode_into_memory(
    files: ImageFiles,
    *,
    any_size: bool,
    report: bool,
    fill: tuple[int, int, int] | None = None,
    processes: int = 1,
    threads: int | None = None,
) -> Images | None:
    """Decode a whole split once, in parallel; return None if the split does not fit into memory.

    Also return None if an image needs resizing and `any_size` is false.

    Args:
        files: the split.
        any_size: resize images that are not squares of `files.size` pixels, instead of returning None.
        report: show a progress bar on standard error, and log a warning for each image that cannot be read.
        fill: as for `ImageFiles.read`; the label of an unreadable image is UNREADABLE.
        processes: number of processes on this machine that load the same split, each into its own memory.
        threads: number of threads that decode; None: one for each core.

    Raises:
        DataError: an image cannot be read and `fill` is None; the message names it.
    """
    needed = len(files) * files.size**2 * 3
    if processes * needed > _MEMORY_FRACTION * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    pictures = np.empty((len(files), files.size, files.size, 3), dtype=np.uint8)
    unreadable: dict[int, str] = {}

    def crop(width: int, height: int) -> Box:
        if not any_size and (width, height) != (files.size, files.size):
            raise _OtherSizeError
        return square_crop(files.size, files.crop_ratio, files.anchor)(width, height)

    def decode(position: int) -> bool:
        try:
            pictures[position] = read_crop(files.paths[position], files.size, crop)
        except _OtherSizeError:
            return False
        except DataError as error:
            if fill is None:
                raise
            pictures[position], unreadable[position] = fill, str(error)
        return True

    with no_warnings():
        # First check the image sizes in the headers of a few files: images that need resizing are usually found before
        # any image is decoded.
        step = max(1, len(files) // _PROBES)
        probes = range(0, len(files), step)
        if not any_size and not all(has_size(files.paths[position], files.size) for position in probes):
            return None
        bar: Any = tqdm(total=len(files), desc="decoding", unit=" images", disable=None if report else True)
        # Threads are enough: the decoders release the GIL.
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
