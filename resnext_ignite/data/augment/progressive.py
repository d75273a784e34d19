"""Progressive resizing: which size the training images of an epoch have, as a pure function; no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class GrowingSize:
    """The side of the training images in each epoch: it grows linearly, in steps, and then stays.

    As in M. Tan and Q. Le, 'EfficientNetV2' (arXiv:2104.00298, section 4.2, algorithm 1), but epoch by epoch.

    Args:
        first: pixels in the first epoch.
        full: pixels from the end of the growth on.
        step: sizes on the way are rounded down to a multiple of so many pixels; `first` is one.
        epochs: of the whole run.
        until: share of them after which the size is `full`.
    """

    first: int
    full: int
    step: int
    epochs: int
    until: float

    def at(self, epoch: int) -> int:
        """Pixels in an epoch, counted from 1."""
        # Exact, of the decimals that were written: 0.7 * 10 is more than 7 in floating point.
        growing = Fraction(str(self.until)) * self.epochs
        if epoch - 1 >= growing:
            return self.full
        exact = self.first + (self.full - self.first) * (epoch - 1) / growing
        return int(exact // self.step * self.step)
