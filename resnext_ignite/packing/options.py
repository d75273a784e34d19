"""Defines the options of the commands that prepare data, and the lock of the output folder.

This module does not import torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resnext_ignite.runtime.errors import ConfigError, RunFolderError

_QUALITY = 95
IMAGES_PER_SHARD = 2000


@dataclass(frozen=True)
class Encoding:
    """The encoding of images on output.

    Args:
        short_side: largest length of the shorter side, in pixels; None: files are copied unchanged.
        quality: JPEG quality of the images that are shrunk, 1 to 100.
    """

    short_side: int | None = None
    quality: int = _QUALITY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--short-side`, `--quality` and `--workers`."""
    parser.add_argument(
        "--short-side", type=int, metavar="PIXELS", help="shrink images whose shorter side is longer than this"
    )
    parser.add_argument(
        "--quality", type=int, metavar="N", help=f"JPEG quality of the shrunk images (default: {_QUALITY})"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core; 0: none)")


def encoding_of(parsed: argparse.Namespace) -> Encoding:
    """Return the encoding that the options request.

    Raises:
        ConfigError: a value is out of range, or has no effect.
    """
    at_least("--short-side", parsed.short_side, 1)
    if parsed.quality is None:
        return Encoding(parsed.short_side)
    if parsed.short_side is None:
        raise ConfigError(f"--quality {parsed.quality}: files are copied as they are; give --short-side too")
    if not 1 <= parsed.quality <= 100:
        raise ConfigError(f"--quality {parsed.quality}: 1 to 100")
    return Encoding(parsed.short_side, parsed.quality)


def workers_of(parsed: argparse.Namespace) -> int:
    """Return the number of worker processes; raise ConfigError if it is negative."""
    at_least("--workers", parsed.workers, 0)
    return len(os.sched_getaffinity(0)) if parsed.workers is None else int(parsed.workers)


def at_least(option: str, value: int | None, least: int) -> None:
    """Check that the value of an option, if it is given, is at least `least`; raise ConfigError if it is smaller."""
    if value is not None and value < least:
        raise ConfigError(f"{option} {value}: at least {least}")


def require(*libraries: str) -> None:
    """Check that libraries are installed; raise ConfigError if one is missing.

    The package extra `imagenet` installs these libraries.
    """
    for name in libraries:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is missing; pip install 'resnext-ignite[imagenet]'")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder if it does not exist, and hold its lock during the `with` block.

    Only one process at a time can prepare data in a folder.

    Raises:
        ConfigError: the path exists, and is not a folder.
        RunFolderError: another process has the lock.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--output {folder}: exists, and is not a folder; choose another name") from None
    lock = FileLock(folder / ".lock")
    try:
        # Wait up to a second: after a process was killed, its workers still hold the lock for a moment, until they end
        # too.
        lock.acquire(timeout=1)
    except Timeout:
        raise RunFolderError(f"{folder}: another process is writing into it; wait for it, or end it") from None
    try:
        yield
    finally:
        lock.release()
