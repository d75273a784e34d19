"""Generates `shapes`, a data set of 32x32 images: textured shapes of ten classes on cluttered backgrounds.

Every image depends only on (split, index). Position, size, rotation, colours and texture do not depend on the class, so
a linear model fails. A small ResNeXt learns the classes in a minute.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from resnext_ignite.data.images import Images
from resnext_ignite.data.sampling import Purpose, uniform

SIZE = 32
CLASSES = ("disk", "ring", "square", "triangle", "star", "cross", "crescent", "half_disk", "bar", "trefoil")
MEAN, STD = (0.500, 0.501, 0.504), (0.235, 0.234, 0.235)
TRAIN_SIZE, TEST_SIZE = 8192, 2000
_SEED = 29
_CHUNK = 1024
_CLUTTER = 2

# A shape is defined by a function that is negative inside the shape. Its arguments u and v are coordinates relative to
# the centre of the shape, in which the shape has a radius of about 1.
_Inside = Callable[[Tensor, Tensor], Tensor]


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    side = math.sqrt(3) / 2
    return torch.maximum(torch.maximum(side * u + v / 2, -side * u + v / 2), -v) - 0.55


def _petals(count: int, radius: float, depth: float) -> _Inside:
    def inside(u: Tensor, v: Tensor) -> Tensor:
        return torch.hypot(u, v) - radius - depth * torch.cos(count * torch.atan2(v, u))

    return inside


def _box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


_SHAPES: tuple[_Inside, ...] = (
    lambda u, v: torch.hypot(u, v) - 0.9,
    lambda u, v: (torch.hypot(u, v) - 0.72).abs() - 0.22,
    lambda u, v: _box(u, v, 0.78, 0.78),
    _triangle,
    _petals(5, 0.68, 0.3),
    lambda u, v: torch.minimum(_box(u, v, 0.95, 0.28), _box(u, v, 0.28, 0.95)),
    lambda u, v: torch.maximum(torch.hypot(u, v) - 0.95, 0.75 - torch.hypot(u - 0.45, v)),
    lambda u, v: torch.maximum(torch.hypot(u, v + 0.4) - 0.95, -v - 0.4),
    lambda u, v: _box(u, v, 1.0, 0.32),
    _petals(3, 0.65, 0.33),
)


def load_shapes(split: str, count: int | None = None) -> Images:
    """Draw `count` images of a split ("train" or "test"). The label of an image is its index modulo 10.

    If `count` is None, draw 8,192 images for train, or 2,000 for test.
    """
    count = count or (TRAIN_SIZE if split == "train" else TEST_SIZE)
    indices = torch.arange(count)
    pictures = torch.cat([_draw(chunk, int(split != "train")) for chunk in indices.split(_CHUNK)])
    return Images(pictures, indices % len(CLASSES), indices)


def _draw(indices: Tensor, stream: int) -> Tensor:
    """Draw the images with the given indices: int64 (N,) -> uint8 (N, 32, 32, 3).

    `stream` is 0 for train, 1 for test.
    """
    drawn = iter(range(Purpose.SHAPES, Purpose.SHAPES + 100))

    def draw(low: float = 0.0, high: float = 1.0, width: int = 1) -> Tensor:
        columns = [uniform(_SEED, stream, indices, next(drawn)) for _ in range(width)]
        # (N, 1, 1, width), to broadcast over rows and columns.
        return low + (high - low) * torch.stack(columns, dim=-1)[:, None, None, :]

    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = axis[:, None, None], axis[None, :, None]

    def waves(low: float, high: float) -> Tensor:
        angle, frequency, phase = draw(0, math.pi), draw(low, high), draw(0, 2 * math.pi)
        return torch.sin(frequency * (x * angle.cos() + y * angle.sin()) + phase)

    ground = draw(0.15, 0.85, 3)
    canvas = ground + draw(0.03, 0.15) * waves(3, 9) + draw(0.02, 0.12, 3) * waves(6, 20)
    for _ in range(_CLUTTER):
        # A short, thin stroke of another colour.
        angle, cx, cy = draw(0, math.pi), draw(-1, 1), draw(-1, 1)
        u = (x - cx) * angle.cos() + (y - cy) * angle.sin()
        v = (y - cy) * angle.cos() - (x - cx) * angle.sin()
        canvas = torch.lerp(canvas, draw(0, 1, 3), _coverage(_box(u, v, 0.4, 0.05), draw(0.9, 1.0)))
    # In each channel, the shape's colour lies 0.3 to 0.6 from the background's colour, toward the middle of the scale.
    color = torch.where(ground > 0.5, ground - draw(0.3, 0.6, 3), ground + draw(0.3, 0.6, 3))
    texture = color + draw(0.0, 0.18) * waves(8, 24)
    scale, angle = draw(0.5, 0.75), draw(-0.5, 0.5)
    cx, cy = draw(-0.3, 0.3), draw(-0.3, 0.3)
    u = ((x - cx) * angle.cos() + (y - cy) * angle.sin()) / scale
    v = ((y - cy) * angle.cos() - (x - cx) * angle.sin()) / scale
    inside = torch.empty(len(indices), SIZE, SIZE, 1)
    for label, shape in enumerate(_SHAPES):
        chosen = indices % len(CLASSES) == label
        inside[chosen] = shape(u[chosen], v[chosen])
    canvas = torch.lerp(canvas, texture, _coverage(inside, scale))
    pixels = indices[:, None] * SIZE * SIZE + torch.arange(SIZE * SIZE)
    noise = uniform(_SEED, stream, pixels.flatten(), next(drawn)).view(-1, SIZE, SIZE, 1) - 0.5
    return ((canvas + 0.08 * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def _coverage(inside: Tensor, scale: Tensor) -> Tensor:
    """Return the fraction of each pixel that a shape covers; `inside` is in units of `scale` * `SIZE` / 2 pixels."""
    return (0.5 - inside * scale * SIZE / 2).clamp(0, 1)
