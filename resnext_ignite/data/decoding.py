"""One picture file to pixels: opened without trust, upright, in RGB, cropped and resized by PIL."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from resnext_ignite.errors import DataError

_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10
"""Draws of a random box before the centre is taken instead, as torchvision has it."""
CENTRE = (0.5, 0.5)
FIVE_CROPS = (CENTRE, (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
"""Anchors of the centre and the corners; with their mirror images, the ten crops of AlexNet, section 4.1."""
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def open_rgb(path: str) -> Image.Image:
    """A picture as a person sees it, in RGB: turned as its EXIF orientation says, on white where it is transparent.

    Of 16 bits a channel the upper 8 are kept; of a film the first picture.

    Raises:
        DataError: it cannot be read, or has more pixels than PIL thinks harmless; the line names it.
    """
    with _opened(path) as picture:
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


def has_size(path: str, size: int) -> bool:
    """Whether a picture is a square of `size` pixels; true of what cannot be read, which is met when it is decoded."""
    with contextlib.suppress(DataError), _opened(path) as picture:
        return picture.size == (size, size)
    return True


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with open(path, "rb", opener=_without_waiting) as file, Image.open(file) as picture:
            yield picture
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a picture; remove or replace it") from None
    except Exception as error:
        # Whatever it is: PIL's readers answer damaged files with a dozen types, TypeError among them.
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read: {reason or type(error).__name__}; remove or replace it") from None


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


def square_crop(
    picture: Image.Image, size: int, share: float = 1.0, anchor: tuple[float, float] = CENTRE
) -> NDArray[np.uint8]:
    """A square of `share` of the shorter side, resized with antialiasing: (size, size, 3).

    Args:
        anchor: where it lies, across and down: 0 at the left and upper edge, 1 at the right and lower.
    """
    if picture.size == (size, size) and share == 1.0:
        return np.asarray(picture)
    side = min(picture.size) * share
    left, top = (picture.width - side) * anchor[0], (picture.height - side) * anchor[1]
    return resized(picture, size, (left, top, left + side, top + side))


def resized(picture: Image.Image, size: int, box: tuple[float, float, float, float]) -> NDArray[np.uint8]:
    """A part of a picture (left, top, right, bottom, in pixels) as (size, size, 3), antialiased."""
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box))


def random_box(width: int, height: int, draws: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
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
