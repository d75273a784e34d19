"""Pictures in files, read in the workers or once into memory. How one is, is `decoding.py`'s; which, `index.py`'s."""

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
from resnext_ignite.data.reading.workers import shared_room
from resnext_ignite.data.sources.paths import ImagePaths
from resnext_ignite.runtime.errors import DataError

log = logging.getLogger(__name__)

_MEMORY_FRACTION = 0.4
_PROBES = 64


@dataclass(frozen=True)
class ImageFiles:
    """A split as files, by themselves or in shards.

    Args:
        paths: N files.
        labels: int64 (N,).
        indices: int64 (N,), each picture's index in its whole split: the key of all that is random about it.
        size: side of a decoded picture in pixels.
        crop_ratio: side of the square that is kept, over the shorter side.
        anchor: where that lies, as for `square_crop`.
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
        """The files at some positions (int64), keeping their indices."""
        paths = self.paths.take(positions.numpy())
        return replace(self, paths=paths, labels=self.labels[positions], indices=self.indices[positions])

    def contents(self) -> str:
        """How many pictures, and what tells them from others."""
        return f"{len(self)} images, {self.paths.identity()}"

    def load(self, positions: Tensor) -> Tensor:
        """Decode, crop and resize: int64 (n,) -> uint8 (n, size, size, 3); raises as `read`."""
        return self.read(positions)[0]

    def read(
        self, positions: Tensor, crop_key: tuple[int, int] | None = None, fill: tuple[int, int, int] | None = None
    ) -> tuple[Tensor, dict[int, str]]:
        """Decode some pictures: int64 (n,) -> uint8 (n, size, size, 3), and why some could not be read.

        Args:
            crop_key: (seed, epoch): take each picture's keyed random-resized crop; None: the square at `anchor`.
            fill: the colour that stands for a picture that cannot be read, whose place among `positions` is then
                returned with the reason; None: such a picture is an error.

        Raises:
            DataError: a picture cannot be read and there is no `fill`, and the line names it; or there is no room.
        """
        room = shared_room(len(positions), self.size, self.size, 3)
        pictures = room.numpy()
        crops = self.crops(positions, crop_key)
        unreadable: dict[int, str] = {}
        with no_warnings():
            # As they lie: of a shard, one pass over its bytes.
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
        """What is kept of each picture at some positions (int64); `crop_key` as for `read`."""
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
        # A look at a few headers spares large pictures a decoding in vain.
        step = max(1, len(files) // _PROBES)
        probes = range(0, len(files), step)
        if not any_size and not all(has_size(files.paths[position], files.size) for position in probes):
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
