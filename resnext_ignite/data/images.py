"""A split of a data set in memory, as the loaders take it, and how a picture is marked that could not be read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What torch's cross_entropy leaves out by itself.
UNREADABLE = -100


def color_to_uint8(color: tuple[float, float, float]) -> tuple[int, int, int]:
    """A colour of 0 to 1 as a uint8 picture holds it: at most 0.5/255 off, a hundredth of a standard deviation."""
    red, green, blue = (round(255 * value) for value in color)
    return red, green, blue


@dataclass(frozen=True)
class Images:
    """Decoded pictures in one tensor.

    Args:
        pixels: uint8 (N, H, W, 3).
        labels: int64 (N,); UNREADABLE for a picture that could not be read, which is one colour then.
        indices: int64 (N,), each picture's index in its whole split: the key of all that is random about it.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> Images:
        """The pictures at some positions (int64), keeping their indices."""
        return Images(self.pixels[positions], self.labels[positions], self.indices[positions])

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        return Images(*(part.to(device) for part in (self.pixels, self.labels, self.indices)))

    def load(self, positions: Tensor) -> Tensor:
        """Pictures at some positions: int64 (n,) -> uint8 (n, H, W, 3)."""
        return self.pixels[positions.to(self.pixels.device)]

    def resized(self, size: int) -> Images:
        """Square pictures of another size, antialiased; the same object where they have it already."""
        if self.pixels.shape[1] == size:
            return self
        from torchvision.transforms.v2.functional import resize

        chunks = [
            resize(chunk.permute(0, 3, 1, 2), [size, size], antialias=True).permute(0, 2, 3, 1)
            for chunk in self.pixels.split(1000)
        ]
        return Images(torch.cat(chunks), self.labels, self.indices)
