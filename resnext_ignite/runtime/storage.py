"""Writes files durably: even after a power failure, a file has either its complete old or its complete new content."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from resnext_ignite.runtime.errors import ConfigError

log = logging.getLogger(__name__)


def temporary_path(path: Path) -> Path:
    """Return the path under which a file is written until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def replace_durably(
    path: Path, write: Callable[[IO[bytes]], None], before_rename: Callable[[Path], None] | None = None
) -> None:
    """Replace a file; even after a power failure, it has either its complete old or its complete new content.

    Args:
        write: writes the content to the new file.
        before_rename: called with the temporary path of the new file, after the file is synced.

    Raises:
        OSError: the write failed, and the old file is unchanged; or the file is replaced, but the sync of its folder
            failed.
    """
    temporary = temporary_path(path)
    with name_file_in_errors(path):
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if before_rename is not None:
                before_rename(temporary)
            temporary.replace(path)
        except BaseException:
            # A second error must not hide the first one.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_durably(path: Path, content: str | bytes, before_rename: Callable[[Path], None] | None = None) -> None:
    """Replace the content of a file durably (see `replace_durably`); text is encoded as UTF-8."""
    written = content.encode() if isinstance(content, str) else content

    def write(file: IO[bytes]) -> None:
        file.write(written)

    replace_durably(path, write, before_rename)


def append_durably(path: Path, line: str) -> None:
    """Append a line to a text file; once this function has returned, the line survives a power failure.

    Raises:
        OSError: the write failed; a part of the line may be in the file.
    """
    with name_file_in_errors(path):
        new = not path.exists()
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            _sync_folder(path.parent)


@contextlib.contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Add the file name to any OSError raised in the `with` block that has none.

    Python does not set the file name if an operation on an open file fails.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


class HashingFile:
    """A file wrapper that computes the sha256 of all written data, and stores the error of a failed write."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Hash and write the data; store the error if the write fails."""
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def sha256_of(path: Path, *, from_disk: bool = False) -> str:
    """Return the sha256 of a file, in hexadecimal.

    Args:
        from_disk: read from the disk, not from the page cache, where the file system supports it.
    """
    with name_file_in_errors(path), path.open("rb") as file:
        if from_disk:
            # Drop the file from the page cache. Otherwise, the system would return its copy in memory, which may be
            # correct although the data on the disk is damaged. Some file systems ignore this call.
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output_path(option: str, path: Path, *, new: bool = False) -> None:
    """Check, before a command starts its work, that it can write its output to a path.

    Args:
        option: the command-line option that set the path, for the message.
        new: the file must not exist yet.

    Raises:
        ConfigError: the folder does not exist; the path exists and is not a file; the file exists already, and `new`
            is set; or the system rejects the path.
    """
    try:
        if not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: the folder {path.parent} does not exist; create it first")
        if new and path.is_file():
            raise ConfigError(f"{option} {path}: exists already; choose another name")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{option} {path}: exists already, and is not a file; choose another name")
    except OSError as error:
        # For example, a name that is too long.
        raise ConfigError(f"{option} {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def warn_on_failure(what: str) -> Iterator[None]:
    """Turn any OSError raised in the `with` block into a warning; use it only for files that the run does not need."""
    try:
        yield
    except OSError as error:
        log.warning(f"{what} could not be written ({error.strerror or error}); training continues")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
