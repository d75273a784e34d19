"""Decodes image files in worker processes, one batch at a time, in the requested order."""

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
from resnext_ignite.data.reading.workers import ignore_signals, supervised
from resnext_ignite.runtime.errors import DataError

# Pixels uint8 (n, size, size, 3), epoch, positions int64 (n,), and a dict for the unreadable images: index in the batch
# -> reason.
Decoded = tuple[Tensor, int, Tensor, dict[int, str]]


class ImageReader(Dataset[Any]):
    """Decodes one batch in a worker process: (epoch, positions, ahead) -> (pixels, epoch, positions, unreadable).

    Positions are a list of integers, because each tensor in shared memory needs a file descriptor. `ahead` lists groups
    of files (see `TrainOrder`) that later batches need.

    Args:
        files: the split.
        crop_seed: random seed of the random-resized crops; None: take the square crop at `files.anchor`.
        fill: as for `ImageFiles.read`.
        sizes: side of the images in each epoch; None: the size of the split.
        augment: its `pad` and `on_pixels` change the decoded images; None: return them unchanged.
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
            # Return the error: if the worker raised it, its message would contain the worker's traceback.
            return error
        if self.augment is not None:
            # Copy the result into the shared memory that the main process reads.
            pictures.copy_(self.augment.on_pixels(self.augment.pad(pictures), None, epoch, files.indices[places]))
        return pictures, epoch, positions, unreadable


def decoded(
    reader: Dataset[Any],
    batches: Iterable[tuple[int, Tensor]],
    workers: int,
    device: torch.device,
    ahead: Iterable[list[int]] | None = None,
) -> Generator[tuple[Any, int, Tensor, dict[int, str]], None, None]:
    """Yield the reader's result for each batch, in order; in pinned memory if `device` is a GPU.

    Args:
        reader: an `ImageReader` or `JpegReader`.
        batches: (epoch, positions int64 (n,)) of each batch.
        workers: number of worker processes; 0: read in this process.
        device: where the batches are used.
        ahead: for each batch, groups of files that later batches need; None: no read-ahead.

    Raises:
        DataError: the reader returned one, or a worker is dead.
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
        # The loader uses this generator to seed its workers. Without it, the loader would use torch's default generator
        # and change its state.
        generator=torch.Generator(),
    )
    for pictures, epoch, positions, unreadable in supervised(loader):
        yield pictures, epoch, torch.tensor(positions, dtype=torch.int64), unreadable
