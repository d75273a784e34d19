"""Arrays kept in the user's cache folder, and believed only while nothing that they were made from has changed."""

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
"""Seconds after which a file's times are believed: one that changes within a tick of the clock may leave them alone."""


def get_or_build(
    kind: str,
    folder: Path,
    names: Sequence[str],
    state_of: Callable[[], tuple[float, str]],
    find: Callable[[], list[Array]],
    worth_keeping: Callable[[list[Array]], bool],
) -> list[Array]:
    """What is known of a folder, as it was kept for the folder's state, or found now and kept.

    Args:
        kind: of what is known, a part of the kept file's name.
        names: of the arrays, in their order.
        state_of: gives when what they are made from was last changed, in seconds, and all that would tell a change.
        find: makes the arrays.
        worth_keeping: whether they took long to find.
    """
    # Before the state: what changes while it is taken is then young.
    path, now = _kept_path(kind, folder), time.time()
    changed_s, state = state_of()
    arrays = _read_kept(path, state, names)
    if arrays is None:
        arrays = find()
        if worth_keeping(arrays) and changed_s < now - UNCHANGED_S:
            _keep(path, state, dict(zip(names, arrays, strict=True)))
    return arrays


def _kept_path(kind: str, folder: Path) -> Path:
    """Where what is known of a folder is kept (below `XDG_CACHE_HOME`)."""
    # Without a home it stays "~", where nothing can be kept.
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return home / "resnext_ignite" / f"{kind}-{name}.safetensors"


def _read_kept(path: Path, state: str, names: Sequence[str]) -> list[Array] | None:
    """The arrays of these names, if they are whole and of this state."""
    try:
        arrays = load_file(path)
        found = [arrays[name] for name in names]
        if bytes(arrays["seal"]).decode() == _seal(state, found):
            return found
    except (OSError, SafetensorError, KeyError, ValueError):
        pass
    return None


def _keep(path: Path, state: str, arrays: dict[str, Array]) -> None:
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
