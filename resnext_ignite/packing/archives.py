"""Reads tar files and folders of images. Tar files are not trusted: a path that leads out of the folder is an error."""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from resnext_ignite.runtime.errors import DataError

_BLOCK = 512


@contextlib.contextmanager
def opened(file: Path | IO[bytes], name: str) -> Iterator[tarfile.TarFile]:
    """Open an uncompressed tar file for the `with` block.

    Args:
        file: path of the tar file, or a stream of its content.
        name: name of the tar file in error messages.

    Raises:
        DataError: the file cannot be opened, is not a tar file, or proves damaged when the `with` block reads it.
    """
    try:
        source = open(file, "rb") if isinstance(file, Path) else contextlib.nullcontext(file)  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        with source as content, tarfile.open(fileobj=content, mode="r:") as archive:
            yield archive
    except (EOFError, tarfile.TarError) as error:
        raise DataError(f"{name}: is damaged or not a tar file: {error}; download it again") from None


def files_in(archive: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    """Yield the files in a tar file, and check at the end that the tar file is complete.

    Raises:
        DataError: the tar file is truncated, or it has a member with a path that leads out of the folder, or a member
            that is neither a file nor a folder.
    """
    for member in archive:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{name}: {member.name}: leads out of the folder; do not trust this file")
        if member.isreg():
            yield member
        elif not member.isdir():
            raise DataError(f"{name}: {member.name}: is neither a file nor a folder; do not trust this file")
    # tarfile stops without an error where the file is truncated or a header is invalid. A complete archive ends with a
    # block of zeros: check that this block is there.
    content = archive.fileobj
    if content is not None:
        content.seek(archive.offset)
        if content.read(_BLOCK) != bytes(_BLOCK):
            raise DataError(f"{name}: is cut short or damaged after {archive.offset} bytes; download it again")


def content_in(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the content of a file in a tar file; raise tarfile.ReadError if the tar file ends inside this file."""
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder that are not hidden, sorted by name.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None
