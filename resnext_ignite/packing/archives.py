"""Tar files and folders as what they hold: pictures with plain names. Nothing in them decides where anything goes."""

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
    """A plain tar file; what is wrong with it, here or while it is read, is said with its name.

    Raises:
        DataError: it is none, or damaged.
    """
    try:
        source = open(file, "rb") if isinstance(file, Path) else contextlib.nullcontext(file)  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        with source as content, tarfile.open(fileobj=content, mode="r:") as archive:
            yield archive
    except (EOFError, tarfile.TarError) as error:
        raise DataError(f"{name}: is damaged or no tar file: {error}; fetch it again") from None


def files_in(archive: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    """The files in a tar file that was `opened`, which must end as one does.

    Raises:
        DataError: it is cut short, or holds a name that leads elsewhere, or something that is neither file nor folder.
    """
    for member in archive:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{name}: {member.name}: leads out of the folder; do not trust this file")
        if member.isreg():
            yield member
        elif not member.isdir():
            raise DataError(f"{name}: {member.name}: is neither a file nor a folder; do not trust this file")
    # tarfile takes the end of a file, and a header that is none, for the end of the archive.
    content = archive.fileobj
    if content is not None:
        content.seek(archive.offset)
        if content.read(_BLOCK) != bytes(_BLOCK):
            raise DataError(f"{name}: is cut short or damaged after {archive.offset} bytes; fetch it again")


def content_in(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Of a file in a tar file; raises tarfile.ReadError where that ends before it."""
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name, but for what is hidden; raises DataError."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None
