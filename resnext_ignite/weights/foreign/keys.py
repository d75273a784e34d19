"""Translates names of weights between other systems and this project."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Statistics = tuple[float, float, float]
"""One value each for red, green and blue."""
_PREFIXES = ("module.", "_orig_mod.")


def without_prefixes(weights: Mapping[str, Tensor]) -> Weights:
    """Remove the prefixes that DataParallel, DistributedDataParallel and torch.compile add to all names."""
    plain = dict(weights)
    for _ in range(len(_PREFIXES)):
        for prefix in _PREFIXES:
            if plain and all(name.startswith(prefix) for name in plain):
                plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain


@dataclass(frozen=True)
class Naming:
    """A naming scheme for the weights of a ResNeXt.

    Args:
        marker: name of a weight that occurs only in this scheme; a file that has it uses this scheme.
        rules: pairs (pattern, replacement). The pattern matches names of the scheme; the replacement gives this
            project's name.
        back: pairs in the other direction, from this project's names to the scheme's names. Empty if this project
            writes no files with this scheme.
    """

    marker: str
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
    back: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = ()

    def to_project(self, name: str) -> str | None:
        """Return this project's name for a weight; None if no rule matches."""
        return _renamed(name, self.rules)

    def from_project(self, name: str) -> str | None:
        """Return the scheme's name for a weight of this project; None if no rule matches."""
        return _renamed(name, self.back)


def _renamed(name: str, rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]) -> str | None:
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return replacement(match) if callable(replacement) else match.expand(replacement)
    return None


_OURS = r"((?:conv1|bn1|fc)\.\w+|layer\d+\.\d+\.(?:conv[123]|bn[123]|downsample\.[01])\.\w+)"
# For each module in a block: this project's name, and ResNeXt.pytorch's name.
_PARTS = {
    "conv1": "conv_reduce",
    "bn1": "bn_reduce",
    "conv2": "conv_conv",
    "bn2": "bn",
    "conv3": "conv_expand",
    "bn3": "bn_expand",
    "downsample.0": "shortcut.shortcut_conv",
    "downsample.1": "shortcut.shortcut_bn",
}
_FROM_PARTS = {theirs: ours for ours, theirs in _PARTS.items()}
# For each module in a block: its position in the Sequential of weiaicunzai/pytorch-cifar100, and this project's name.
_SPLIT_PARTS = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}

TORCHVISION = Naming("layer1.0.conv2.weight", ((_OURS, r"\1"),), ((_OURS, r"\1"),))
RESNEXT_PYTORCH = Naming(
    "stage_1.stage_1_bottleneck_0.conv_conv.weight",
    (
        (r"conv_1_3x3\.(\w+)", r"conv1.\1"),
        (r"bn_1\.(\w+)", r"bn1.\1"),
        (r"classifier\.(\w+)", r"fc.\1"),
        (
            rf"stage_(\d)\.stage_\1_bottleneck_(\d+)\.({'|'.join(map(re.escape, _FROM_PARTS))})\.(\w+)",
            lambda match: f"layer{match[1]}.{match[2]}.{_FROM_PARTS[match[3]]}.{match[4]}",
        ),
    ),
    (
        (r"conv1\.(\w+)", r"conv_1_3x3.\1"),
        (r"bn1\.(\w+)", r"bn_1.\1"),
        (r"fc\.(\w+)", r"classifier.\1"),
        (
            rf"layer([123])\.(\d+)\.({'|'.join(map(re.escape, _PARTS))})\.(\w+)",
            lambda match: f"stage_{match[1]}.stage_{match[1]}_bottleneck_{match[2]}.{_PARTS[match[3]]}.{match[4]}",
        ),
    ),
)
PYTORCH_CIFAR100 = Naming(
    "conv2.0.split_transforms.3.weight",
    (
        (r"conv1\.0\.(\w+)", r"conv1.\1"),
        (r"conv1\.1\.(\w+)", r"bn1.\1"),
        (r"fc\.(\w+)", r"fc.\1"),
        (
            r"conv([2-5])\.(\d+)\.split_transforms\.([013467])\.(\w+)",
            lambda match: f"layer{int(match[1]) - 1}.{match[2]}.{_SPLIT_PARTS[match[3]]}.{match[4]}",
        ),
        (
            r"conv([2-5])\.(\d+)\.shortcut\.([01])\.(\w+)",
            lambda match: f"layer{int(match[1]) - 1}.{match[2]}.downsample.{match[3]}.{match[4]}",
        ),
    ),
)
# Names in the symbol zoo of MXNet's example/image-classification (symbols/resnext.py), without `arg:` and `aux:`.
_MXNET_PARTS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}
_MXNET_NORM = rf"({'|'.join(_MXNET_PARTS)})"
_MXNET_BLOCK = r"stage([1-9])_unit([1-9]\d?)"
MXNET = Naming(
    "stage1_unit1_conv2_weight",
    (
        (r"conv0_weight", "conv1.weight"),
        (r"fc1_(weight|bias)", r"fc.\1"),
        (rf"bn0_{_MXNET_NORM}", lambda match: f"bn1.{_MXNET_PARTS[match[1]]}"),
        (rf"bn_data_{_MXNET_NORM}", lambda match: f"bn_data.{_MXNET_PARTS[match[1]]}"),
        (rf"{_MXNET_BLOCK}_conv([123])_weight", lambda m: f"layer{m[1]}.{int(m[2]) - 1}.conv{m[3]}.weight"),
        (rf"{_MXNET_BLOCK}_sc_weight", lambda m: f"layer{m[1]}.{int(m[2]) - 1}.downsample.0.weight"),
        (
            rf"{_MXNET_BLOCK}_bn([123])_{_MXNET_NORM}",
            lambda m: f"layer{m[1]}.{int(m[2]) - 1}.bn{m[3]}.{_MXNET_PARTS[m[4]]}",
        ),
        (
            rf"{_MXNET_BLOCK}_sc_bn_{_MXNET_NORM}",
            lambda m: f"layer{m[1]}.{int(m[2]) - 1}.downsample.1.{_MXNET_PARTS[m[3]]}",
        ),
    ),
)
_GLUON_PARTS = {"gamma": "weight", "beta": "bias"}
_GLUON_VALUE = r"(weight|bias|gamma|beta|running_mean|running_var)"
# Names in gluoncv/model_zoo/resnext.py. The positions in a block's Sequential are the same as in pytorch-cifar100.
GLUONCV = Naming(
    "features.4.0.body.3.weight",
    (
        (r"features\.0\.weight", "conv1.weight"),
        (r"output\.(weight|bias)", r"fc.\1"),
        (rf"features\.1\.{_GLUON_VALUE}", lambda m: f"bn1.{_GLUON_PARTS.get(m[1], m[1])}"),
        (
            rf"features\.([4-7])\.(\d\d?)\.body\.([013467])\.{_GLUON_VALUE}",
            lambda m: f"layer{int(m[1]) - 3}.{int(m[2])}.{_SPLIT_PARTS[m[3]]}.{_GLUON_PARTS.get(m[4], m[4])}",
        ),
        (
            rf"features\.([4-7])\.(\d\d?)\.downsample\.([01])\.{_GLUON_VALUE}",
            lambda m: f"layer{int(m[1]) - 3}.{int(m[2])}.downsample.{m[3]}.{_GLUON_PARTS.get(m[4], m[4])}",
        ),
    ),
)


def spread_first_convolutions(weights: Weights) -> None:
    """Replace the first 1x1 convolution of each block, in place, with an equivalent convolution without groups.

    In pytorch-cifar100, this convolution has groups, like the 3x3. In the new weight, each entry that connects an input
    channel and an output channel of different groups is zero.
    """
    for name in [name for name in weights if name.startswith("layer") and name.endswith(".conv1.weight")]:
        block = name.removesuffix("conv1.weight")
        shortcut, last = weights.get(f"{block}downsample.0.weight"), weights.get(f"{block}conv3.weight")
        # A block without a convolution in its shortcut has as many output channels as input channels.
        in_channels = 0 if last is None else last.shape[0] if shortcut is None else shortcut.shape[1]
        width = weights[name].shape[1]
        if width and in_channels % width == 0 and weights[name].shape[0] % (in_channels // width) == 0:
            weights[name] = _without_groups(weights[name], in_channels)


def _without_groups(weight: Tensor, in_channels: int) -> Tensor:
    # (out, in / groups, 1, 1) -> (out, in, 1, 1)
    whole = torch.zeros(weight.shape[0], in_channels, *weight.shape[2:], dtype=weight.dtype)
    width = weight.shape[1]
    groups = in_channels // width
    for group, (rows, part) in enumerate(zip(whole.chunk(groups), weight.chunk(groups), strict=True)):
        rows[:, group * width : (group + 1) * width] = part
    return whole
