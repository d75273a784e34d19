"""Arrays kept in the user's cache folder, and believed only while nothing that they were made from has changed."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from resnext_ignite.storage import write_durably

log = logging.getLogger(__name__)
Array = NDArray[Any]
SETTLED_S = 2.0
"""Seconds after which a file's times are believed: one that changes within a tick of the clock may leave them alone."""


def kept_path(kind: str, folder: Path) -> Path:
    """Where what is known of a folder is kept (below `XDG_CACHE_HOME`)."""
    # Without a home it stays "~", where nothing can be kept.
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return home / "resnext_ignite" / f"{kind}-{name}.safetensors"


def read_kept(path: Path, state: str, names: Sequence[str]) -> list[Array] | None:
    """The arrays of these names, if they are whole and of this state."""
    try:
        arrays = load_file(path)
        found = [arrays[name] for name in names]
        if bytes(arrays["seal"]).decode() == _seal(state, found):
            return found
    except (OSError, SafetensorError, KeyError, ValueError):
        pass
    return None


def keep(path: Path, state: str, arrays: dict[str, Array]) -> None:
    """Keep arrays for a state; where that is not possible, say so in the log of details."""
    seal = np.frombuffer(_seal(state, list(arrays.values())).encode(), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, save({**arrays, "seal": seal}))
    except OSError as error:
        log.debug(f"the list of pictures is not kept: {error}")


def _seal(state: str, arrays: Sequence[Array]) -> str:
    # A letter that changed would be a missing file; a count, wrong labels that nobody notices.
    seal = hashlib.sha256(state.encode())
    for array in arrays:
        seal.update(array.tobytes())
    return seal.hexdigest()
