"""Reads `<split>/shards.json`, the list of the tar shards in the same folder. The packer writes this list."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resnext_ignite.runtime.errors import DataError, data_error

LIST_NAME = "shards.json"


class Shard(BaseModel):
    """A shard: the name of its file, its size in bytes, its number of images, and its sha256 in hexadecimal."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: Annotated[str, Field(pattern=r"^[^/\x00]+\.tar$")]
    bytes: Annotated[int, Field(gt=0)]
    images: Annotated[int, Field(gt=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardList(BaseModel):
    """The shards of a split in order, and the names of the labels."""

    model_config = ConfigDict(strict=True, frozen=True)

    format: Literal[1] = 1
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]


def read_shard_list(path: Path) -> ShardList:
    """Read a `shards.json`.

    Raises:
        DataError: the file is missing, damaged or of another format, or lists a name twice; the message names the
            fault.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: missing: no set of shards, or its packing was interrupted; pack it again") from None
    except OSError as error:
        raise data_error(path, error, "check that it can be read") from None
    try:
        listed = ShardList.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise DataError(f"{path}: {key + ': ' if key else ''}{fault['msg']}; pack the data again") from None
    for key, names in (("classes", listed.classes), ("shards", [shard.name for shard in listed.shards])):
        name, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise DataError(f"{path}: {key}: '{name}' is listed {times} times; pack the data again")
    return listed
