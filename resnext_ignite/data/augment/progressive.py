"""Progressive resizing: computes the size of the training images in each epoch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class GrowingSize:
    """The side of the training images in each epoch: it grows linearly in steps, then stays at its full size.

    The method follows M. Tan and Q. Le, 'EfficientNetV2' (arXiv:2104.00298, section 4.2, algorithm 1). The paper
    changes the size only between a few stages; here, it can change in every epoch.

    Args:
        first: side in the first epoch, in pixels; a multiple of `step`.
        full: side after the growth, in pixels.
        step: during the growth, the side is rounded down to a multiple of this number of pixels.
        epochs: number of epochs of the whole run.
        until: fraction of the epochs after which the side is `full`.
    """

    first: int
    full: int
    step: int
    epochs: int
    until: float

    def at(self, epoch: int) -> int:
        """Return the side in pixels in an epoch (from 1)."""
        # Compute exactly with the decimal digits in the config: in floating point, 0.28 * 25 is more than 7.
        growing = Fraction(str(self.until)) * self.epochs
        if epoch - 1 >= growing:
            return self.full
        exact = self.first + (self.full - self.first) * (epoch - 1) / growing
        return int(exact // self.step * self.step)
