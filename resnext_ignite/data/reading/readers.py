"""Files to pictures in worker processes, a batch at a time, in the order in which they are asked for."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.augment.progressive import GrowingSize
from resnext_ignite.data.reading.image_files import ImageFiles
from resnext_ignite.data.reading.workers import ignore_signals, watched
from resnext_ignite.runtime.errors import DataError

# Pictures uint8 (n, size, size, 3), epoch, positions int64 (n,), and by place in the batch why some are unreadable.
Decoded = tuple[Tensor, int, Tensor, dict[int, str]]


class ImageReader(Dataset[Any]):
    """A batch at a time, in a worker process: (epoch, positions, ahead) -> (pictures, epoch, positions, unreadable).

    Positions are plain numbers: each tensor travels through shared memory, a file descriptor each. `ahead` are groups
    of files that later batches will ask for.

    Args:
        files: the split.
        crop_seed: key of random-resized crops; None: the centre.
        fill: as for `ImageFiles.read`.
        sizes: of the pictures in each epoch; None: that of the split's.
        augment: what makes other pictures of them (`Augment.on_pixels`); None: they are given as they are.
    """

    def __init__(
        self,
        files: ImageFiles,
        crop_seed: int | None = None,
        fill: tuple[int, int, int] | None = None,
        sizes: GrowingSize | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.files, self.crop_seed, self.fill, self.sizes, self.augment = files, crop_seed, fill, sizes, augment

    def __getitem__(
        self, key: tuple[int, list[int], list[int]]
    ) -> tuple[Tensor, int, list[int], dict[int, str]] | DataError:
        epoch, positions, ahead = key
        self.files.paths.read_ahead(ahead)
        crop_key = None if self.crop_seed is None else (self.crop_seed, epoch)
        files = self.files if self.sizes is None else replace(self.files, size=self.sizes.at(epoch))
        places = torch.tensor(positions, dtype=torch.int64)
        try:
            pictures, unreadable = files.read(places, crop_key, self.fill)
        except DataError as error:
            # Returned, since an error raised in a worker arrives wrapped in its traceback.
            return error
        if self.augment is not None:
            # Back into the memory that the main process reads.
            pictures.copy_(self.augment.on_pixels(self.augment.pad(pictures), None, epoch, files.indices[places]))
        return pictures, epoch, positions, unreadable


def decoded(
    reader: Dataset[Any],
    batches: Iterable[tuple[int, Tensor]],
    workers: int,
    device: torch.device,
    ahead: Iterable[list[int]] | None = None,
) -> Generator[tuple[Any, int, Tensor, dict[int, str]], None, None]:
    """What a reader makes of (epoch, positions int64 (n,)), in as many workers; for a GPU in pinned memory.

    Args:
        ahead: beside each batch, groups of files that later ones will ask for; None: not told.

    Raises:
        DataError: the reader gave one, or a worker is dead.
    """
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=(
            (epoch, positions.tolist(), soon)
            for (epoch, positions), soon in zip(batches, ahead or repeat([]), strict=False)
        ),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        # Its own generator: drawing the workers' seeds from torch's would change that one's state.
        generator=torch.Generator(),
    )
    for pictures, epoch, positions, unreadable in watched(loader):
        yield pictures, epoch, torch.tensor(positions, dtype=torch.int64), unreadable
