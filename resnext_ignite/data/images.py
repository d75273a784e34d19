"""Defines `Images`, a split whose images are decoded into memory, and UNREADABLE, the label of unreadable images.

`reading/image_files.py` defines `ImageFiles`, a split that consists of files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The default `ignore_index` of torch's cross_entropy.
UNREADABLE = -100


def color_to_uint8(color: tuple[float, float, float]) -> tuple[int, int, int]:
    """Convert a colour on a scale of 0 to 1 to uint8 values.

    The rounding error is at most 0.5/255. This is about 1% of the usual standard deviation of the pixels.
    """
    red, green, blue = (round(255 * value) for value in color)
    return red, green, blue


@dataclass(frozen=True)
class Images:
    """Decoded images in one tensor.

    Args:
        pixels: uint8 (N, H, W, 3).
        labels: int64 (N,). An image that could not be read has the label UNREADABLE, and all its pixels are equal.
        indices: int64 (N,), the index of each image in its whole split; random numbers depend only on (seed, epoch,
            index).
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> Images:
        """Return the images at the given positions, int64 (n,); they keep their `indices`."""
        return Images(self.pixels[positions], self.labels[positions], self.indices[positions])

    def to(self, device: torch.device) -> Images:
        """Return the same images on a device."""
        return Images(*(part.to(device) for part in (self.pixels, self.labels, self.indices)))

    def load(self, positions: Tensor) -> Tensor:
        """Return the pixels of the images at the given positions: int64 (n,) -> uint8 (n, H, W, 3)."""
        return self.pixels[positions.to(self.pixels.device)]

    def resized(self, size: int) -> Images:
        """Resize square images to (size, size) with antialiasing; return `self` if they already have that size."""
        if self.pixels.shape[1] == size:
            return self
        from torchvision.transforms.v2.functional import resize

        chunks = [
            resize(chunk.permute(0, 3, 1, 2), [size, size], antialias=True).permute(0, 2, 3, 1)
            for chunk in self.pixels.split(1000)
        ]
        return Images(torch.cat(chunks), self.labels, self.indices)
