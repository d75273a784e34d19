"""What the engines iterate over: batches of normalised images on the device, for training and for evaluation.

Both kinds of split (in memory, as files) give the same batches; which images, in which order, is `sampling.py`'s.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnext_ignite.data.augment import Augment
from resnext_ignite.data.imagefolder import ImageFiles
from resnext_ignite.data.images import Images
from resnext_ignite.data.sampling import TrainOrder, rank_share
from resnext_ignite.errors import DataError

Split = Images | ImageFiles


@dataclass(frozen=True)
class Batch:
    """Images float32 (n, 3, H, W), labels int64 (n,), and the images' indices in their whole split int64 (n,)."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class TrainLoader:
    """Augmented batches of every iteration after `start_iteration`, without end: epochs follow each other unbroken.

    Args:
        split: the training images.
        order: which of them each iteration sees.
        augment: from uint8 pictures to the model's input.
        device: where batches are made.
        workers: processes that decode files.
        random_resized_crop: files: take a keyed random-resized crop instead of the centre.
    """

    def __init__(
        self,
        split: Split,
        order: TrainOrder,
        augment: Augment,
        device: torch.device,
        *,
        workers: int = 0,
        random_resized_crop: bool = False,
    ) -> None:
        self.split, self.order, self.augment, self.device = split, order, augment, device
        self.workers = workers
        self.random_resized_crop = random_resized_crop
        self.start_iteration = 0

    def __len__(self) -> int:
        """Iterations an epoch."""
        return self.order.iterations_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError for a picture that cannot be read."""
        batches = self.order.batches(self.start_iteration)
        if isinstance(self.split, Images):
            padded = self.augment.pad(self.split.pictures)
            for epoch, positions in batches:
                yield self._batch(padded, positions, epoch, positions)
            return
        seed = self.augment.seed if self.random_resized_crop else None
        for pictures, epoch, positions in _decoded(self.split, batches, self.workers, self.device, seed):
            padded = self.augment.pad(pictures.to(self.device, non_blocking=True))
            yield self._batch(padded, torch.arange(len(positions), device=self.device), epoch, positions)

    def _batch(self, padded: Tensor, places: Tensor, epoch: int, positions: Tensor) -> Batch:
        # `places` are the batch's pictures in `padded`, `positions` those in the split.
        indices = self.split.indices[positions].to(self.device, non_blocking=True)
        labels = self.split.labels[positions].to(self.device, non_blocking=True)
        return Batch(self.augment(padded, places, epoch, indices), labels, indices)


class EvalLoader:
    """Every image of this rank's share once, in order; all ranks' shares together are the split.

    Args:
        split: the images.
        augment: gives the normalisation.
        device: where batches are made.
        batch_size: images at once.
        rank, world_size: this rank takes a contiguous run of the split.
        workers: processes that decode files.
    """

    def __init__(
        self,
        split: Split,
        augment: Augment,
        device: torch.device,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        self.split, self.augment, self.device, self.batch_size = split, augment, device, batch_size
        self.share = rank_share(len(split), rank, world_size)
        self.workers = workers

    def __len__(self) -> int:
        """Batches of this rank; one of no images where it has none, since an engine refuses to run on nothing."""
        return max(1, -(-len(self.share) // self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError for a picture that cannot be read."""
        device = self.split.labels.device
        batches = ((0, part) for part in torch.arange(self.share.start, self.share.stop).split(self.batch_size))
        decoded: Iterable[tuple[Tensor, int, Tensor]]
        if isinstance(self.split, Images):
            decoded = ((self.split.load(positions), 0, positions.to(device)) for _, positions in batches)
        else:
            decoded = _decoded(self.split, batches, self.workers, self.device, None)
        for pictures, _, positions in decoded:
            images = self.augment.plain(pictures.to(self.device, non_blocking=True))
            labels, indices = (part[positions].to(self.device) for part in (self.split.labels, self.split.indices))
            yield Batch(images, labels, indices)


class _Decoder(Dataset[Any]):
    """A batch at a time, in a worker process: (epoch, positions) -> (pictures, epoch, positions).

    The key is plain numbers: a tensor would travel to the worker through shared memory, a file descriptor each.
    """

    def __init__(self, files: ImageFiles, crop_seed: int | None) -> None:
        self.files, self.crop_seed = files, crop_seed

    def __getitem__(self, key: tuple[int, list[int]]) -> tuple[Tensor, int, Tensor] | DataError:
        epoch, positions = key[0], torch.tensor(key[1], dtype=torch.int64)
        try:
            if self.crop_seed is None:
                return self.files.load(positions), epoch, positions
            return self.files.load_random_crops(positions, self.crop_seed, epoch), epoch, positions
        except DataError as error:
            # Returned, since an error raised in a worker arrives wrapped in its traceback.
            return error


def _decoded(
    files: ImageFiles,
    batches: Iterable[tuple[int, Tensor]],
    workers: int,
    device: torch.device,
    crop_seed: int | None,
) -> Iterator[tuple[Tensor, int, Tensor]]:
    loader = DataLoader(
        _Decoder(files, crop_seed),
        batch_size=None,
        sampler=((epoch, positions.tolist()) for epoch, positions in batches),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_signals,
        # Its own generator: drawing the workers' seeds from torch's would change that one's state.
        generator=torch.Generator(),
    )
    for item in loader:
        if isinstance(item, DataError):
            raise item
        yield item


def _ignore_signals(worker: int) -> None:
    # A signal to the process group is the main process's to answer: it saves, then ends its workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
