"""Caches arrays in the user's cache folder. A cached array is used only while its source is unchanged."""

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
"""Arrays are cached only if the source was last changed more than this many seconds ago. After a more recent change,
another change could follow within the same clock tick. It would get the same time, and would not be noticed."""


def get_or_build(
    kind: str,
    folder: Path,
    names: Sequence[str],
    state_of: Callable[[], tuple[float, str]],
    find: Callable[[], list[Array]],
    worth_caching: Callable[[list[Array]], bool],
) -> list[Array]:
    """Return the arrays that are cached for a folder's current state; if there are none, build and cache the arrays.

    Args:
        kind: kind of the arrays, a part of the cache file's name.
        folder: the source of the arrays.
        names: names of the arrays, in order.
        state_of: returns the time of the source's last change (seconds since 1970), and a string that differs after
            each change.
        find: builds the arrays.
        worth_caching: returns whether building these arrays takes long enough to cache them.
    """
    # Read the clock before the state of the folder. If the folder changes in between, its time of last change is not
    # earlier than `now`, and the arrays are not cached.
    path, now = _cache_path(kind, folder), time.time()
    changed_s, state = state_of()
    arrays = None if path is None else _read(path, state, names)
    if arrays is None:
        arrays = find()
        if path is not None and worth_caching(arrays) and changed_s < now - UNCHANGED_S:
            _write(path, state, dict(zip(names, arrays, strict=True)))
    return arrays


def _cache_path(kind: str, folder: Path) -> Path | None:
    """Return the path of the cache file of a folder (below `XDG_CACHE_HOME`, by default ~/.cache).

    Return None if `XDG_CACHE_HOME` is relative, because its specification says to ignore relative paths, or if the
    variable is not set and there is no home directory.
    """
    # Without a home directory, expanduser leaves "~" as it is.
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not home.is_absolute():
        return None
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return home / "resnext_ignite" / f"{kind}-{name}.safetensors"


def _read(path: Path, state: str, names: Sequence[str]) -> list[Array] | None:
    """Return the cached arrays; return None if they are missing, damaged, or belong to another state."""
    try:
        arrays = load_file(path)
        found = [arrays[name] for name in names]
        if bytes(arrays["seal"]).decode() == _seal(state, found):
            return found
    except (OSError, SafetensorError, KeyError, ValueError):
        pass
    return None


def _write(path: Path, state: str, arrays: dict[str, Array]) -> None:
    """Write the arrays of a state to the cache; if that fails, only log the error at debug level."""
    seal = np.frombuffer(_seal(state, list(arrays.values())).encode(), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, save({**arrays, "seal": seal}))
    except OSError as error:
        log.debug(f"cannot cache the index of the images: {error}")


def _seal(state: str, arrays: Sequence[Array]) -> str:
    # Hash the arrays too: a damaged name would look like a missing file, and a damaged count would give wrong labels.
    seal = hashlib.sha256(state.encode())
    for array in arrays:
        seal.update(array.tobytes())
    return seal.hexdigest()
