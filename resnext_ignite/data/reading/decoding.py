"""Decodes one image file: turns it upright, converts it to RGB, crops and resizes it. A damaged file gives a DataError.

simplejpeg (libjpeg-turbo) decodes JPEG files: it is faster than PIL, and gives the same pixels. PIL decodes unusual
JPEG files and all other formats.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional

from resnext_ignite.data.reading.cropping import Box, Crop
from resnext_ignite.data.sources.paths import ImagePath
from resnext_ignite.runtime.errors import DataError

Pixels = NDArray[np.uint8]
_ORIENTATION = 0x0112
# Maps each EXIF orientation (CIPA DC-008, table 6) to the function that turns pixels (H, W, 3) upright. `_SIDEWAYS`
# lists the orientations that swap width and height.
_MAKE_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}
_SIDEWAYS = (5, 6, 7, 8)
_MAX_SHRINK = 64
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def open_rgb(source: ImagePath) -> Image.Image:
    """Open an image in RGB as a viewer shows it: turned by its EXIF orientation, with white behind transparent pixels.

    Only the upper 8 bits of 16-bit channels and the first frame of an animation are used.

    Raises:
        DataError: the file cannot be read, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`; the message names it.
    """
    with _opened(source) as picture:
        pixels = picture.width * picture.height
        # PIL only warns at this limit, and raises at twice as many pixels.
        if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{pixels} pixels are more than the limit of {Image.MAX_IMAGE_PIXELS}")
        # In place: otherwise PIL also copies an image that is already upright.
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode in _SIXTEEN_BITS:
            # PIL's own conversion clips the values at 255 instead of using the upper 8 bits.
            levels = np.asarray(picture).astype(np.int64).clip(0, 65535)
            return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
        if picture.has_transparency_data:
            layer = picture.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        return picture.convert("RGB")


def has_size(source: ImagePath, size: int) -> bool:
    """Return whether an image is a square with a side of `size` pixels.

    Also return True for a file that cannot be read: the error is reported later, when the file is decoded.
    """
    with contextlib.suppress(DataError), _opened(source) as picture:
        return picture.size == (size, size)
    return True


@contextlib.contextmanager
def _opened(source: ImagePath) -> Iterator[Image.Image]:
    try:
        with _file(source) as file, Image.open(file) as picture:
            yield picture
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{source}: not a picture; remove or replace it") from None
    except Exception as error:
        # Catch every type: PIL raises a dozen types of exceptions for damaged files, for example TypeError.
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            # Too many open files: the image is not at fault, and a run that skips unreadable images must not skip it.
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise DataError(f"{source}: cannot be read: {reason or type(error).__name__}; remove or replace it") from None


def _file(source: ImagePath) -> IO[bytes]:
    return open(source, "rb", opener=_open_nonblocking) if isinstance(source, str) else source.open()


def _open_nonblocking(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe that has no writer blocks for ever.
    return os.open(path, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Suppress warnings inside the block: PIL warns of unusual metadata, which does not affect the pixels.

    Enter the block in the main thread only, because all threads of a process share the warning filters.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_crop(source: ImagePath, size: int, crop: Crop, *, training: bool = False) -> Pixels:
    """Decode a crop of an image file and resize it to a square with antialiasing: uint8 (size, size, 3).

    Evaluation resizes before it crops, as torchvision's Resize and CenterCrop do: pixels just outside the crop
    contribute to its edges. Training crops before it resizes, as RandomResizedCrop does. In training, a JPEG file is
    decoded at 1/2, 1/4 or 1/8 of its size if the crop is still at least `size` pixels wide and high at this scale. For
    large images, this is several times faster, and it makes the result a little smoother.

    Raises:
        DataError: as `open_rgb`.
    """
    plain, pixels = _PlainJpeg.of(source), None
    if plain is not None:
        box = crop(plain.width, plain.height)
        pixels = plain.decode(_halvings(min(box[2] - box[0], box[3] - box[1]) / size) if training else 0)
        if pixels is not None:
            across, down = pixels.shape[1] / plain.width, pixels.shape[0] / plain.height
            box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    if pixels is None:
        pixels = np.array(open_rgb(source))
        box = crop(pixels.shape[1], pixels.shape[0])
    # After decoding at a smaller size, the box is usually fractional. In that case, resize with a sub-pixel box: if the
    # box were rounded, the crop would shift by up to half a pixel.
    cut = training and _is_whole_pixels(box)
    return crop_and_resize(pixels, size, box) if cut else resized(pixels, size, box)


@dataclass(frozen=True)
class UndecodedJpeg:
    """A JPEG file that any JPEG decoder can decode: its bytes, the size of its image in pixels, and the crop box."""

    content: bytes
    width: int
    height: int
    box: Box


def read_undecoded(source: ImagePath, size: int, crop: Crop) -> UndecodedJpeg | None:
    """Read a JPEG file without decoding it, and compute its training crop; return None if the file needs `read_crop`.

    A file needs `read_crop` unless it meets all of these conditions. The image is in YCbCr and upright. The file ends
    with an EOI marker, because decoders give different pixels for a truncated file. The coordinates of the box are
    whole pixels. The sides of the box are at most `_MAX_SHRINK` * `size`: for a larger box, `read_crop` is faster,
    because it decodes at a fraction of the size.
    """
    plain = _PlainJpeg.of(source)
    if plain is None or plain.space != "YCbCr" or plain.orientation != 1 or plain.content[-2:] != b"\xff\xd9":
        return None
    box = crop(plain.width, plain.height)
    fits = max(box[2] - box[0], box[3] - box[1]) <= _MAX_SHRINK * size
    return UndecodedJpeg(plain.content, plain.width, plain.height, box) if fits and _is_whole_pixels(box) else None


def _is_whole_pixels(box: Box) -> bool:
    return all(side == round(side) for side in box)


def _halvings(factor: float) -> int:
    # A JPEG block of 8 x 8 pixels can be halved at most three times.
    return min(3, int(math.log2(factor))) if factor >= 1 else 0


@dataclass(frozen=True)
class _PlainJpeg:
    """A JPEG file that only needs decoding and turning upright. `width` and `height` are for the upright image."""

    content: bytes
    width: int
    height: int
    orientation: int = 1
    space: str = "YCbCr"

    @classmethod
    def of(cls, source: ImagePath) -> _PlainJpeg | None:
        """Read a file; return None if it is no plain JPEG (PIL decodes it) or unreadable (PIL reports the error)."""
        try:
            content = _jpeg_bytes(source)
            height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        except (OSError, EOFError, ValueError):
            return None
        if space not in ("YCbCr", "Gray", "RGB") or width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        # The orientation may be in EXIF or XMP metadata; PIL reads both.
        head = content[: _scan_offset(content)]
        orientation = _orientation(content) if b"Exif\x00\x00" in head or b"tiff:Orientation" in head else 1
        if orientation in _SIDEWAYS:
            width, height = height, width
        return cls(content, width, height, orientation, space)

    def decode(self, halvings: int) -> Pixels | None:
        """Decode to RGB at 1 / 2**halvings of the size: uint8 (H, W, 3); return None if the decoder fails."""
        height, width = (self.width, self.height) if self.orientation in _SIDEWAYS else (self.height, self.width)
        least = (-(-side // 2**halvings) for side in (height, width))
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(self.content, "RGB", False, False, *least)
        except ValueError:
            return None
        turn = _MAKE_UPRIGHT.get(self.orientation)
        return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _jpeg_bytes(source: ImagePath) -> bytes:
    """Return the bytes of a JPEG file, or empty bytes if the file is no JPEG."""
    if not isinstance(source, str):
        with source.open() as file:
            content = file.read()
        return content if content[:2] == b"\xff\xd8" else b""
    descriptor = _open_nonblocking(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        return os.read(descriptor, size) if os.pread(descriptor, 2, 0) == b"\xff\xd8" else b""
    finally:
        os.close(descriptor)


def _scan_offset(content: bytes) -> int:
    """Return the offset of the first scan of a JPEG; all metadata lies before it (ITU-T T.81, annex B)."""
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    # If the markers violate the standard, return the end of the file: the caller then searches the whole file.
    return place if content[place : place + 2] == b"\xff\xda" else len(content)


def _orientation(content: bytes) -> int:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:
        # PIL raises many types of exceptions for damaged metadata. Treat the file as upright.
        return 1


def resized(pixels: Pixels, size: int, box: Box) -> Pixels:
    """Resize a box of an image with PIL: uint8 (H, W, 3) -> (size, size, 3).

    The pixels are as if PIL resized the whole image and then cropped it: pixels just outside the box contribute.
    """
    if pixels.shape[:2] == (size, size) and box == (0, 0, size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box))


def crop_and_resize(pixels: Pixels, size: int, box: Box) -> Pixels:
    """Crop an image to a box of whole pixels, then resize it: uint8 (H, W, 3) -> (size, size, 3).

    torch takes half the time of PIL here. Because of rounding, its result differs from PIL's by at most one of 255
    levels.
    """
    left, top, right, bottom = map(int, box)
    # Copy to contiguous memory, because torch's resize is several times slower on a slice of an image. The change from
    # (H, W, 3) to (1, 3, H, W) and back copies nothing.
    planes = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right])).permute(2, 0, 1)[None]
    return functional.resize(planes, [size, size], antialias=True)[0].permute(1, 2, 0).numpy()
