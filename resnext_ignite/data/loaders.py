"""Defines the loaders. They give the engines batches of normalised images on the device.

The batches do not depend on whether a split is in memory or in files. `sampling.py` defines the order of the images.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.augment.mixing import Mixing, neighbours
from resnext_ignite.data.augment.progressive import GrowingSize
from resnext_ignite.data.images import UNREADABLE, Images, color_to_uint8
from resnext_ignite.data.reading.device_decoding import DeviceDecoding, JpegDecoder, JpegReader
from resnext_ignite.data.reading.image_files import ImageFiles
from resnext_ignite.data.reading.readers import Decoded, ImageReader, decoded
from resnext_ignite.data.sampling import TrainOrder, rank_slice
from resnext_ignite.runtime.errors import DataError

log = logging.getLogger(__name__)

Split = Images | ImageFiles


@dataclass(frozen=True)
class Batch:
    """Images float32 (n, 3, H, W), labels int64 (n,), and the index of each image in its whole split, int64 (n,).

    A training image that could not be read has the label UNREADABLE, and all its pixels have the mean colour.

    If the images are mixed, `lambdas` is float32 (n,): entry i is the fraction (0 to 1) of mixed image i that comes
    from the original image i. The rest comes from the neighbour of image i (images 0 and 1, 2 and 3, ... are
    neighbours). If the images are not mixed, `lambdas` is None.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    lambdas: Tensor | None = None


class TrainLoader:
    """Yields augmented batches in an endless sequence of epochs.

    The attribute `start_iteration` is the number of batches to skip at the start of the sequence.

    Args:
        split: the training images.
        order: selects the images of each iteration.
        augment: turns uint8 images into the model's input.
        device: the device of the batches.
        mixing: mixes the augmented images; None: no mixing.
        workers: number of processes that decode files.
        random_resized_crop: for files: take a random-resized crop instead of the central square.
        sizes: side of the images in each epoch; None: the size of the split. Random-resized crops are resized to this
            side before the augmentation, and the side of the cutout square is scaled in proportion. Without
            random-resized crops, images are augmented at the size of the split, and then resized to this side.
        skip_unreadable: for files: give an image that cannot be read the label UNREADABLE and log a warning (once per
            image and rank), instead of raising an error.
        decode_on: for files: the device that decodes JPEG files and takes random-resized crops of them, after the
            workers have read the bytes; None: the workers decode and crop.
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
        sizes: GrowingSize | None = None,
        skip_unreadable: bool = False,
        decode_on: torch.device | None = None,
    ) -> None:
        self.split, self.order, self.augment, self.device, self.mixing = split, order, augment, device, mixing
        self.workers = workers
        self.random_resized_crop, self.sizes, self.skip_unreadable = random_resized_crop, sizes, skip_unreadable
        self.decode_on = decode_on
        self._warned: set[int] = set()
        self.start_iteration = 0

    def __len__(self) -> int:
        """Return the number of iterations per epoch."""
        return self.order.iterations_per_epoch

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yield the batches.

        Raises:
            DataError: an image cannot be read and is not skipped, or a worker is dead.
        """
        batches = self.order.batches(self.start_iteration)
        if isinstance(self.split, Images):
            padded = self.augment.pad(self.split.pixels)
            for epoch, positions in batches:
                yield self._batch(padded, epoch, positions, chosen=positions)
            return
        by_workers = self._by_workers
        for pictures, epoch, positions, unreadable in self._decoded(self.split, batches):
            self._warn({int(positions[place]): reason for place, reason in unreadable.items()})
            pictures = pictures.to(self.device, non_blocking=True)
            padded = pictures if by_workers else self.augment.pad(pictures)
            yield self._batch(padded, epoch, positions, unreadable=list(unreadable))

    @property
    def _by_workers(self) -> bool:
        # TrivialAugment is slow, so the workers apply it. The crop and the flip come before TrivialAugment, so the
        # workers must apply them too. The flip cannot come last: TrivialAugment shears about the upper left corner, and
        # a later flip would move this fixed corner to the upper right.
        return not isinstance(self.split, Images) and self.augment.trivial and self.decode_on is None

    def _decoded(self, files: ImageFiles, batches: Iterable[tuple[int, Tensor]]) -> Iterator[Decoded]:
        seed, fill = self.augment.seed, color_to_uint8(self.augment.mean) if self.skip_unreadable else None
        ahead = self.order.groups_ahead(self.start_iteration)
        if self.decode_on is not None:
            reader = JpegReader(files, seed, fill, self.sizes)
            read = decoded(reader, batches, self.workers, self.device, ahead)
            return DeviceDecoding(reader, JpegDecoder(self.decode_on)).finished(read)
        seeded, sizes = (seed, self.sizes) if self.random_resized_crop else (None, None)
        augment = self.augment if self._by_workers else None
        return decoded(ImageReader(files, seeded, fill, sizes, augment), batches, self.workers, self.device, ahead)

    def _warn(self, reasons: dict[int, str]) -> None:
        for position in sorted(set(reasons) - self._warned):
            log.warning("skipped: %s", reasons[position])
        self._warned.update(reasons)

    def _batch(
        self,
        padded: Tensor,
        epoch: int,
        positions: Tensor,
        *,
        chosen: Tensor | None = None,
        unreadable: Sequence[int] = (),
    ) -> Batch:
        # `positions` are positions in the split; `chosen` are positions in `padded` (None: all of it, in order).
        indices = self.split.indices[positions].to(self.device, non_blocking=True)
        labels = self.split.labels[positions]
        if unreadable:
            labels[list(unreadable)] = UNREADABLE
        labels = labels.to(self.device, non_blocking=True)
        images, lambdas = self._augmented(padded, chosen, epoch, indices), None
        if self.mixing is not None:
            bad = labels == UNREADABLE
            images, lambdas = self.mixing(images, epoch, indices, bad | neighbours(bad))
        return Batch(images, labels, indices, lambdas)

    def _augmented(self, padded: Tensor, chosen: Tensor | None, epoch: int, indices: Tensor) -> Tensor:
        augment, by_workers = self.augment, self._by_workers
        if self.sizes is not None:
            # `cutout` is given for the full size, but files may already be decoded at the smaller size of this epoch.
            side = padded.shape[1] - (0 if by_workers else 2 * augment.crop_padding)
            augment = replace(augment, cutout=round(augment.cutout * side / self.sizes.full))
        images = augment.on_images(padded, epoch, indices) if by_workers else augment(padded, chosen, epoch, indices)
        return images if self.sizes is None else augment.resized(images, self.sizes.at(epoch))


class EvalLoader:
    """Yields this rank's slice of a split in batches, each image once, in order.

    The slices of all ranks together are the whole split. `common_batches` is the number of batches that every rank has;
    some ranks may have one more.

    Args:
        split: the images.
        augment: normalises the images; nothing else is applied.
        device: the device of the batches.
        batch_size: images per batch.
        rank, world_size: this rank takes a contiguous slice of the split.
        workers: number of processes that decode files.

    Raises:
        DataError: images of the split have the label UNREADABLE; an evaluation must count every image.
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
                f"{unreadable} of {len(split)} images cannot be read, and an evaluation must not skip any; "
                "set data.on_error=fail to see the first"
            )
        self.split, self.augment, self.device, self.batch_size = split, augment, device, batch_size
        self.share = rank_slice(len(split), rank, world_size)
        self.common_batches = -(-(len(split) // world_size) // batch_size)
        self.workers = workers

    def __len__(self) -> int:
        """Return the number of batches of this rank, at least 1.

        A rank without images has one empty batch, because an Ignite engine does not run without data.
        """
        return max(1, -(-len(self.share) // self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            DataError: an image cannot be read, or a worker is dead.
        """
        device = self.split.labels.device
        batches = ((0, part) for part in torch.arange(self.share.start, self.share.stop).split(self.batch_size))
        found: Iterable[Decoded]
        if isinstance(self.split, Images):
            found = ((self.split.load(positions), 0, positions.to(device), {}) for _, positions in batches)
        else:
            found = decoded(ImageReader(self.split), batches, self.workers, self.device)
        for pictures, _, positions, _ in found:
            images = self.augment.plain(pictures.to(self.device, non_blocking=True))
            labels, indices = (part[positions].to(self.device) for part in (self.split.labels, self.split.indices))
            yield Batch(images, labels, indices)


class CropsLoader:
    """Yields batches with several crops of each image, for an evaluation: `images` is float32 (n, crops, 3, H, W).

    Args:
        loaders: one loader for each crop; all loaders yield the same images in the same order.
    """

    def __init__(self, loaders: Sequence[EvalLoader]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            DataError: as `EvalLoader.__iter__`.
        """
        for batches in zip(*self.loaders, strict=True):
            yield replace(batches[0], images=torch.stack([batch.images for batch in batches], dim=1))


class ImageLoader:
    """Yields batches of image files that belong to no data set, preprocessed as in an evaluation.

    Each item has three parts: images float32 (n, 3, H, W), their positions in `files` int64 (n,), and a dict for the
    unreadable images: position in `files` -> reason. All pixels of an unreadable image have the mean colour.

    Args:
        files: the images; their labels are not used.
        augment: normalises the images; nothing else is applied.
        device: the device of the batches.
        batch_size: images per batch.
        workers: number of processes that decode.
    """

    def __init__(
        self, files: ImageFiles, augment: Augment, device: torch.device, *, batch_size: int, workers: int = 0
    ) -> None:
        self.files, self.augment, self.device = files, augment, device
        self.batch_size, self.workers = batch_size, workers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[int, str]]]:
        """Yield the batches.

        Raises:
            DataError: a worker is dead.
        """
        reader = ImageReader(self.files, fill=color_to_uint8(self.augment.mean))
        batches = ((0, part) for part in torch.arange(len(self.files)).split(self.batch_size))
        for pictures, _, positions, unreadable in decoded(reader, batches, self.workers, self.device):
            images = self.augment.plain(pictures.to(self.device, non_blocking=True))
            yield images, positions, {int(positions[place]): reason for place, reason in unreadable.items()}
