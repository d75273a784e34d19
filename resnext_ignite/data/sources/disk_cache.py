"""Arrays cached in the user's cache folder, and used only while their source is unchanged."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from resnext_ignite.runtime.storage import write_durably

log = logging.getLogger(__name__)
Array = NDArray[Any]
UNCHANGED_S = 2.0
"""Age in seconds from which a file's times are reliable: two changes within one clock tick can have the same time."""


def get_or_build(
    kind: str,
    folder: Path,
    names: Sequence[str],
    state_of: Callable[[], tuple[float, str]],
    find: Callable[[], list[Array]],
    worth_caching: Callable[[list[Array]], bool],
) -> list[Array]:
    """Return the arrays that are cached for a folder's current state; else build them, and cache them.

    Args:
        kind: kind of the arrays, a part of the cache file's name.
        folder: the source of the arrays.
        names: names of the arrays, in order.
        state_of: returns the time of the source's last change (seconds since the epoch) and a text that differs after
            any change.
        find: builds the arrays.
        worth_caching: returns whether arrays take long enough to build to be cached.
    """
    # Take the time before the state: a change in between then counts as too recent to cache.
    path, now = _kept_path(kind, folder), time.time()
    changed_s, state = state_of()
    arrays = _read_kept(path, state, names)
    if arrays is None:
        arrays = find()
        if worth_caching(arrays) and changed_s < now - UNCHANGED_S:
            _keep(path, state, dict(zip(names, arrays, strict=True)))
    return arrays


def _kept_path(kind: str, folder: Path) -> Path:
    """Return the path of the cache file of a folder (below `XDG_CACHE_HOME`, by default ~/.cache)."""
    # Without a home directory, "~" is not expanded, and no cache is written or found there.
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return home / "resnext_ignite" / f"{kind}-{name}.safetensors"


def _read_kept(path: Path, state: str, names: Sequence[str]) -> list[Array] | None:
    """Return the cached arrays; None if they are missing, damaged, or of another state."""
    try:
        arrays = load_file(path)
        found = [arrays[name] for name in names]
        if bytes(arrays["seal"]).decode() == _seal(state, found):
            return found
    except (OSError, SafetensorError, KeyError, ValueError):
        pass
    return None


def _keep(path: Path, state: str, arrays: dict[str, Array]) -> None:
    """Write arrays to the cache for a state; if that fails, only log it at debug level."""
    seal = np.frombuffer(_seal(state, list(arrays.values())).encode(), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, save({**arrays, "seal": seal}))
    except OSError as error:
        log.debug(f"cannot cache the index of the images: {error}")


def _seal(state: str, arrays: Sequence[Array]) -> str:
    # Cover the arrays too: a damaged name would be a missing file, and a damaged count would give wrong labels.
    seal = hashlib.sha256(state.encode())
    for array in arrays:
        seal.update(array.tobytes())
    return seal.hexdigest()
