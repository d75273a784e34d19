"""Keeps data in memory between the runs of one process. `sources/disk_cache.py` caches lists of images on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator

from resnext_ignite.config.schema import Config
from resnext_ignite.data.splits import Data

# None outside a `keep_data_loaded` block: a single run must read the current files.
_cached: dict[Hashable, Data] | None = None


@contextlib.contextmanager
def keep_data_loaded() -> Iterator[None]:
    """Until the `with` block ends, let `load_or_reuse` keep the most recently loaded data in memory."""
    global _cached
    _cached = {}
    try:
        yield
    finally:
        _cached = None


def load_or_reuse(config: Config, load: Callable[[], Data]) -> Data:
    """Load the splits of a config.

    In a `keep_data_loaded` block, return the most recently loaded data instead if the config needs the same data.
    """
    if _cached is None:
        return load()
    # The key holds everything in the config that `load_data` depends on. It includes the seed, which selects the
    # held-out images, and `random_resized_crop`: if it is on, the training images are not decoded into memory.
    held_out = config.seed if config.data.val_size else None
    sizes = (config.image_size, config.evaluation.image_size)
    key = (config.data, held_out, sizes, config.augment.random_resized_crop)
    if key not in _cached:
        # Clear before loading, so that memory never holds two data sets.
        _cached.clear()
        _cached[key] = load()
    return _cached[key]
