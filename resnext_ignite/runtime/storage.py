"""Files that are whole or absent, whenever power fails. What is in them is for others to know."""

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
    """Where a file is written until it is whole."""
    return path.with_name(f".{path.name}.tmp")


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
    """`replace_durably` with a content that is at hand; text as UTF-8."""
    written = content.encode() if isinstance(content, str) else content

    def write(file: IO[bytes]) -> None:
        file.write(written)

    replace_durably(path, write, before_rename)


def append_durably(path: Path, line: str) -> None:
    """Add a line to a text file; once this returns it survives a power failure.

    Raises:
        OSError: the line may stand there in part.
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
    """Name a file in an error of the system: what fails on an open file does not know its name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


class HashingFile:
    """A file that keeps the sha256 of all that is written to it, and the error that ended the writing."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash; keeps what fails."""
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """As the file's own."""
        self.file.flush()


def sha256_of(path: Path, *, from_disk: bool = False) -> str:
    """Of a file, in hexadecimal; `from_disk`: past what the system holds in memory, as far as it grants that."""
    with name_file_in_errors(path), path.open("rb") as file:
        if from_disk:
            # Else the system answers from its memory what the disk was told to keep. It is a request: some file systems
            # do not know it.
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_place(option: str, path: Path, *, new: bool = False) -> None:
    """Whether a command can write a file where it is told to, before it does all its work.

    Args:
        new: no file may be there, whose content would be lost.

    Raises:
        ConfigError: there is no such folder, or something that is in the way.
    """
    try:
        if not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it first")
        if new and path.is_file():
            raise ConfigError(f"{option} {path}: is there already; choose another name")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{option} {path}: is there already, and is no file; choose another name")
    except OSError as error:
        # A name that is too long, for one.
        raise ConfigError(f"{option} {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def warn_on_failure(what: str) -> Iterator[None]:
    """Let an error of writing something that a run can do without be a warning."""
    try:
        yield
    except OSError as error:
        log.warning(f"{what} could not be written ({error.strerror or error}); training goes on")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
