"""Checkpoints that other systems wrote: recognised, renamed, fitted to a network; and written back for them.

Reading is `read_foreign`, writing `renamed_for`; `open_model` takes any file, ours or theirs. What a file holds is
verified before it is believed: nothing in it is run, and a weight that does not fit is named.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnext_ignite.checkpoint import ModelMetadata, find_checkpoint, load_model, model_of, verify_archive
from resnext_ignite.errors import CheckpointError, ForeignFileError
from resnext_ignite.foreign.adopted import checkpoint_of
from resnext_ignite.foreign.fit import fitted, recognise
from resnext_ignite.foreign.keys import PYTORCH_CIFAR100, SEED, TORCHVISION, without_prefixes
from resnext_ignite.foreign.sources import SOURCES, TARGETS, ForeignModel

__all__ = ["SOURCES", "TARGETS", "ForeignModel", "checkpoint_of", "open_model", "read_foreign", "renamed_for"]


def open_model(path: Path) -> tuple[nn.Module, ModelMetadata]:
    """As `load_model`, of a file that another system wrote, too.

    Raises:
        CheckpointError: it can be used as neither.
    """
    try:
        return load_model(path)
    except ForeignFileError:
        file = find_checkpoint(path)
        return model_of(checkpoint_of(read_foreign(file)), file)


def read_foreign(file: Path, source: str = "auto") -> ForeignModel:
    """The model in a file that another system wrote.

    Args:
        source: one of SOURCES; "auto": told by the file.

    Raises:
        CheckpointError: it cannot be read, is of no system known here or of several, or does not fit a ResNeXt.
    """
    content = load_tensors(file)
    weights, wrapped = state_of(content, file)
    if source == "auto":
        source = told_by(weights, wrapped=wrapped, file=file)
    naming = SOURCES[source].naming
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        ours = naming.to_ours(name)
        if ours is None:
            raise CheckpointError(f"{file}: {name}: {source} has no such weight in a ResNeXt; try another --from")
        renamed[ours] = value
    SOURCES[source].adapt(renamed)
    network = recognise(renamed, file)
    return ForeignModel(source, network, fitted(renamed, network, file), SOURCES[source].mean, SOURCES[source].std)


def load_tensors(file: Path) -> Any:
    """What a .safetensors file holds, or a file that torch.save wrote; nothing in it is run.

    Raises:
        CheckpointError: it cannot be read, or holds more than tensors and plain values.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        if zipfile.is_zipfile(file):
            verify_archive(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{file}: no file of weights ({reason})") from None


def state_of(content: Any, file: Path) -> tuple[dict[str, Tensor], bool]:
    """The weights in a file's content, without the prefixes of wrappers, and whether a dictionary held them.

    Raises:
        CheckpointError: there are none.
    """
    wrapped = False
    # timm prefers its moving average, as its own loading does.
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content, wrapped = content[key], True
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{file}: holds no weights, but {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {name}: is {type(value).__name__}, not a weight")
    return without_prefixes(content), wrapped


def told_by(weights: Mapping[str, Tensor], *, wrapped: bool, file: Path) -> str:
    """The system that names its weights so.

    Raises:
        CheckpointError: none does.
    """
    if SEED.marker in weights:
        # Both name alike; only pytorch-classification keeps more than the weights in its files.
        return "pytorch-classification" if wrapped else "seed"
    if PYTORCH_CIFAR100.marker in weights:
        return "pytorch-cifar100"
    if TORCHVISION.marker in weights:
        return "torchvision"
    first = next(iter(weights))
    raise CheckpointError(f"{file}: {first}: no system known here names a ResNeXt's weights so; say --from")


def renamed_for(target: str, weights: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """A model's weights under another system's names.

    Raises:
        CheckpointError: that system has no such network; the line names the first weight that says so.
    """
    renamed = {}
    for name, value in weights.items():
        theirs = TARGETS[target].from_ours(name)
        if theirs is None:
            raise CheckpointError(f"{file}: {name}: {target} has no such weight")
        renamed[theirs] = value
    return renamed
