"""What the engines iterate over: batches of normalised images on the device, for training and for evaluation.

Both kinds of split (in memory, as files) give the same batches; which images, in which order, is `sampling.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnext_ignite.data.augment import Augment
from resnext_ignite.data.imagefolder import ImageFiles
from resnext_ignite.data.images import UNREADABLE, Images, whole_color
from resnext_ignite.data.mixing import Mixing, neighbours
from resnext_ignite.data.sampling import TrainOrder, rank_share
from resnext_ignite.data.workers import ignore_signals, share, watched
from resnext_ignite.errors import DataError

log = logging.getLogger(__name__)

Split = Images | ImageFiles


@dataclass(frozen=True)
class Batch:
    """Images float32 (n, 3, H, W), labels int64 (n,), and the images' indices in their whole split int64 (n,).

    The label of a training image that could not be read is UNREADABLE; the image is the mean colour. Of mixed images
    `shares`, float32 (n,), say how much of each is its own; the rest is its neighbour (0 and 1, 2 and 3, ...).
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    shares: Tensor | None = None


class TrainLoader:
    """Augmented batches of every iteration after `start_iteration`, without end: epochs follow each other unbroken.

    Args:
        split: the training images.
        order: which of them each iteration sees.
        augment: from uint8 pictures to the model's input.
        device: where batches are made.
        mixing: what mixes the augmented images; None: nothing.
        workers: processes that decode files.
        random_resized_crop: files: take a keyed random-resized crop instead of the centre.
        skip_unreadable: files: mark a picture that cannot be read, and warn of it once a rank, instead of raising.
    """

    def __init__(
        self,
        split: Split,
        order: TrainOrder,
        augment: Augment,
        device: torch.device,
        *,
        mixing: Mixing | None = None,
        workers: int = 0,
        random_resized_crop: bool = False,
        skip_unreadable: bool = False,
    ) -> None:
        self.split, self.order, self.augment, self.device, self.mixing = split, order, augment, device, mixing
        self.workers = workers
        self.random_resized_crop, self.skip_unreadable = random_resized_crop, skip_unreadable
        self._warned: set[int] = set()
        self.start_iteration = 0

    def __len__(self) -> int:
        """Iterations an epoch."""
        return self.order.iterations_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError for a picture that cannot be read (unless it is skipped) and for a dead worker."""
        batches = self.order.batches(self.start_iteration)
        if isinstance(self.split, Images):
            padded = self.augment.pad(self.split.pictures)
            for epoch, positions in batches:
                yield self._batch(padded, positions, epoch, positions)
            return
        seed = self.augment.seed if self.random_resized_crop else None
        fill = whole_color(self.augment.mean) if self.skip_unreadable else None
        # TrivialAugment is work for many processes. What comes before it goes along: mirrored only afterwards, a
        # picture would be sheared about its right edge, which is never done to one that was not.
        in_workers = self.augment if self.augment.trivial else None
        decoder = _Decoder(self.split, seed, fill, in_workers)
        for pictures, epoch, positions, unreadable in _decoded(decoder, batches, self.workers, self.device):
            self._warn({int(positions[place]): reason for place, reason in unreadable.items()})
            pictures = pictures.to(self.device, non_blocking=True)
            if in_workers is None:
                padded, places = self.augment.pad(pictures), torch.arange(len(positions), device=self.device)
                yield self._batch(padded, places, epoch, positions, list(unreadable))
            else:
                yield self._batch(pictures, None, epoch, positions, list(unreadable))

    def _warn(self, reasons: dict[int, str]) -> None:
        for position in sorted(set(reasons) - self._warned):
            log.warning("skipped: %s", reasons[position])
        self._warned.update(reasons)

    def _batch(
        self, padded: Tensor, places: Tensor | None, epoch: int, positions: Tensor, unreadable: Sequence[int] = ()
    ) -> Batch:
        # `places` are the batch's pictures in `padded` (None: `Augment.on_pictures` made these), `positions` those in
        # the split.
        indices = self.split.indices[positions].to(self.device, non_blocking=True)
        labels = self.split.labels[positions]
        if unreadable:
            labels[list(unreadable)] = UNREADABLE
        labels = labels.to(self.device, non_blocking=True)
        if places is not None:
            padded = self.augment.on_pictures(padded, places, epoch, indices)
        images, shares = self.augment.on_images(padded, epoch, indices), None
        if self.mixing is not None:
            bad = labels == UNREADABLE
            images, shares = self.mixing(images, epoch, indices, bad | neighbours(bad))
        return Batch(images, labels, indices, shares)


class EvalLoader:
    """Every image of this rank's share once, in order; all ranks' shares together are the split.

    Args:
        split: the images.
        augment: gives the normalisation.
        device: where batches are made.
        batch_size: images at once.
        rank, world_size: this rank takes a contiguous run of the split.
        workers: processes that decode files.

    `common_batches` is the number of batches that every rank has.

    Raises:
        DataError: pictures of the split are marked UNREADABLE; an evaluation leaves none out.
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
        unreadable = int((split.labels == UNREADABLE).sum())
        if unreadable:
            raise DataError(
                f"{unreadable} of {len(split)} pictures cannot be read, and an evaluation skips none; "
                "data.on_error=fail names the first"
            )
        self.split, self.augment, self.device, self.batch_size = split, augment, device, batch_size
        self.share = rank_share(len(split), rank, world_size)
        self.common_batches = -(-(len(split) // world_size) // batch_size)
        self.workers = workers

    def __len__(self) -> int:
        """Batches of this rank; one of no images where it has none, since an engine refuses to run on nothing."""
        return max(1, -(-len(self.share) // self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError for a picture that cannot be read, and for a dead worker."""
        device = self.split.labels.device
        batches = ((0, part) for part in torch.arange(self.share.start, self.share.stop).split(self.batch_size))
        decoded: Iterable[Decoded]
        if isinstance(self.split, Images):
            decoded = ((self.split.load(positions), 0, positions.to(device), {}) for _, positions in batches)
        else:
            decoded = _decoded(_Decoder(self.split), batches, self.workers, self.device)
        for pictures, _, positions, _ in decoded:
            images = self.augment.plain(pictures.to(self.device, non_blocking=True))
            labels, indices = (part[positions].to(self.device) for part in (self.split.labels, self.split.indices))
            yield Batch(images, labels, indices)


class CropsLoader:
    """Batches of an evaluation in which each image is several crops of itself: float32 (n, crops, 3, H, W).

    Args:
        loaders: one a crop, of the same images in the same order.
    """

    def __init__(self, loaders: Sequence[EvalLoader]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[Batch]:
        """Raises as EvalLoader's."""
        for batches in zip(*self.loaders, strict=True):
            yield replace(batches[0], images=torch.stack([batch.images for batch in batches], dim=1))


class PictureLoader:
    """Pictures that are not a data set, as an evaluation sees them: images, positions, and why some are unreadable.

    It yields float32 (n, 3, H, W), int64 (n,), and a reason for each position of a picture that could not be read, in
    whose place stands the mean colour.

    Args:
        files: their labels are not looked at.
        augment: gives the normalisation.
        device: where batches are made.
        batch_size: images at once.
        workers: processes that decode.
    """

    def __init__(
        self, files: ImageFiles, augment: Augment, device: torch.device, *, batch_size: int, workers: int = 0
    ) -> None:
        self.files, self.augment, self.device = files, augment, device
        self.batch_size, self.workers = batch_size, workers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[int, str]]]:
        """Raises DataError for a dead worker."""
        decoder = _Decoder(self.files, fill=whole_color(self.augment.mean))
        batches = ((0, part) for part in torch.arange(len(self.files)).split(self.batch_size))
        for pictures, _, positions, unreadable in _decoded(decoder, batches, self.workers, self.device):
            images = self.augment.plain(pictures.to(self.device, non_blocking=True))
            yield images, positions, {int(positions[place]): reason for place, reason in unreadable.items()}


# Pictures uint8 (n, size, size, 3), epoch, positions int64 (n,), and by place in the batch why some are unreadable.
Decoded = tuple[Tensor, int, Tensor, dict[int, str]]


class _Decoder(Dataset[Any]):
    """A batch at a time, in a worker process: (epoch, positions) -> (pictures, epoch, positions, unreadable).

    Positions are plain numbers: each tensor travels through shared memory, a file descriptor each.

    Args:
        files: the split.
        crop_seed: key of random-resized crops; None: the centre.
        fill: as for `ImageFiles.read`.
        augment: what makes other pictures of them (`Augment.on_pictures`); None: they are given as they are.
    """

    def __init__(
        self,
        files: ImageFiles,
        crop_seed: int | None = None,
        fill: tuple[int, int, int] | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.files, self.crop_seed, self.fill, self.augment = files, crop_seed, fill, augment

    def __getitem__(self, key: tuple[int, list[int]]) -> tuple[Tensor, int, list[int], dict[int, str]] | DataError:
        epoch, positions = key
        crop_key = None if self.crop_seed is None else (self.crop_seed, epoch)
        places = torch.tensor(positions, dtype=torch.int64)
        try:
            pictures, unreadable = self.files.read(places, crop_key, self.fill)
            if self.augment is not None:
                padded, every = self.augment.pad(pictures), torch.arange(len(pictures))
                pictures = self.augment.on_pictures(padded, every, epoch, self.files.indices[places])
            return share(pictures), epoch, positions, unreadable
        except DataError as error:
            # Returned, since an error raised in a worker arrives wrapped in its traceback.
            return error


def _decoded(
    decoder: _Decoder, batches: Iterable[tuple[int, Tensor]], workers: int, device: torch.device
) -> Iterator[Decoded]:
    loader = DataLoader(
        decoder,
        batch_size=None,
        sampler=((epoch, positions.tolist()) for epoch, positions in batches),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        # Its own generator: drawing the workers' seeds from torch's would change that one's state.
        generator=torch.Generator(),
    )
    for pictures, epoch, positions, unreadable in watched(loader):
        yield pictures, epoch, torch.tensor(positions, dtype=torch.int64), unreadable
