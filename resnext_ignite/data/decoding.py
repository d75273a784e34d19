"""One picture file to pixels: opened without trust, upright, in RGB, cropped and resized.

JPEG files are decoded by libjpeg-turbo itself, faster than PIL has it do it and to the same pixels; what is not plain
about them, and all other kinds, is PIL's.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional

from resnext_ignite.data.paths import Source
from resnext_ignite.errors import DataError

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10
"""Draws of a random box before the centre is taken instead, as torchvision has it."""
CENTRE = (0.5, 0.5)
FIVE_CROPS = (CENTRE, (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
"""Anchors of the centre and the corners; with their mirror images, the ten crops of AlexNet, section 4.1."""
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
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def open_rgb(source: Source) -> Image.Image:
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


def has_size(source: Source, size: int) -> bool:
    """Whether a picture is a square of `size` pixels; true of what cannot be read, which is met when it is decoded."""
    with contextlib.suppress(DataError), _opened(source) as picture:
        return picture.size == (size, size)
    return True


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    try:
        with _file(source) as file, Image.open(file) as picture:
            yield picture
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{source}: not a picture; remove or replace it") from None
    except Exception as error:
        # Whatever it is: PIL's readers answer damaged files with a dozen types, TypeError among them.
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise DataError(f"{source}: cannot be read: {reason or type(error).__name__}; remove or replace it") from None


def _file(source: Source) -> IO[bytes]:
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


Crop = Callable[[int, int], Box]
"""A part of a picture of some width and height: left, top, right, bottom, in pixels."""


def read_crop(source: Source, size: int, crop: Crop, *, training: bool = False) -> Pixels:
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
    cut = training and all(side == round(side) for side in box)
    return cut_and_resized(pixels, size, box) if cut else resized(pixels, size, box)


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

    @classmethod
    def of(cls, source: Source) -> _PlainJpeg | None:
        """None where it is none, or cannot be read: PIL says why."""
        try:
            with _file(source) as file:
                content = b""
                if file.read(2) == b"\xff\xd8":
                    file.seek(0)
                    content = file.read()
            height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        except (OSError, EOFError, ValueError):
            return None
        if space not in ("YCbCr", "Gray", "RGB") or width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        # Where it stands, in Exif or XMP, behind whatever else: PIL finds it.
        orientation = _orientation(content) if b"Exif\x00\x00" in content or b"tiff:Orientation" in content else 1
        if orientation in _SIDEWAYS:
            width, height = height, width
        return cls(content, width, height, orientation)

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


def _orientation(content: bytes) -> int:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Damaged metadata, of which PIL has many things to say: it will say them itself.
        return 1


def square_crop(size: int, share: float = 1.0, anchor: tuple[float, float] = CENTRE) -> Crop:
    """What torchvision's Resize to `size` / `share` and a crop of `size` pixels leave of a picture.

    Its rounding to whole pixels included: half a pixel more or less would change every pixel of the crop.

    Args:
        share: side of the square over the shorter side.
        anchor: where it lies, across and down: 0 at the left and upper edge, 1 at the right and lower.
    """
    short = round(size / share)

    def crop(width: int, height: int) -> Box:
        across, down = (short * side // min(width, height) for side in (width, height))
        left, top = round((across - size) * anchor[0]), round((down - size) * anchor[1])
        # Rounding must not lead out of the picture.
        right, bottom = min((left + size) * width / across, width), min((top + size) * height / down, height)
        return left * width / across, top * height / down, right, bottom

    return crop


def random_crop(draws: Sequence[Sequence[float]]) -> Crop:
    """`random_box`, of uniform numbers (attempts, 4)."""
    return lambda width, height: random_box(width, height, draws)


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
    # (H, W, 3) -> (1, 3, H, W) and back: only the view changes.
    planes = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
    return functional.resize(planes, [size, size], antialias=True)[0].permute(1, 2, 0).numpy()


def random_box(width: int, height: int, draws: Sequence[Sequence[float]]) -> Box:
    """A box of random area and aspect (left, top, right, bottom), from uniform numbers (attempts, 4).

    As torchvision's RandomResizedCrop and fb.resnext.torch's RandomSizedCrop: the first attempt that fits, else the
    central box of the nearest allowed aspect.
    """
    for area_draw, aspect_draw, top_draw, left_draw in draws:
        area = width * height * (_AREA[0] + area_draw * (_AREA[1] - _AREA[0]))
        # Uniform in the logarithm, so that portrait and landscape are equally likely.
        low, high = np.log(_ASPECT)
        aspect = float(np.exp(low + aspect_draw * (high - low)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top, left = int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, _ASPECT[0]), _ASPECT[1])
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2
