"""One picture file to pixels: opened without trust, upright, in RGB, cropped and resized.

JPEG files are decoded by libjpeg-turbo itself, faster than PIL has it do it and to the same pixels; what is not plain
about them, and all other kinds, is PIL's.
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
# What makes pixels (H, W, 3) of EXIF's orientations upright (CIPA DC-008, table 6); those that lie on their side.
_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}
_SIDEWAYS = (5, 6, 7, 8)
_MOST_SHRUNK = 64
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def open_rgb(source: ImagePath) -> Image.Image:
    """A picture as a person sees it, in RGB: turned as its EXIF orientation says, on white where it is transparent.

    Of 16 bits a channel the upper 8 are kept; of a film the first picture.

    Raises:
        DataError: it cannot be read, or has more pixels than PIL thinks harmless; the line names it.
    """
    with _opened(source) as picture:
        pixels = picture.width * picture.height
        # PIL itself warns here, and refuses at twice as many.
        if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{pixels} pixels are more than a picture should have ({Image.MAX_IMAGE_PIXELS})")
        # In place: it would copy what stands upright already.
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode in _SIXTEEN_BITS:
            # PIL's own conversion clips at 255.
            levels = np.asarray(picture).astype(np.int64).clip(0, 65535)
            return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
        if picture.has_transparency_data:
            layer = picture.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        return picture.convert("RGB")


def has_size(source: ImagePath, size: int) -> bool:
    """Whether a picture is a square of `size` pixels; true of what cannot be read, which is met when it is decoded."""
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
        # Whatever it is: PIL's readers answer damaged files with a dozen types, TypeError among them.
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            # The picture is not at fault: where such are skipped, it must not be.
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise DataError(f"{source}: cannot be read: {reason or type(error).__name__}; remove or replace it") from None


def _file(source: ImagePath) -> IO[bytes]:
    return open(source, "rb", opener=_without_waiting) if isinstance(source, str) else source.open()


def _without_waiting(path: str, flags: int) -> int:
    # A pipe that nobody writes to would be waited for without end.
    return os.open(path, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Without PIL's warnings of odd metadata, which say nothing of the pixels.

    Never entered in a thread: the filters are the process's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_crop(source: ImagePath, size: int, crop: Crop, *, training: bool = False) -> Pixels:
    """A part of a picture file, resized to a square with antialiasing: uint8 (size, size, 3).

    In evaluation as torchvision's Resize before its CenterCrop, where pixels beyond the part weigh in at its edge. In
    training as its RandomResizedCrop, cut out first; and where the part stays larger than `size`, a JPEG is decoded at
    a half, a quarter or an eighth of its size: several times faster for large photographs, and a little smoother.

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
    # At a fraction, a crop rarely begins with a pixel; rounded, it would move by up to half of one.
    cut = training and _of_pixels(box)
    return cut_and_resized(pixels, size, box) if cut else resized(pixels, size, box)


@dataclass(frozen=True)
class WholeJpeg:
    """The bytes of a JPEG file that any decoder can be given, its size in pixels, and which part is asked for."""

    content: bytes
    width: int
    height: int
    box: Box


def undecoded(source: ImagePath, size: int, crop: Crop) -> WholeJpeg | None:
    """A JPEG file in YCbCr, upright and with an end, of which whole pixels are to be cut out; None: `read_crop` it.

    What is cut off ends without the marker of an end, and decoders differ in what they make of it. A part of many times
    `size` is smaller work where it is decoded at a fraction.
    """
    plain = _PlainJpeg.of(source)
    if plain is None or plain.space != "YCbCr" or plain.orientation != 1 or plain.content[-2:] != b"\xff\xd9":
        return None
    box = crop(plain.width, plain.height)
    fits = max(box[2] - box[0], box[3] - box[1]) <= _MOST_SHRUNK * size
    return WholeJpeg(plain.content, plain.width, plain.height, box) if fits and _of_pixels(box) else None


def _of_pixels(box: Box) -> bool:
    return all(side == round(side) for side in box)


def _halvings(factor: float) -> int:
    # Of 8 pixels a side a JPEG's blocks have: at most three times.
    return min(3, int(math.log2(factor))) if factor >= 1 else 0


@dataclass(frozen=True)
class _PlainJpeg:
    """A JPEG file that needs nothing but decoding and turning upright, and its size in pixels once it is."""

    content: bytes
    width: int
    height: int
    orientation: int = 1
    space: str = "YCbCr"

    @classmethod
    def of(cls, source: ImagePath) -> _PlainJpeg | None:
        """None where it is none, or cannot be read: PIL says why."""
        try:
            content = _content(source)
            height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        except (OSError, EOFError, ValueError):
            return None
        if space not in ("YCbCr", "Gray", "RGB") or width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        # Where it stands, in Exif or XMP: PIL finds it.
        head = content[: _scan(content)]
        orientation = _orientation(content) if b"Exif\x00\x00" in head or b"tiff:Orientation" in head else 1
        if orientation in _SIDEWAYS:
            width, height = height, width
        return cls(content, width, height, orientation, space)

    def decode(self, halvings: int) -> Pixels | None:
        """Of its whole size, or halved so often, in RGB: (H, W, 3); None where something is wrong with it."""
        height, width = (self.width, self.height) if self.orientation in _SIDEWAYS else (self.height, self.width)
        least = (-(-side // 2**halvings) for side in (height, width))
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(self.content, "RGB", False, False, *least)
        except ValueError:
            return None
        turn = _TURNS.get(self.orientation)
        return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _content(source: ImagePath) -> bytes:
    """A file's bytes, in one read; none where it is no JPEG."""
    if not isinstance(source, str):
        with source.open() as file:
            content = file.read()
        return content if content[:2] == b"\xff\xd8" else b""
    descriptor = _without_waiting(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        return os.read(descriptor, size) if os.pread(descriptor, 2, 0) == b"\xff\xd8" else b""
    finally:
        os.close(descriptor)


def _scan(content: bytes) -> int:
    """Where the first scan of a JPEG begins, behind all that is said of the picture (ITU-T T.81, annex B)."""
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    # What is not made like this is searched to its end.
    return place if content[place : place + 2] == b"\xff\xda" else len(content)


def _orientation(content: bytes) -> int:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Damaged metadata, of which PIL has many things to say: it will say them itself.
        return 1


def resized(pixels: Pixels, size: int, box: Box) -> Pixels:
    """A part of a picture (H, W, 3) as (size, size, 3), as if the whole were resized first."""
    if pixels.shape[:2] == (size, size) and box == (0, 0, size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box))


def cut_and_resized(pixels: Pixels, size: int, box: Box) -> Pixels:
    """A part of a picture (H, W, 3) that begins and ends with a pixel, as (size, size, 3).

    By torch, in half the time of PIL; it rounds alike but for a level.
    """
    left, top, right, bottom = map(int, box)
    # In one piece: torch is several times slower with a part of a picture. (H, W, 3) -> (1, 3, H, W) and back: only
    # the view changes.
    planes = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right])).permute(2, 0, 1)[None]
    return functional.resize(planes, [size, size], antialias=True)[0].permute(1, 2, 0).numpy()
