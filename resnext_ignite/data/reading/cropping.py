"""Computes the crop box of an image: a square for evaluation, or a random box for training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resnext_ignite.data.sampling import Purpose, uniform

Box = tuple[float, float, float, float]
Crop = Callable[[int, int], Box]
"""A function that takes the width and height of an image, and returns its crop box (left, top, right, bottom), all in
pixels."""
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10
"""Number of random boxes that are tried before the central box is used, as in torchvision."""
CENTRE = (0.5, 0.5)
FIVE_CROPS = (CENTRE, (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
"""Anchors of the central crop and the four corner crops. AlexNet's ten crops are these five crops and their mirror
images (section 4.1)."""


def square_crop(size: int, share: float = 1.0, anchor: tuple[float, float] = CENTRE) -> Crop:
    """Return a crop function for evaluation. Its box is in pixels of the original image.

    Resizing this box to (`size`, `size`) is equivalent to torchvision's Resize to `size` / `share`, followed by a
    square crop of side `size`. The box reproduces torchvision's rounding to whole pixels, because a shift by half a
    pixel would change every pixel.

    Args:
        size: side of the output in pixels.
        share: side of the square divided by the shorter side of the image.
        anchor: horizontal and vertical position of the square: 0 is the left or upper edge, 1 the right or lower edge.
    """
    short = round(size / share)

    def crop(width: int, height: int) -> Box:
        across, down = (short * side // min(width, height) for side in (width, height))
        left, top = round((across - size) * anchor[0]), round((down - size) * anchor[1])
        # Rounding must not move the box out of the image.
        right, bottom = min((left + size) * width / across, width), min((top + size) * height / down, height)
        return left * width / across, top * height / down, right, bottom

    return crop


def random_crop(draws: Iterable[Sequence[float]]) -> Crop:
    """Return a crop function that calls `random_box` with `draws`.

    `draws` must not be an iterator, because each call reads `draws` from the beginning.
    """
    return lambda width, height: random_box(width, height, draws)


def random_box(width: int, height: int, draws: Iterable[Sequence[float]]) -> Box:
    """Return a box (left, top, right, bottom) of random area and aspect ratio.

    `draws` gives four uniform random numbers in [0, 1) for each attempt. As in torchvision's RandomResizedCrop and
    fb.resnet.torch's RandomSizedCrop, take the first box that fits into the image. If no box fits, clip the aspect
    ratio of the image to the allowed range, and take the largest central box with this ratio. torchvision does the
    same, but rounds this box to whole pixels.
    """
    for area_draw, aspect_draw, top_draw, left_draw in draws:
        area = width * height * (_AREA[0] + area_draw * (_AREA[1] - _AREA[0]))
        # The logarithm of the aspect ratio is uniform, so that portrait and landscape boxes are equally likely.
        low, high = np.log(_ASPECT)
        aspect = float(np.exp(low + aspect_draw * (high - low)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top, left = int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, _ASPECT[0]), _ASPECT[1])
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


@dataclass(frozen=True)
class _CropDraws:
    """The `draws` of one image: four random numbers per attempt. Only those of the first attempt are precomputed."""

    seed: int
    epoch: int
    index: Tensor
    first: list[float]

    def __iter__(self) -> Iterator[list[float]]:
        yield self.first
        for number in range(1, ATTEMPTS):
            yield _attempt(self.seed, self.epoch, self.index, number)[0]


def _attempt(seed: int, epoch: int, indices: Tensor, number: int) -> list[list[float]]:
    purposes = range(Purpose.RESIZED_CROP + 4 * number, Purpose.RESIZED_CROP + 4 * number + 4)
    return torch.stack([uniform(seed, epoch, indices, purpose) for purpose in purposes], dim=1).tolist()


def crop_draws(seed: int, epoch: int, indices: Tensor) -> list[_CropDraws]:
    """Return a list with one argument `draws` of `random_crop` per image; `indices` is int64 (n,)."""
    firsts = _attempt(seed, epoch, indices, 0)
    return [_CropDraws(seed, epoch, indices[k : k + 1], first) for k, first in enumerate(firsts)]
