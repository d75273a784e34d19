"""Checks that a batch divides evenly over ranks, micro-batches, ghost batches, and the pairs of mixup and CutMix."""

from __future__ import annotations

import math

from resnext_ignite.config.schema import Config
from resnext_ignite.runtime.errors import ConfigError


def check_batch_size(config: Config, world_size: int) -> None:
    """Check that a batch divides evenly over the ranks, micro-batches, ghost batches, and pairs of images to mix.

    Raises:
        ConfigError: the batch does not divide evenly; the message names the nearest batch sizes that do.
    """
    train = config.train
    unit = world_size * train.accumulate * max(train.ghost_batch, 1)
    mixed = config.augment.mixup or config.augment.cutmix
    if mixed:
        # An image can only be mixed with a neighbour in the same micro-batch on the same rank. Each rank must therefore
        # have an even number of images in each micro-batch.
        unit = math.lcm(unit, 2 * world_size * train.accumulate)
    if train.batch_size % unit:
        fits = [size for size in (train.batch_size // unit * unit, (train.batch_size // unit + 1) * unit) if size]
        ghosts = f" of ghost batches of {train.ghost_batch}" if train.ghost_batch else ""
        ghosts += " of pairs that are mixed" if mixed else ""
        raise ConfigError(
            f"train.batch_size: {train.batch_size} cannot be shared by {world_size} ranks of {train.accumulate} "
            f"micro-batches{ghosts}; {' or '.join(map(str, fits))} can"
        )
