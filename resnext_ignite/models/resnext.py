"""Defines the network: bottleneck blocks in one of several layouts. The classes take plain values, not a config.

Parameter names are torchvision's (`layer1.0.conv2.weight`, `fc.bias`), so that torchvision's weights need no renaming.
`runtime/model_names.py` parses the names of models; `models/__init__.py` builds models from names and configs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnext_ignite.models.grouped_conv import GroupedConv2d

Norm = Callable[[int], nn.BatchNorm2d]


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that computes its training statistics over consecutive groups of `ghost_batch` images.

    The published CIFAR runs split 128 images over 8 GPUs, so that BatchNorm computed its statistics over 16 images.
    Each group updates its own copy of the running statistics. The new running statistics are the mean of these copies.
    A run with one group per rank gets the same result if it averages the running statistics over the ranks. In
    evaluation, this is plain BatchNorm.

    Args:
        channels: number of channels C of the input.
        ghost_batch: images per group; the size of every training batch must be a multiple of it.
    """

    def __init__(self, channels: int, ghost_batch: int) -> None:
        super().__init__(channels)
        self.ghost_batch = ghost_batch

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, H, W).

        Raises:
            ValueError: N is not a multiple of `ghost_batch` in training.
        """
        n = len(input)
        if not self.training or n == self.ghost_batch:
            return super().forward(input)
        if n % self.ghost_batch:
            raise ValueError(f"a batch of {n} images does not divide into ghost batches of {self.ghost_batch}")
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        groups = n // self.ghost_batch
        mean, var = self.running_mean.repeat(groups), self.running_var.repeat(groups)
        # On a GPU, calls are expensive, so a single call normalises all groups. This call needs copies, which are
        # expensive on a CPU: with channels_last, one call per group takes a third of the time of the single call.
        out = (
            self._one_call_per_group(input, mean, var)
            if input.device.type == "cpu"
            else self._one_call(input, mean, var)
        )
        with torch.no_grad():
            self.running_mean.copy_(mean.view(groups, -1).mean(0))
            self.running_var.copy_(var.view(groups, -1).mean(0))
            self.num_batches_tracked.add_(1)
        return out

    def _one_call_per_group(self, input: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalise each group in a separate call; update mean and var (G*C,) in place, as `_one_call` does."""
        groups = zip(input.split(self.ghost_batch), mean.split(input.shape[1]), var.split(input.shape[1]), strict=True)
        return torch.cat(
            [
                F.batch_norm(group, m, v, self.weight, self.bias, True, self.momentum or 0.0, self.eps)
                for group, m, v in groups
            ]
        )

    def _one_call(self, input: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        n, c, h, w = input.shape
        groups = n // self.ghost_batch
        # (G*B, C, H, W) -> (B, G*C, H, W). In this shape, a single call computes separate statistics for each group.
        apart = input.view(groups, self.ghost_batch, c, h, w).transpose(0, 1).reshape(self.ghost_batch, -1, h, w)
        weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
        out = F.batch_norm(apart, mean, var, weight, bias, True, self.momentum or 0.0, self.eps)
        # (B, G*C, H, W) -> (G*B, C, H, W)
        together = out.view(self.ghost_batch, groups, c, h, w).transpose(0, 1).reshape(n, c, h, w)
        if input.is_contiguous(memory_format=torch.channels_last):
            return together.contiguous(memory_format=torch.channels_last)
        return together


class Bottleneck(nn.Module):
    """A bottleneck block: convolutions 1x1, grouped 3x3 (with the stride) and 1x1, each followed by BatchNorm.

    A ReLU follows the first and the second BatchNorm. The last ReLU follows the sum with the shortcut, as in
    facebookresearch/ResNeXt. This is the block of the paper's figure 3c and section 4. The shortcut is the identity, or
    a 1x1 convolution with BatchNorm if the shapes of input and output differ (type B).

    Args:
        in_channels, out_channels: channels of the block's input and output.
        width: channels of the 3x3, in all groups together.
        cardinality: number of groups of the 3x3.
        stride: stride of the 3x3.
        norm: function that takes a number of channels and returns a new BatchNorm.
        way: implementation of the 3x3 (`grouped_conv.py`).
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int, cardinality: int, stride: int, norm: Norm, way: str
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = GroupedConv2d(width, cardinality, stride, way)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + shortcut, inplace=True)


def _stride(stage: int, block: int) -> int:
    # Every stage but the first halves height and width, in its first block.
    return 2 if stage > 0 and block == 0 else 1


class ResNeXt(nn.Module):
    """A ResNeXt in one of three layouts.

    Args:
        layout: "imagenet" (a 7x7 stem with stride 2 and a max pooling); "cifar" or "cifar4" (a 3x3 stem).
        blocks: number of blocks of each stage; every stage but the first halves height and width.
        planes: planes of each stage: a quarter of the channels that the stage outputs.
        group_widths: channels per group in each stage's 3x3.
        cardinality: number of groups.
        num_classes: number of outputs.
        ghost_batch: number of images over which BatchNorm computes its training statistics; 0: the whole batch.
        zero_init_residual: initialise the weight of each block's last BatchNorm to 0.
        grouped_conv: implementations of the grouped 3x3 (`grouped_conv.py`): one for all shapes, or one for each shape
            in the order of the forward pass. The first stage has one shape. Each later stage has one shape in its first
            block, which has the stride, and another shape in its other blocks, if there are any.

    Raises:
        ValueError: `grouped_conv` holds neither one implementation nor one for each shape.
    """

    def __init__(
        self,
        *,
        layout: str,
        blocks: tuple[int, ...],
        planes: tuple[int, ...],
        group_widths: tuple[int, ...],
        cardinality: int,
        num_classes: int,
        ghost_batch: int = 0,
        zero_init_residual: bool = False,
        grouped_conv: tuple[str, ...] = ("grouped",),
    ) -> None:
        super().__init__()
        shapes = dict.fromkeys(
            (stage, _stride(stage, block)) for stage, count in enumerate(blocks) for block in range(count)
        )
        ways = dict(zip(shapes, grouped_conv * len(shapes) if len(grouped_conv) == 1 else grouped_conv, strict=True))

        def norm(channels: int) -> nn.BatchNorm2d:
            return GhostBatchNorm2d(channels, ghost_batch) if ghost_batch else nn.BatchNorm2d(channels)

        channels = planes[0]
        imagenet = layout == "imagenet"
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = norm(channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()
        self.stages: list[str] = []
        for stage, (count, stage_planes, group_width) in enumerate(zip(blocks, planes, group_widths, strict=True)):
            layers = []
            for block in range(count):
                stride, width, out_channels = _stride(stage, block), group_width * cardinality, stage_planes * 4
                way = ways[stage, stride]
                layers.append(Bottleneck(channels, out_channels, width, cardinality, stride, norm, way))
                channels = out_channels
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self._frozen: tuple[str, ...] = ()
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        # As in facebookresearch/ResNeXt, models/resnext.lua. Convolutions: a normal distribution with mean 0 and
        # variance 2 / (k*k*out), where `out` counts the output channels of all groups, as torch's `fan_out` does.
        # BatchNorm: weight 1 and bias 0. Classifier: torch's default weight, and bias 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck) and zero_init_residual:
                nn.init.zeros_(module.bn3.weight)
        nn.init.zeros_(self.fc.bias)

    def freeze(self, part: str) -> None:
        """Freeze the weights and statistics of a part: "none", "stem" or "backbone" (all but `fc`)."""
        stem = ("conv1", "bn1")
        self._frozen = {"none": (), "stem": stem, "backbone": (*stem, *self.stages)}[part]
        for name in self._frozen:
            self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ResNeXt:
        """Set the mode of all parts that are not frozen; frozen parts stay in evaluation mode.

        In evaluation mode, BatchNorm uses its running statistics and does not change them.
        """
        super().train(mode)
        for name in self._frozen:
            self.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) for normalised images (N, 3, H, W) with sides of 8 to 1024 pixels."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        # (N, C, H', W') -> (N, C)
        return self.fc(self.avgpool(x).flatten(1))
