"""Defines the grouped 3x3 convolution in several implementations. `training/tuning.py` measures which is fastest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MOST_SPLIT_GROUPS = 16


class GroupedConv2d(nn.Conv2d):
    """A grouped 3x3 convolution with equal numbers of input and output channels, in one of several implementations.

    - `grouped`: torch's own grouped convolution.
    - `split`: a separate dense convolution for each group.
    - `merged<m>`: merges every m groups into one wider group. The weight of a wider group has the weights of its m
      groups as blocks on the diagonal, and zeros elsewhere. This implementation needs m times as many operations as
      `grouped`. `merged<cardinality>` is a dense convolution.

    All implementations compute the same function, with the same weights under the same names.

    Args:
        channels: number of input channels and of output channels.
        groups: cardinality.
        stride: stride of the convolution.
        way: name of the implementation, from the list above.

    Raises:
        ValueError: the m of `merged<m>` does not divide the number of groups.
    """

    def __init__(self, channels: int, groups: int, stride: int, way: str = "grouped") -> None:
        super().__init__(channels, channels, 3, stride, padding=1, groups=groups, bias=False)
        self.way = way
        self.merge = int(way.removeprefix("merged")) if way.startswith("merged") else 1
        if groups % self.merge:
            raise ValueError(f"'{way}': {self.merge} does not divide {groups} groups")

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, ceil(H / stride), ceil(W / stride))."""
        if self.way == "split" and self.groups > 1:
            biases = (None,) * self.groups if self.bias is None else self.bias.chunk(self.groups)
            parts = zip(input.chunk(self.groups, 1), self.weight.chunk(self.groups, 0), biases, strict=True)
            return torch.cat([F.conv2d(*part, self.stride, self.padding) for part in parts], 1)
        if self.merge > 1:
            merged, groups = self._merged_weight(), self.groups // self.merge
            return F.conv2d(input, merged, self.bias, self.stride, self.padding, groups=groups)
        return super().forward(input)

    def _merged_weight(self) -> Tensor:
        # There are G merged groups of m original groups. An original group has i input and o output channels.
        # (G*m*o, i, 3, 3) -> (G, m, o, 1, i, 3, 3); the product with the (m, m) identity is (G, m, o, m, i, 3, 3)
        # -> (G*m*o, m*i, 3, 3)
        apart = self.weight.view(self.groups // self.merge, self.merge, -1, 1, *self.weight.shape[1:])
        identity = torch.eye(self.merge, dtype=self.weight.dtype, device=self.weight.device)
        merged = apart * identity.view(1, self.merge, 1, self.merge, 1, 1, 1)
        merged = merged.reshape(self.weight.shape[0], -1, *self.weight.shape[2:])
        if self.weight.is_contiguous(memory_format=torch.channels_last):
            return merged.contiguous(memory_format=torch.channels_last)
        return merged


def implementations_for(groups: int, channels: int) -> list[str]:
    """Return the names of the implementations that are worth measuring. The first is always `grouped`.

    Args:
        groups: number of groups.
        channels: number of channels per group.
    """
    merges = [m for m in (2, 4, 8, 16, 32, 64) if groups % m == 0 and m * channels <= 512]
    return ["grouped"] + ["split"] * (1 < groups <= _MOST_SPLIT_GROUPS) + [f"merged{m}" for m in merges]


def in_each_implementation(convolution: GroupedConv2d) -> dict[str, GroupedConv2d]:
    """Return copies of a convolution with the same weights: one per name in `implementations_for`, by this name."""
    channels, groups = convolution.in_channels, convolution.groups
    modules = {}
    for way in implementations_for(groups, channels // groups):
        modules[way] = GroupedConv2d(channels, groups, convolution.stride[0], way)
        modules[way].load_state_dict(convolution.state_dict())
    return modules


@dataclass(frozen=True)
class GroupedShape:
    """A shape (channels, input side, stride) that occurs among the grouped 3x3 convolutions of a network.

    Args:
        name: name of the first module with this shape.
        module: that module.
        size: side in pixels of the module's input.
    """

    name: str
    module: GroupedConv2d
    size: int


def grouped_shapes(model: nn.Module, image_size: int) -> list[GroupedShape]:
    """Return each shape of a network's grouped 3x3 convolutions once, in the order of the forward pass.

    Args:
        image_size: side of the input images in pixels.
    """
    found: dict[tuple[int, ...], GroupedShape] = {}
    names = {module: name for name, module in model.named_modules()}

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, GroupedConv2d)
        shape = GroupedShape(names[module], module, inputs[0].shape[2])
        found.setdefault((module.in_channels, shape.size, *module.stride), shape)

    hooks = [module.register_forward_pre_hook(see) for module in names if isinstance(module, GroupedConv2d)]
    training = model.training
    device = next(model.parameters()).device
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return list(found.values())
