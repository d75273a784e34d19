"""What a safetensors file of this project's states beside the weights: all of a checkpoint that is not a tensor.

Strings, as the format has them, both ways; without the paths of the machine that trained.
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
    """All values of a config by dotted path that others may see: what lay where on this machine is no one's concern."""
    values = flatten(config)
    del values["data.root"]
    if values["model.pretrained"] is not None:
        values["model.pretrained"] = Path(values["model.pretrained"]).name
    return values


def as_strings(metadata: ModelMetadata) -> dict[str, str]:
    """The metadata of a model as a safetensors file holds it; `model_name` and `format` are for other readers."""
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
    """A checkpoint's content but for the weights, of a safetensors file; None where it is not one of this project's.

    Raises:
        CheckpointError: it is of another version, or states what cannot be.
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
    """The network that a file states.

    Raises:
        CheckpointError: there is none such, or it has another number of classes than the file names.
    """
    model = config_of_checkpoint(file, stated).model
    if model.num_classes != len(stated["classes"]):
        raise CheckpointError(
            f"{file}: names {len(stated['classes'])} classes, and its network has {model.num_classes}"
        )
    return Network(model.name, model.stem_channels, len(stated["classes"]))
