"""Represents a ResNeXt as a structure of layers, without layer names.

This module checks the structure, and returns the weights under the names that this project uses. The readers of Torch7
and Caffe files need it, because these files contain the structure of the network. For files that contain only named
weights, `keys.py` renames the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.weights.foreign.keys import Weights

EPS = 1e-5
"""The epsilon of every BatchNorm in this project: torch's default."""


@dataclass(frozen=True)
class Norm:
    """A BatchNorm in evaluation: (x - mean) / sqrt(var + eps) * weight + bias; each tensor is (C,)."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


def no_norm(channels: int) -> Norm:
    """Return a BatchNorm that changes nothing."""
    zeros, ones = torch.zeros(channels), torch.ones(channels)
    return Norm(zeros, ones, ones, zeros, 0.0)


@dataclass(frozen=True)
class Convolution:
    """A convolution and the BatchNorm after it.

    Args:
        where: says for error messages which layer of the file this is.
        weight: (out, in / groups, kernel, kernel).
        bias: (out,), or None.
        geometry: kernel, stride and padding, each (height, width).
        groups: number of channel groups.
        norm: the BatchNorm; None if the file has no separate BatchNorm, because it is folded into the convolution.
    """

    where: str
    weight: Tensor
    bias: Tensor | None
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    groups: int
    norm: Norm | None


@dataclass(frozen=True)
class Block:
    """A block: the sum of a branch and a shortcut, followed by a ReLU. If `shortcut` is None, it is the identity."""

    where: str
    branch: tuple[Convolution, ...]
    shortcut: Convolution | None


@dataclass(frozen=True)
class Classifier:
    """The last layer: weight (classes, channels), bias (classes,)."""

    weight: Tensor
    bias: Tensor


def weights_of(
    stem: Convolution, blocks: list[Block], classifier: Classifier, *, is_pooled: bool, file: Path
) -> Weights:
    """Return the weights under this project's names. Each block whose shortcut is a convolution begins a stage.

    Args:
        is_pooled: whether a max pooling follows the stem.

    Raises:
        CheckpointError: a layer does not fit a ResNeXt; the message names the layer.
    """
    weights: Weights = {}
    side = stem.weight.shape[-1]
    _add(weights, "conv1", "bn1", stem, side, 2 if side == 7 else 1, file)
    if is_pooled != (side == 7):
        expected = "no max pooling follows" if is_pooled else "a max pooling follows"
        raise CheckpointError(f"{file}: {stem.where}: {expected} a stem of {side}x{side} in a ResNeXt")
    stage, number = 0, 0
    for block in blocks:
        stage, number = (stage + 1, 0) if block.shortcut is not None else (stage, number + 1)
        stride = 2 if stage > 1 and number == 0 else 1
        if len(block.branch) != 3:
            raise CheckpointError(f"{file}: {block.where}: {len(block.branch)} convolutions, where a ResNeXt has 3")
        first, middle, last = block.branch
        if stride == 2 and first.geometry[1] == (2, 2):
            raise CheckpointError(f"{file}: {first.where}: the stride is on the 1x1; a ResNeXt has it on the 3x3")
        name = f"layer{stage}.{number}"
        _add(weights, f"{name}.conv1", f"{name}.bn1", first, 1, 1, file)
        _add(weights, f"{name}.conv2", f"{name}.bn2", middle, 3, stride, file, is_grouped=True)
        _add(weights, f"{name}.conv3", f"{name}.bn3", last, 1, 1, file)
        if block.shortcut is not None:
            _add(weights, f"{name}.downsample.0", f"{name}.downsample.1", block.shortcut, 1, stride, file)
    weights["fc.weight"], weights["fc.bias"] = classifier.weight, classifier.bias
    return weights


def _add(
    weights: Weights,
    name: str,
    norm_name: str,
    layer: Convolution,
    kernel: int,
    stride: int,
    file: Path,
    *,
    is_grouped: bool = False,
) -> None:
    found, padding = layer.geometry, kernel // 2
    if found != ((kernel, kernel), (stride, stride), (padding, padding)):
        raise CheckpointError(
            f"{file}: {layer.where}: kernel, stride and padding {_sizes(found)}, "
            f"where a ResNeXt's {name} has {kernel}x{kernel}, {stride}x{stride}, {padding}x{padding}"
        )
    if layer.groups < 1 or (layer.groups != 1 and not is_grouped):
        raise CheckpointError(f"{file}: {layer.where}: {layer.groups} groups, where a ResNeXt's {name} has 1")
    if is_grouped and layer.weight.shape[1] * layer.groups != layer.weight.shape[0]:
        raise CheckpointError(
            f"{file}: {layer.where}: {layer.groups} groups of {layer.weight.shape[1]} "
            f"do not match its {layer.weight.shape[0]} output channels"
        )
    weights[f"{name}.weight"] = layer.weight
    channels = layer.weight.shape[0]
    norm = layer.norm or no_norm(channels)
    parts = {"mean": norm.mean, "var": norm.var, "weight": norm.weight, "bias": norm.bias}
    if layer.bias is not None:
        parts["convolution's bias"] = layer.bias
    for part, value in parts.items():
        if value.shape != (channels,):
            raise CheckpointError(f"{file}: {layer.where}: {part}: shape {tuple(value.shape)}, not ({channels},)")
    weights[f"{norm_name}.running_mean"] = norm.mean if layer.bias is None else norm.mean - layer.bias
    weights[f"{norm_name}.running_var"] = with_project_eps(norm.var, norm.eps)
    weights[f"{norm_name}.weight"], weights[f"{norm_name}.bias"] = norm.weight, norm.bias


def _sizes(geometry: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in geometry)


def with_project_eps(var: Tensor, eps: float) -> Tensor:
    """Return var + eps - EPS. A BatchNorm with this variance and EPS is the same as one with `var` and `eps`."""
    return (var.double() + (eps - EPS)).float()
