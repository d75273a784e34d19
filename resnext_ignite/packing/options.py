"""What the commands that prepare data have in common, before torch is imported: options, and the lock of an output."""

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
    """How pictures are written.

    Args:
        short_side: pixels that the shorter side has at most; None: the files are copied as they are.
        quality: of the JPEG files that are written where one had more, 1 to 100.
    """

    short_side: int | None = None
    quality: int = _QUALITY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--short-side`, `--quality` and `--workers`."""
    parser.add_argument("--short-side", type=int, metavar="PIXELS", help="shrink pictures whose shorter side is longer")
    parser.add_argument("--quality", type=int, metavar="N", help=f"of the shrunk ones, as JPEG (default: {_QUALITY})")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core; 0: none)")


def encoding_of(parsed: argparse.Namespace) -> Encoding:
    """The encoding that is asked for.

    Raises:
        ConfigError: a value is out of range, or has no use.
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
    """How many processes read; raises ConfigError."""
    at_least("--workers", parsed.workers, 0)
    return len(os.sched_getaffinity(0)) if parsed.workers is None else int(parsed.workers)


def at_least(option: str, value: int | None, least: int) -> None:
    """Check an option's number, where it is given; raises ConfigError."""
    if value is not None and value < least:
        raise ConfigError(f"{option} {value}: at least {least}")


def require(*libraries: str) -> None:
    """Check that libraries of the extra are installed; raises ConfigError."""
    for name in libraries:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is missing; pip install 'resnext-ignite[imagenet]'")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder, where it is not there, and keep other processes of these commands out of it.

    Raises:
        ConfigError: something that is no folder has that name.
        RunFolderError: another process is at work in it.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--output {folder}: is there already, and is no folder; choose another name") from None
    lock = FileLock(folder / ".lock")
    try:
        # A killed process's workers die a moment after it, and hold the lock till then.
        lock.acquire(timeout=1)
    except Timeout:
        raise RunFolderError(f"{folder}: another process is writing into it; wait for it, or end it") from None
    try:
        yield
    finally:
        lock.release()
