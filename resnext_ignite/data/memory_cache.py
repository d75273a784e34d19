"""Data that stays in memory between the runs of one process, if they load the same data. See also `disk_cache.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator

from resnext_ignite.config.schema import Config
from resnext_ignite.data.splits import Data

# None outside a `keep_data_loaded` block: a single run must read the current files.
_cached: dict[Hashable, Data] | None = None


@contextlib.contextmanager
def keep_data_loaded() -> Iterator[None]:
    """Keep the data that was loaded last in memory, inside the block."""
    global _cached
    _cached = {}
    try:
        yield
    finally:
        _cached = None


def load_or_reuse(config: Config, load: Callable[[], Data]) -> Data:
    """Load the splits of a config. Inside a `keep_data_loaded` block, return the last ones if they are the same."""
    if _cached is None:
        return load()
    # Everything of the config that `load_data` depends on. The seed selects the held-out images; a random-resized crop
    # prevents decoding into memory.
    held_out = config.seed if config.data.val_size else None
    sizes = (config.image_size, config.evaluation.image_size)
    key = (config.data, held_out, sizes, config.augment.random_resized_crop)
    if key not in _cached:
        # Clear before loading, so that memory never holds two data sets.
        _cached.clear()
        _cached[key] = load()
    return _cached[key]
