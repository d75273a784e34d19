"""Recognises a network by the shapes of its weights, and checks that all weights fit it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from resnext_ignite.models import create_model
from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.runtime.model_names import depth_of

# The largest number of classes that the config allows (`model.num_classes`).
_MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Network:
    """A network's name, its number of channels after the stem, and its number of classes."""

    name: str
    stem_channels: int
    num_classes: int


def recognise(weights: dict[str, Tensor], file: object) -> Network:
    """Return the network to which the weights belong; the weights must have this project's names.

    Raises:
        CheckpointError: this project has no such network; the message names the weight or the stages that do not fit.
    """
    stem = _shape(weights, "conv1.weight", 4, file)
    grouped = _shape(weights, "layer1.0.conv2.weight", 4, file)
    classes = _shape(weights, "fc.weight", 2, file)[0]
    if not 2 <= classes <= _MOST_CLASSES:
        raise CheckpointError(f"{file}: fc.weight: {classes} classes; a model here has 2 to {_MOST_CLASSES}")
    if stem[2] not in (3, 7):
        raise CheckpointError(f"{file}: conv1.weight: a stem of {stem[2]}x{stem[3]}, where a ResNeXt has 3x3 or 7x7")
    cardinality, rest = divmod(grouped[0], grouped[1])
    # `Architecture.group_width` rounds down, so several base widths may give this group width. Take the smallest.
    base_width = -(-64 * grouped[1] // stem[0])
    if rest:
        raise CheckpointError(
            f"{file}: layer1.0.conv2.weight: {tuple(grouped)} is no grouped 3x3 of a ResNeXt with a stem of {stem[0]}"
        )
    blocks = _blocks(weights)
    layout = "imagenet" if stem[2] == 7 else "cifar" if len(blocks) == 3 else "cifar4"
    depth = depth_of(layout, blocks)
    if depth is None:
        raise CheckpointError(
            f"{file}: stages of {', '.join(map(str, blocks))} blocks are no depth of a {layout} ResNeXt"
        )
    prefix = "" if layout == "imagenet" else f"{layout}_"
    return Network(f"{prefix}resnext{depth}_{cardinality}x{base_width}d", stem[0], classes)


def _shape(weights: dict[str, Tensor], name: str, dimensions: int, file: object) -> torch.Size:
    if name not in weights:
        raise CheckpointError(f"{file}: {name} is missing: not the weights of a ResNeXt")
    if weights[name].ndim != dimensions or 0 in weights[name].shape:
        raise CheckpointError(f"{file}: {name}: shape {tuple(weights[name].shape)} is none of a ResNeXt's")
    return weights[name].shape


def _blocks(weights: dict[str, Tensor]) -> tuple[int, ...]:
    last: dict[int, int] = {}
    for name in weights:
        match = re.match(r"layer(\d+)\.(\d+)\.", name)
        if match is not None:
            last[int(match[1])] = max(last.get(int(match[1]), 0), int(match[2]) + 1)
    return tuple(count for _, count in sorted(last.items()))


def fit_weights(weights: dict[str, Tensor], network: Network, file: object) -> dict[str, Tensor]:
    """Return copies of the weights, in the network's order and in float32.

    The batch counters of BatchNorm (`num_batches_tracked`) are int64. A missing counter becomes 0.

    Raises:
        CheckpointError: a weight is missing, unknown or of another shape; the message names the weight.
    """
    try:
        with torch.device("meta"):
            expected = create_model(network.name, network.num_classes, stem_channels=network.stem_channels).state_dict()
    except ValueError as error:
        raise CheckpointError(f"{file}: no ResNeXt: {error}") from None
    found: dict[str, Tensor] = {}
    for name, whole in expected.items():
        if name.endswith("num_batches_tracked"):
            found[name] = weights.get(name, torch.zeros(())).reshape(()).to(torch.int64)
            continue
        if name not in weights:
            raise CheckpointError(f"{file}: {name} is missing: {network.name} has it")
        value = weights[name]
        if value.shape != whole.shape:
            raise CheckpointError(
                f"{file}: {name}: shape {tuple(value.shape)}, where {network.name} has {tuple(whole.shape)}"
            )
        found[name] = value.detach().to(torch.float32).contiguous().clone()
    for name in weights:
        if name not in expected:
            raise CheckpointError(f"{file}: {name}: {network.name} has no such weight")
    return found
