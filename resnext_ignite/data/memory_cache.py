"""Data that stays loaded from one run of a process to the next, where the runs ask for the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator

from resnext_ignite.config.schema import Config
from resnext_ignite.data.splits import Data

# Outside of a `keep_data_loaded` block None: whoever loads alone must see the files as they are now.
_kept: dict[Hashable, Data] | None = None


@contextlib.contextmanager
def keep_data_loaded() -> Iterator[None]:
    """Inside the block the data that was loaded last stays loaded."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def load_or_reuse(config: Config, load: Callable[[], Data]) -> Data:
    """Load the splits of a config, or reuse the last ones inside a `keep_data_loaded` block if they are the same."""
    if _kept is None:
        return load()
    # All that load_data reads: the seed chooses the held-out images, crops whether files are read.
    held_out = config.seed if config.data.val_size else None
    sizes = (config.image_size, config.evaluation.image_size)
    key = (config.data, held_out, sizes, config.augment.random_resized_crop)
    if key not in _kept:
        # Before the next is loaded, so that two never lie in memory.
        _kept.clear()
        _kept[key] = load()
    return _kept[key]
