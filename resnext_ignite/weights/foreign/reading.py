"""Reads checkpoints of other systems: recognises the system, renames the weights and fits them to a network.

It runs no code from the file. An error names the weight that does not fit.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnext_ignite.runs.checkpoint import verify_archive
from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.weights.foreign import signatures
from resnext_ignite.weights.foreign.keys import (
    GLUONCV,
    MXNET,
    PYTORCH_CIFAR100,
    RESNEXT_PYTORCH,
    TORCHVISION,
    without_prefixes,
)
from resnext_ignite.weights.foreign.metadata import OWN, metadata_in, network_from_metadata
from resnext_ignite.weights.foreign.recognition import fit_weights, recognise
from resnext_ignite.weights.foreign.systems import SYSTEMS, ForeignModel


def read_foreign(file: Path, source: str = "auto") -> ForeignModel:
    """Read the model in a file that another system wrote, or that this project exported as safetensors.

    Args:
        source: one of SYSTEMS; "auto": recognise the system from the file.

    Raises:
        CheckpointError: the file cannot be read, its system is unknown, or its weights do not fit a ResNeXt.
    """
    if source == "auto" and file.suffix == ".safetensors":
        weights, _ = state_of(load_tensors(file), file)
        stated = metadata_in(file)
        if stated is not None:
            network = network_from_metadata(stated, file)
            return ForeignModel(
                OWN, network, fit_weights(weights, network, file), stated["mean"], stated["std"], stated
            )
    if source == "auto":
        source = format_of(file) or source
    # Import the reader of a binary format only if such a file is opened: Caffe's reader needs protobuf.
    if source == "torch7":
        from resnext_ignite.weights.foreign.torch7_network import read_torch7

        renamed = read_torch7(file)
    elif source == "caffe":
        from resnext_ignite.weights.foreign.caffe_network import read_caffe

        renamed = read_caffe(file)
    else:
        source, renamed = renamed_weights(file, source)
    system = SYSTEMS[source]
    system.adapt(renamed)
    # Call `statistics` before `fit_weights`: for MXNet, `statistics` removes the BatchNorm that normalises the images.
    # This project's networks have no such layer.
    mean, std = system.statistics(renamed, file) or (system.mean, system.std)
    network = recognise(renamed, file)
    return ForeignModel(source, network, fit_weights(renamed, network, file), mean, std)


def format_of(file: Path) -> str | None:
    """Return "torch7" or "caffe", recognised by the file's first bytes or suffix; None for a file of named weights.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if file.suffix == ".safetensors":
        return None
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None
    if start in signatures.TORCH7 or file.suffix == ".t7":
        return "torch7"
    if start.startswith(signatures.CAFFE) or file.suffix == ".caffemodel":
        return "caffe"
    return None


def renamed_weights(file: Path, source: str) -> tuple[str, dict[str, Tensor]]:
    """Return the system that wrote a file of named weights, and the weights under this project's names.

    Raises:
        CheckpointError: the file cannot be read, or holds a name that the system does not use.
    """
    weights, wrapped = state_of(load_tensors(file), file)
    if source == "auto":
        source = recognise_system(weights, wrapped=wrapped, file=file)
    naming = SYSTEMS[source].naming
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        ours = None if naming is None else naming.to_project(name)
        if ours is None:
            raise CheckpointError(f"{file}: {name}: {source} has no such weight in a ResNeXt; try another --from")
        renamed[ours] = value
    return source, renamed


def load_tensors(file: Path) -> Any:
    """Load a file that safetensors, MXNet or torch.save wrote, without running code from it.

    Raises:
        CheckpointError: the file cannot be read, or contains objects that are neither tensors nor plain values.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with file.open("rb") as opened:
            is_params = opened.read(len(signatures.MXNET)) == signatures.MXNET
        if is_params:
            from resnext_ignite.weights.foreign.mxnet_file import load_params

            return load_params(file)
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
    """Return the weights in a file's content, and whether they were in an outer dictionary.

    The prefixes that wrappers such as DataParallel add to the names are removed.

    Raises:
        CheckpointError: the content holds no weights, or a value among the weights is not a tensor.
    """
    wrapped = False
    # Prefer the moving average of the weights, as timm's own loading does.
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


def recognise_system(weights: Mapping[str, Tensor], *, wrapped: bool, file: Path) -> str:
    """Return the system that gives its weights these names.

    Args:
        wrapped: whether the weights were in an outer dictionary.

    Raises:
        CheckpointError: no known system uses these names.
    """
    if RESNEXT_PYTORCH.marker in weights:
        # ResNeXt.pytorch and pytorch-classification use the same names. Only pytorch-classification puts the weights
        # into an outer dictionary.
        return "pytorch-classification" if wrapped else "resnext.pytorch"
    if PYTORCH_CIFAR100.marker in weights:
        return "pytorch-cifar100"
    if MXNET.marker in weights:
        return "mxnet"
    if GLUONCV.marker in weights:
        return "gluoncv"
    if TORCHVISION.marker in weights:
        return "torchvision"
    first = next(iter(weights))
    raise CheckpointError(f"{file}: {first}: no known system gives this name to a weight of a ResNeXt; set --from")
