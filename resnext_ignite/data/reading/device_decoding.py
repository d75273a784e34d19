"""Decodes JPEG files on a device: workers read the files; the main process decodes, crops and resizes on the device.

The workers decode the files that `read_undecoded` does not accept. If the device refuses a file, the main process
decodes it on the CPU.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from resnext_ignite.data.augment.progressive import GrowingSize
from resnext_ignite.data.reading.cropping import Box
from resnext_ignite.data.reading.decoding import UndecodedJpeg, no_warnings, read_undecoded
from resnext_ignite.data.reading.image_files import ImageFiles
from resnext_ignite.data.reading.workers import allocate_batch
from resnext_ignite.runtime.errors import DataError

log = logging.getLogger(__name__)

# Maximum number of pixels that are decoded in one call. They take 200 MB of the device's memory.
_PIXELS_AT_ONCE = 2**26
_NO_BOX: Box = (0.0, 0.0, 0.0, 0.0)


class Part(NamedTuple):
    """Describes one image in the byte tensor of a batch: a JPEG file to decode and crop, or pixels (size, size, 3).

    `length` is in bytes. `width` and `height` of a JPEG file are in pixels; for decoded pixels, both are 0.
    """

    length: int
    width: int = 0
    height: int = 0
    box: Box = _NO_BOX

    @property
    def is_jpeg(self) -> bool:
        return self.width > 0


class JpegReader(Dataset[Any]):
    """Reads the files of one batch in a worker process. Decodes only the files that `read_undecoded` does not accept.

    (epoch, positions, ahead) -> ((bytes, parts), epoch, positions, unreadable), as for `ImageReader`.

    One tensor uint8 (bytes,) holds the batch, because each tensor in shared memory needs a file descriptor.

    Args:
        files: the split.
        crop_seed: random seed of the random-resized crops.
        fill: as for `ImageFiles.read`.
        sizes: side of the images in each epoch; None: the size of the split.
    """

    def __init__(
        self,
        files: ImageFiles,
        crop_seed: int,
        fill: tuple[int, int, int] | None = None,
        sizes: GrowingSize | None = None,
    ) -> None:
        self.files, self.crop_seed, self.fill, self.sizes = files, crop_seed, fill, sizes

    def files_of(self, epoch: int) -> ImageFiles:
        """Return the split with the image size of an epoch (from 1)."""
        return self.files if self.sizes is None else replace(self.files, size=self.sizes.at(epoch))

    def __getitem__(
        self, key: tuple[int, list[int], list[int]]
    ) -> tuple[tuple[Tensor, list[Part]], int, list[int], dict[int, str]] | DataError:
        epoch, positions, ahead = key
        self.files.paths.read_ahead(ahead)
        try:
            content, parts, unreadable = self._read(torch.tensor(positions, dtype=torch.int64), epoch)
            return (content, parts), epoch, positions, unreadable
        except DataError as error:
            # Return the error: if the worker raised it, its message would contain the worker's traceback.
            return error

    def _read(self, positions: Tensor, epoch: int) -> tuple[Tensor, list[Part], dict[int, str]]:
        files, key = self.files_of(epoch), (self.crop_seed, epoch)
        crops = files.crops(positions, key)
        jpegs: list[UndecodedJpeg | None] = [None] * len(positions)
        with no_warnings():
            # Read the files in ascending order of position, so that each shard is read from its start to its end.
            for place in positions.argsort().tolist():
                jpegs[place] = read_undecoded(files.paths[int(positions[place])], files.size, crops[place])
        others = [place for place, jpeg in enumerate(jpegs) if jpeg is None]
        pixels, reasons = files.read(positions[others], key, self.fill)
        decoded = iter(pixels.numpy())
        contents = bytearray()
        parts = []
        for jpeg in jpegs:
            content = next(decoded).tobytes() if jpeg is None else jpeg.content
            size_and_box = () if jpeg is None else (jpeg.width, jpeg.height, jpeg.box)
            contents += content
            parts.append(Part(len(content), *size_and_box))
        unreadable = {others[place]: reason for place, reason in reasons.items()}
        return allocate_batch(len(contents)).copy_(torch.frombuffer(contents, dtype=torch.uint8)), parts, unreadable


class JpegDecoder:
    """Decodes JPEG files: with libjpeg-turbo on a CPU, with nvJPEG on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def decode(self, contents: Sequence[Tensor]) -> list[Tensor | None]:
        """Decode files uint8 (bytes,) to RGB uint8 (3, H, W) on the device.

        The result is None for each file that the decoder refuses.
        """
        if self.device.type == "cuda":
            # nvJPEG uses its own stream, which does not wait for other streams. Synchronize first: pending kernels of
            # the current stream may still use the memory into which nvJPEG decodes.
            torch.cuda.current_stream(self.device).synchronize()
        try:
            return list(decode_jpeg(list(contents), ImageReadMode.RGB, self.device))
        except RuntimeError:
            # One refused file makes the call fail for the whole list: decode the files one by one.
            return [None] if len(contents) == 1 else [self.decode([content])[0] for content in contents]


class DeviceDecoding:
    """Decodes the batches of a `JpegReader` on a device.

    Args:
        reader: the reader of the batches. If the device refuses a file, the main process decodes it on the CPU, with
            `ImageFiles.read` of `reader.files`.
        decoder: decodes the JPEG files. The images are also cropped and resized on its device.
    """

    def __init__(self, reader: JpegReader, decoder: JpegDecoder) -> None:
        self.reader, self.decoder = reader, decoder
        # Use a separate stream, so that synchronizing it does not wait for the network's kernels.
        self.stream = torch.cuda.Stream(decoder.device) if decoder.device.type == "cuda" else None
        self._warned = False

    def finished(
        self, batches: Generator[tuple[tuple[Tensor, list[Part]], int, Tensor, dict[int, str]], None, None]
    ) -> Iterator[tuple[Tensor, int, Tensor, dict[int, str]]]:
        """Yield each batch with decoded images uint8 (n, size, size, 3) instead of files; close `batches` at the end.

        Raises:
            DataError: the device refuses a file, the CPU cannot decode it either, and the reader's `fill` is None; the
                message names the file.
        """
        # Close `batches` after an error too: otherwise its workers run as long as the error's traceback exists.
        with contextlib.closing(batches):
            for (content, parts), epoch, positions, unreadable in batches:
                with torch.cuda.stream(self.stream):
                    pictures, reasons = self._pictures(content, parts, epoch, positions)
                if self.stream is not None:
                    network = torch.cuda.current_stream(self.decoder.device)
                    network.wait_stream(self.stream)
                    # Without this call, the memory of `pictures` could be reused while the network still reads it.
                    pictures.record_stream(network)
                yield pictures, epoch, positions, unreadable | reasons

    def _pictures(
        self, content: Tensor, parts: list[Part], epoch: int, positions: Tensor
    ) -> tuple[Tensor, dict[int, str]]:
        size, device = self.reader.files_of(epoch).size, self.decoder.device
        pictures = torch.empty((len(parts), size, size, 3), dtype=torch.uint8, device=device)
        pieces = content.split([part.length for part in parts])
        reasons: dict[int, str] = {}
        for places in _group_by_pixels(parts):
            decoded = self.decoder.decode([pieces[place] for place in places])
            for place, picture in zip(places, decoded, strict=True):
                part = parts[place]
                if picture is not None and picture.shape == (3, part.height, part.width):
                    left, top, right, bottom = map(int, part.box)
                    kept = functional.resize(picture[:, top:bottom, left:right], [size, size], antialias=True)
                    pictures[place] = kept.permute(1, 2, 0)
                else:
                    pixels, why = self._decode_refused(positions[place : place + 1], epoch)
                    pictures[place] = pixels.to(device)
                    if why is not None:
                        reasons[place] = why
        for place, part in enumerate(parts):
            if not part.is_jpeg:
                pictures[place] = pieces[place].view(size, size, 3).to(device, non_blocking=True)
        return pictures, reasons

    def _decode_refused(self, position: Tensor, epoch: int) -> tuple[Tensor, str | None]:
        files = self.reader.files_of(epoch)
        pixels, reasons = files.read(position, (self.reader.crop_seed, epoch), self.reader.fill)
        if not reasons and not self._warned:
            # Warn once: a few such files do no harm. If there are many, one example is enough to find the cause.
            path = files.paths[int(position)]
            log.warning("data.decode: the device cannot decode %s; the CPU decodes this file and others like it", path)
            self._warned = True
        return pixels[0], reasons.get(0)


def _group_by_pixels(parts: list[Part]) -> Iterator[list[int]]:
    """Split the JPEG files into lists of at most `_PIXELS_AT_ONCE` pixels; yield each list as indices into `parts`.

    A single file with more pixels has its own list. Parts that are already decoded are left out.
    """
    places: list[int] = []
    pixels = 0
    for place, part in enumerate(parts):
        if part.is_jpeg:
            if places and pixels + part.width * part.height > _PIXELS_AT_ONCE:
                yield places
                places, pixels = [], 0
            places.append(place)
            pixels += part.width * part.height
    if places:
        yield places
