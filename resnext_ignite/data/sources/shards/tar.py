"""Finds the files in a plain tar archive from its headers (POSIX.1-1988 ustar), and checks each header.

The standard library's tarfile treats a damaged header as the end of the archive; this module raises an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from resnext_ignite.runtime.errors import DataError, data_error

BLOCK = 512
_END = bytes(BLOCK)
# Minimum number of bytes per read: several blocks, because many members, such as labels, are small.
_AHEAD = 8 * BLOCK
_PLAIN, _EXTENDED = (b"0", b"\0"), (b"x", b"g")
# Keys of an extended header (POSIX.1-2001 pax) that change the name, size or kind of a member. Other keys are ignored.
_DECISIVE = (b" path=", b" size=", b" linkpath=", b" GNU.sparse")


class Member(NamedTuple):
    """A file in an archive: its name, and the offset and size of its content in bytes."""

    name: str
    offset: int
    size: int


def header_name(header: bytes) -> str:
    """Return the name in a member's header (512 bytes)."""
    name, prefix = (os.fsdecode(part.split(b"\0")[0]) for part in (header[:100], header[345:500]))
    return f"{prefix}/{name}" if prefix else name


class Tar:
    """An archive that is read in parts. Use it as a context manager, which closes the file.

    Raises:
        DataError: the archive cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise data_error(path, error) from None
        self.path, self.bytes = path, os.fstat(self._file.fileno()).st_size
        self._start, self._held = 0, b""
        with contextlib.suppress(OSError):
            # On slow storage, one pass over all bytes takes less time than a separate read of each header.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def __enter__(self) -> Tar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes at `offset`.

        Raises:
            DataError: the archive is too short, or cannot be read.
        """
        if not self._start <= offset <= offset + length <= self._start + len(self._held):
            if offset + length > self.bytes:
                raise DataError(f"{self.path}: cut short: ends at byte {self.bytes}; pack or copy it again")
            try:
                self._start, self._held = offset, os.pread(self._file.fileno(), max(length, _AHEAD), offset)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read at byte {offset}: {error.strerror}") from None
        return self._held[offset - self._start : offset - self._start + length]

    def members(self) -> Iterator[Member]:
        """Yield all files, in the order of the archive.

        Raises:
            DataError: a header is damaged, a member is no plain file, or the end of the archive is missing.
        """
        offset = 0
        while (header := self.read(offset, BLOCK)) != _END:
            kind = header[156:157]
            try:
                size, checksum = (int(part.strip(b"\0 "), 8) for part in (header[124:136], header[148:156]))
            except ValueError:
                size, checksum = -1, -1
            # The checksum counts its own eight bytes as spaces.
            if size < 0 or checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
                raise DataError(f"{self.path}: damaged: no header at byte {offset}; pack or copy it again")
            offset += BLOCK
            if kind in _PLAIN:
                yield Member(header_name(header), offset, size)
            elif kind not in _EXTENDED or size > _AHEAD or any(key in self.read(offset, size) for key in _DECISIVE):
                raise DataError(f"{self.path}:{header_name(header)}: not a plain file; pack the data again")
            offset += -(-size // BLOCK) * BLOCK
