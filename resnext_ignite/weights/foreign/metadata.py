"""Writes and reads the metadata of this project's safetensors files: everything about a model except its tensors.

In safetensors, metadata are strings. Local paths of the machine that trained the model are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, Json, ValidationError
from safetensors import safe_open

from resnext_ignite.config.schema import Config, Values, flatten, nest
from resnext_ignite.runs.checkpoint import ModelMetadata, config_of_checkpoint
from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.weights.foreign.recognition import Network

OWN = "resnext_ignite"
_VERSION = "1"


class _Stated(BaseModel):
    classes: Json[list[str]]
    mean: Json[tuple[float, float, float]]
    std: Json[tuple[float, float, float]]
    image_size: Json[Annotated[int, Field(ge=8, le=1024)]]
    iteration: Json[int]
    errors: Json[dict[str, Any]]
    selection: Json[str]
    source: Json[str | None]
    config: Json[dict[str, Any]]


def public_values(config: Config) -> Values:
    """Return a config's values by dotted key (such as `data.name`), without local file paths.

    `data.root` is left out. Only the last part of the path in `model.pretrained` remains.
    """
    values = flatten(config)
    del values["data.root"]
    if values["model.pretrained"] is not None:
        values["model.pretrained"] = Path(values["model.pretrained"]).name
    return values


def as_strings(metadata: ModelMetadata) -> dict[str, str]:
    """Return a model's metadata as strings for a safetensors file. `model_name` and `format` are for other programs."""
    stated = {
        "classes": metadata.classes,
        "mean": metadata.mean,
        "std": metadata.std,
        "image_size": metadata.image_size,
        "iteration": metadata.iteration,
        "errors": metadata.errors,
        "selection": metadata.selection,
        "source": metadata.source,
        "config": nest(public_values(metadata.config)),
    }
    return {
        "format": "pt",
        OWN: _VERSION,
        "model_name": metadata.config.model.name,
        **{key: json.dumps(value, ensure_ascii=False) for key, value in stated.items()},
    }


def metadata_in(file: Path) -> dict[str, Any] | None:
    """Return everything except the weights from a safetensors file that this project wrote; None for other files.

    The result has the structure of a checkpoint.

    Raises:
        CheckpointError: the metadata has another version, or a value is missing or invalid.
    """
    with safe_open(file, "pt") as content:
        strings = content.metadata() or {}
    if OWN not in strings:
        return None
    if strings[OWN] != _VERSION:
        raise CheckpointError(f"{file}: its metadata are of version {strings[OWN]!r}, not {_VERSION!r}")
    try:
        stated = _Stated.model_validate(strings)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{file}: its metadata: {first['loc'][0]}: {first['msg']}") from None
    values = stated.model_dump()
    return {**values, "trainer": {"iteration": values.pop("iteration")}}


def network_from_metadata(stated: dict[str, Any], file: Path) -> Network:
    """Return the network that the metadata of a file (`metadata_in`) describes.

    Raises:
        CheckpointError: the config is invalid, or its number of classes differs from the number of class names.
    """
    model = config_of_checkpoint(file, stated).model
    if model.num_classes != len(stated["classes"]):
        raise CheckpointError(
            f"{file}: names {len(stated['classes'])} classes, and its network has {model.num_classes}"
        )
    return Network(model.name, model.stem_channels, len(stated["classes"]))
