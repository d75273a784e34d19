"""What the engines iterate over: batches of normalised images on the device, for training and for evaluation.

Both kinds of split (in memory, as files) give the same batches; which images, in which order, is `sampling.py`'s.
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
    """Images float32 (n, 3, H, W), labels int64 (n,), and the images' indices in their whole split int64 (n,).

    The label of a training image that could not be read is UNREADABLE; the image is made of the mean colour. Of mixed
    images `lambdas`, float32 (n,), say how much of each is its own; the rest is its neighbour (0 and 1, 2 and 3, ...).
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    lambdas: Tensor | None = None


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
        sizes: of the images in each epoch; None: that of the split's pictures. Where files are cropped at random, the
            crop is decoded to that size, and cutout scaled with it; else the augmented image is resized.
        skip_unreadable: files: mark a picture that cannot be read, and warn of it once a rank, instead of raising.
        decode_on: files: the workers read JPEGs, and this device decodes their random-resized crops; None: they do.
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
        """Iterations an epoch."""
        return self.order.iterations_per_epoch

    def __iter__(self) -> Generator[Batch, None, None]:
        """Raises DataError for a picture that cannot be read (unless it is skipped) and for a dead worker."""
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
        # TrivialAugment is work for many processes. What comes before it goes along: mirrored only afterwards, a
        # picture would be sheared about its right edge, which is never done to one that was not.
        return not isinstance(self.split, Images) and self.augment.trivial and self.decode_on is None

    def _decoded(self, files: ImageFiles, batches: Iterable[tuple[int, Tensor]]) -> Iterator[Decoded]:
        seed, fill = self.augment.seed, color_to_uint8(self.augment.mean) if self.skip_unreadable else None
        ahead = self.order.announcements(self.start_iteration)
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
        # `positions` are the batch's pictures in the split, `chosen` those in `padded`.
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
            # Files may have been decoded to a smaller size already.
            side = padded.shape[1] - (0 if by_workers else 2 * augment.crop_padding)
            augment = replace(augment, cutout=round(augment.cutout * side / self.sizes.full))
        images = augment.on_images(padded, epoch, indices) if by_workers else augment(padded, chosen, epoch, indices)
        return images if self.sizes is None else augment.resized(images, self.sizes.at(epoch))


class EvalLoader:
    """Every image of this rank's share once, in order; all ranks' lambdas together are the split.

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
        self.share = rank_slice(len(split), rank, world_size)
        self.common_batches = -(-(len(split) // world_size) // batch_size)
        self.workers = workers

    def __len__(self) -> int:
        """Batches of this rank; one of no images where it has none, since an engine refuses to run on nothing."""
        return max(1, -(-len(self.share) // self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError for a picture that cannot be read, and for a dead worker."""
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


class ImageLoader:
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
        reader = ImageReader(self.files, fill=color_to_uint8(self.augment.mean))
        batches = ((0, part) for part in torch.arange(len(self.files)).split(self.batch_size))
        for pictures, _, positions, unreadable in decoded(reader, batches, self.workers, self.device):
            images = self.augment.plain(pictures.to(self.device, non_blocking=True))
            yield images, positions, {int(positions[place]): reason for place, reason in unreadable.items()}
