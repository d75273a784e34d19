"""Checks that `train.batch_size` divides evenly into the parts that the other config values require."""

from __future__ import annotations

import math

from resnext_ignite.config.schema import Config
from resnext_ignite.runtime.errors import ConfigError


def check_batch_size(config: Config, world_size: int) -> None:
    """Check that `train.batch_size` divides evenly into micro-batches of equal size on all ranks.

    Each micro-batch must divide evenly into ghost batches and, if mixup or CutMix is on, into pairs of images.

    Raises:
        ConfigError: `train.batch_size` does not divide evenly; the message names the nearest batch sizes that do.
    """
    train = config.train
    unit = world_size * train.accumulate * max(train.ghost_batch, 1)
    mixed = config.augment.mixup or config.augment.cutmix
    if mixed:
        # Images are mixed in pairs (0 and 1, 2 and 3, ...) inside a micro-batch on one rank. Each rank must therefore
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
