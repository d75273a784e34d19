"""One picture file on its way to another place: as it is, or shrunk."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from resnext_ignite.data.reading.decoding import no_warnings, open_rgb
from resnext_ignite.packing.options import Encoding
from resnext_ignite.runtime.errors import DataError

_JPEG_SUFFIXES = ("jpg", "jpeg")


def shrunk(path: Path, encoding: Encoding) -> bytes | None:
    """A JPEG file of a picture whose shorter side has `short_side` pixels; None where it has no more as it is.

    Decoded in any case, so that a damaged picture is met now; turned as its EXIF orientation says, in RGB, resized by
    PIL's Lanczos filter, without metadata.

    Raises:
        DataError: as `open_rgb`.
    """
    with no_warnings():
        picture = open_rgb(str(path))
    shorter = min(picture.size)
    if encoding.short_side is None or shorter <= encoding.short_side:
        return None
    width, height = (round(side * encoding.short_side / shorter) for side in picture.size)
    content = io.BytesIO()
    # A comment would go along.
    picture.resize((width, height), Image.Resampling.LANCZOS).save(
        content, "JPEG", quality=encoding.quality, comment=b""
    )
    return content.getvalue()


def read_image(path: Path, encoding: Encoding) -> tuple[bytes, str]:
    """A picture file's content, shrunk where that is asked for, and the ending of a name for it: `jpeg`.

    Raises:
        DataError: it is empty or cannot be read; the line names it.
    """
    suffix = path.suffix[1:].lower()
    if encoding.short_side is not None:
        content = shrunk(path, encoding)
        if content is not None:
            return content, suffix if suffix in _JPEG_SUFFIXES else _JPEG_SUFFIXES[0]
    return content_of(path), suffix


def content_of(path: Path) -> bytes:
    """What is in a file that must not be empty; raises DataError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; remove or replace it") from None
    if not content:
        raise DataError(f"{path}: is empty; remove or replace it")
    return content
