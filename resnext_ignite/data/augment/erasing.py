"""Random erasing (Zhong et al., arXiv:1708.04896): computes a random box per image. `chain.py` erases the boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnext_ignite.data.sampling import Purpose, uniform

# The defaults of torchvision's RandomErasing.
_AREA = (0.02, 0.33)
_ASPECT = (0.3, 3.3)
ATTEMPTS = 10


def random_boxes(
    seed: int, epoch: int, indices: Tensor, height: int, width: int, probability: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the box to erase in each image: top, left, height, width, int64 (n,) each; all are 0 if there is no box.

    As in torchvision, try ten random boxes per image, and use the first box whose height and width are both smaller
    than those of the image. If there is no such box, erase nothing in this image.

    Args:
        seed: the random seed.
        epoch: from 1.
        indices: int64 (n,), the index of each image in its whole split.
        height, width: size of the images in pixels.
        probability: probability that an image has a box.
    """
    # (n, ATTEMPTS): each attempt of each image needs its own random numbers.
    keys = indices[:, None] * ATTEMPTS + torch.arange(ATTEMPTS, device=indices.device)

    def draw(number: int) -> Tensor:
        return uniform(seed, epoch, keys, Purpose.ERASE + number).double()

    area = height * width * (_AREA[0] + draw(1) * (_AREA[1] - _AREA[0]))
    low, high = (math.log(aspect) for aspect in _ASPECT)
    aspect = (low + draw(2) * (high - low)).exp()
    tall, wide = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (tall < height) & (wide < width)
    top, left = ((draw(3) * (height - tall + 1)).long(), (draw(4) * (width - wide + 1)).long())
    first = fits.int().argmax(1, keepdim=True)
    erased = fits.any(1) & (uniform(seed, epoch, indices, Purpose.ERASE) < probability)
    top, left, tall, wide = (values.gather(1, first)[:, 0] * erased for values in (top, left, tall, wide))
    return top, left, tall, wide
