"""Reads image files for the commands that pack and unpack data, and shrinks large images if requested."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from resnext_ignite.data.reading.decoding import no_warnings, open_rgb
from resnext_ignite.packing.options import Encoding
from resnext_ignite.runtime.errors import DataError

_JPEG_SUFFIXES = ("jpg", "jpeg")


def shrunk(path: Path, encoding: Encoding) -> bytes | None:
    """Shrink an image to `short_side` pixels on its shorter side, and return it as the content of a JPEG file.

    Return None if the image is not larger. Decode the image in this case too, to find a damaged image now. The shrunk
    image is in RGB, upright according to the EXIF orientation of the file, resized with PIL's Lanczos filter, and
    without metadata.

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
    # An empty comment: otherwise PIL copies the comment of the original file.
    picture.resize((width, height), Image.Resampling.LANCZOS).save(
        content, "JPEG", quality=encoding.quality, comment=b""
    )
    return content.getvalue()


def read_image(path: Path, encoding: Encoding) -> tuple[bytes, str]:
    """Return the content of an image file, and a suffix for the file name, such as `jpeg`.

    If the image is larger than `encoding` allows, the content is the shrunk image as a JPEG file.

    Raises:
        DataError: the file is empty or cannot be read; the message names it.
    """
    suffix = path.suffix[1:].lower()
    if encoding.short_side is not None:
        content = shrunk(path, encoding)
        if content is not None:
            return content, suffix if suffix in _JPEG_SUFFIXES else _JPEG_SUFFIXES[0]
    return content_of(path), suffix


def content_of(path: Path) -> bytes:
    """Return the content of a file; raise DataError if it is empty or cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; remove or replace it") from None
    if not content:
        raise DataError(f"{path}: is empty; remove or replace it")
    return content
