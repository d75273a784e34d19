"""Mixup and CutMix: mix each image with its neighbour in the batch (0 with 1, 2 with 3, ...).

The random numbers depend only on (seed, epoch, index). Each rank's slice of a micro-batch is contiguous and has an even
number of images, so an image has the same neighbour on any number of ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from resnext_ignite.data.sampling import Purpose, uniform

_QUANTILES = 4097


@functools.cache
def beta_quantiles(alpha: float) -> Tensor:
    """Return the quantiles of the Beta(alpha, alpha) distribution at 0, 1/4096, ..., 1: float64 (4097,).

    Integrate the density numerically from x = 0 to 1/2, with the substitution u = x ** alpha: as a function of u, the
    density is finite at 0 for any alpha. The quantiles above 1/2 follow by symmetry.
    """
    u = torch.linspace(0, 0.5**alpha, 100_001, dtype=torch.float64)
    x = u ** (1 / alpha)
    # This density times du equals x ** (alpha - 1) * (1 - x) ** (alpha - 1) dx, up to a constant factor.
    density = (1 - x) ** (alpha - 1)
    below = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density, u)])
    below = below / below[-1] / 2
    wanted = torch.linspace(0, 0.5, _QUANTILES // 2 + 1, dtype=torch.float64)
    above = torch.searchsorted(below, wanted).clamp(1, len(below) - 1)
    share = (wanted - below[above - 1]) / (below[above] - below[above - 1])
    lower = (u[above - 1] + share.clamp(0, 1) * (u[above] - u[above - 1])) ** (1 / alpha)
    return torch.cat([lower, 1 - lower[:-1].flip(0)])


def beta(alpha: float, uniforms: Tensor) -> Tensor:
    """Convert uniform random numbers to Beta(alpha, alpha) random numbers: (n,) -> float32 (n,).

    Interpolate the quantiles linearly.
    """
    table = beta_quantiles(alpha).to(uniforms.device)
    places = uniforms.double() * (_QUANTILES - 1)
    left = places.floor().long().clamp(max=_QUANTILES - 2)
    return torch.lerp(table[left], table[left + 1], places - left).float()


def neighbours(values: Tensor) -> Tensor:
    """Swap each entry with its neighbour (0 and 1, 2 and 3, ...): (n, ...), n even -> (n, ...)."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


@dataclass(frozen=True)
class Mixing:
    """Mixes the images of a batch with mixup or CutMix. If both are on, each has probability 1/2 for each image.

    Args:
        seed: the random seed.
        mixup: alpha of mixup (Zhang et al., arXiv:1710.09412, section 2); 0: off.
        cutmix: alpha of CutMix (Yun et al., arXiv:1905.04899, section 3.1); 0: off.
    """

    seed: int
    mixup: float = 0.0
    cutmix: float = 0.0

    def __call__(self, images: Tensor, epoch: int, indices: Tensor, alone: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed images, float32 (n, 3, H, W), and their lambdas, float32 (n,).

        Lambda is the fraction of a mixed image that comes from the image itself; the rest comes from its neighbour.

        Args:
            images: float32 (n, 3, H, W), normalised; n is even.
            epoch: from 1.
            indices: int64 (n,), the index of each image in its whole split.
            alone: bool (n,), the images that are not mixed; their lambda is 1.
        """

        def draw(purpose: int) -> Tensor:
            return uniform(self.seed, epoch, indices, purpose)

        height, width = images.shape[-2:]
        share = torch.ones(len(images), device=images.device)
        mask = torch.zeros(len(images), 1, height, width, device=images.device)
        uses_cutmix = torch.zeros_like(alone)
        if self.cutmix:
            uses_cutmix = draw(Purpose.MIX_KIND) < 0.5 if self.mixup else ~alone
            box = _boxes(beta(self.cutmix, draw(Purpose.MIX_LAMBDA)), draw(Purpose.MIX_Y), draw(Purpose.MIX_X), images)
            mask = torch.where((uses_cutmix & ~alone)[:, None, None, None], box, mask)
            # Compute lambda from the area of the box after clipping.
            share = 1 - mask.mean((1, 2, 3))
        if self.mixup:
            blended = ~uses_cutmix & ~alone
            own = beta(self.mixup, draw(Purpose.MIX_LAMBDA))
            mask = torch.where(blended[:, None, None, None], (1 - own)[:, None, None, None], mask)
            share = torch.where(blended, own, share)
        return torch.lerp(images, neighbours(images), mask), share


def _boxes(own: Tensor, down: Tensor, across: Tensor, images: Tensor) -> Tensor:
    """Return masks, float32 (n, 1, H, W), that are 1 in a box and 0 outside.

    Before clipping at the edges, a box covers the fraction 1 - `own` of the image's area. The centre of the box is at
    row `down` * H and column `across` * W. `own`, `down` and `across` are (n,), from 0 to 1.
    """
    height, width = images.shape[-2:]
    side = (1 - own).sqrt()
    inside = []
    for size, centre in ((height, down), (width, across)):
        middle, extent = (centre * size).floor(), (side * size).floor()
        start = (middle - (extent / 2).floor()).clamp(min=0)
        end = (middle - (extent / 2).floor() + extent).clamp(max=size)
        place = torch.arange(size, device=images.device)
        inside.append((place >= start[:, None]) & (place < end[:, None]))
    return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float()
