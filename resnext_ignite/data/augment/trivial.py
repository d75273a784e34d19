"""TrivialAugment (Müller and Hutter, arXiv:2103.10158): applies one random operation of random strength to each image.

The operations and strengths are the same as in torchvision's TrivialAugmentWide. torchvision's functions compute all
operations except contrast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from resnext_ignite.data.sampling import Purpose, integers

BINS = 31
_BILINEAR = InterpolationMode.BILINEAR


@dataclass(frozen=True)
class Operation:
    """An operation on images.

    Args:
        apply: uint8 (n, 3, H, W) and a strength -> uint8 (n, 3, H, W).
        strengths: the strength of each bin; empty: the operation has no strength, and `apply` gets 0.
        signed: whether the sign of the strength is random.
    """

    apply: Callable[[Tensor, float], Tensor]
    strengths: tuple[float, ...] = ()
    signed: bool = False

    def strength(self, bin_: int, negative: bool) -> float:
        """Return the strength of a bin (0 to 30), negated if `negative` is true and the operation is signed."""
        strength = self.strengths[bin_] if self.strengths else 0.0
        return -strength if negative and self.signed else strength


def _sheared(pictures: Tensor, across: float, down: float) -> Tensor:
    # Shear about the upper left corner, as the published AutoAugment does. torchvision expects angles in degrees.
    degrees = [math.degrees(math.atan(share)) for share in (across, down)]
    return functional.affine(pictures, 0.0, [0, 0], 1.0, degrees, _BILINEAR, center=[0, 0])


def _moved(pictures: Tensor, across: float, down: float) -> Tensor:
    return functional.affine(pictures, 0.0, [int(across), int(down)], 1.0, [0.0, 0.0], _BILINEAR)


def _steps(start: float, end: float) -> tuple[float, ...]:
    return tuple(torch.linspace(start, end, BINS).tolist())


def _contrasted(pictures: Tensor, factor: float) -> Tensor:
    # As torchvision's adjust_contrast, but with an exact integer sum of the grey values: the rounding of a float32 sum
    # would depend on the number of images.
    greys = functional.rgb_to_grayscale(pictures)
    mean = greys.sum((1, 2, 3), keepdim=True).float() / greys[0].numel()
    return (pictures * factor).add_(mean, alpha=1 - factor).clamp_(0, 255).to(torch.uint8)


_MAGNITUDES = _steps(0, 0.99)
_PIXELS = _steps(0, 32)
# Numbers of bits, from 8 down to 2: three bins each for 8 and 2 bits, five bins for each number between.
_BITS = tuple((8 - torch.arange(BINS) / ((BINS - 1) / 6)).round().tolist())
OPERATIONS: dict[str, Operation] = {
    "identity": Operation(lambda p, _: p),
    "shear_x": Operation(lambda p, share: _sheared(p, share, 0), _MAGNITUDES, signed=True),
    "shear_y": Operation(lambda p, share: _sheared(p, 0, share), _MAGNITUDES, signed=True),
    "translate_x": Operation(lambda p, pixels: _moved(p, pixels, 0), _PIXELS, signed=True),
    "translate_y": Operation(lambda p, pixels: _moved(p, 0, pixels), _PIXELS, signed=True),
    "rotate": Operation(lambda p, degrees: functional.rotate(p, degrees, _BILINEAR), _steps(0, 135), signed=True),
    "brightness": Operation(lambda p, share: functional.adjust_brightness(p, 1 + share), _MAGNITUDES, signed=True),
    "color": Operation(lambda p, share: functional.adjust_saturation(p, 1 + share), _MAGNITUDES, signed=True),
    "contrast": Operation(lambda p, share: _contrasted(p, 1 + share), _MAGNITUDES, signed=True),
    "sharpness": Operation(lambda p, share: functional.adjust_sharpness(p, 1 + share), _MAGNITUDES, signed=True),
    "posterize": Operation(lambda p, bits: functional.posterize(p, int(bits)), _BITS),
    "solarize": Operation(lambda p, share: functional.solarize(p, 255 * share), _steps(1, 0)),
    "autocontrast": Operation(lambda p, _: functional.autocontrast(p)),
    "equalize": Operation(lambda p, _: functional.equalize(p)),
}


def choices(seed: int, epoch: int, indices: Tensor) -> list[tuple[str, float]]:
    """Return the pair (operation, strength) for each image; `indices` is int64 (n,), and `epoch` counts from 1."""
    operation, bin_, negative = (
        integers(seed, epoch, indices, Purpose.TRIVIAL + number, below)
        for number, below in enumerate((len(OPERATIONS), BINS, 2))
    )
    names = list(OPERATIONS)
    return [
        (names[number], OPERATIONS[names[number]].strength(at, bool(turned)))
        for number, at, turned in torch.stack([operation, bin_, negative], dim=1).tolist()
    ]


def trivial_augment(pictures: Tensor, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Apply a random operation to each image: uint8 (n, H, W, 3), `indices` int64 (n,) -> uint8 (n, H, W, 3)."""
    groups: dict[tuple[str, float], list[int]] = {}
    for place, choice in enumerate(choices(seed, epoch, indices)):
        groups.setdefault(choice, []).append(place)
    order = torch.tensor([place for places in groups.values() for place in places], device=pictures.device)
    # Apply each pair (operation, strength) once, to all images with this pair, as (n, 3, H, W). Afterwards, put the
    # images back to their original positions, as (n, H, W, 3).
    parts = pictures[order].permute(0, 3, 1, 2).split([len(places) for places in groups.values()])
    done = [OPERATIONS[name].apply(part, strength) for (name, strength), part in zip(groups, parts, strict=True)]
    out = torch.empty_like(pictures)
    out[order] = torch.cat(done).permute(0, 2, 3, 1)
    return out
