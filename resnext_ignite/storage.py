"""Files that are whole or absent, whenever power fails. What is in them is for others to know."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def replace_durably(
    path: Path, write: Callable[[IO[bytes]], None], before_rename: Callable[[Path], None] | None = None
) -> None:
    """Write a file so that its name holds the old or the new content, whole, whenever power fails.

    Args:
        write: fills the new file.
        before_rename: is given the new file under its temporary name, once it is synced.

    Raises:
        OSError: what is under the name is then untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before_rename is not None:
            before_rename(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
