"""Prepares a network for export: sets evaluation mode and, on request, folds BatchNorms and adds the normalisation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shape_config
from torch.nn import functional as F

from resnext_ignite.data.augment.chain import Color, normalize
from resnext_ignite.models.grouped_conv import GroupedConv2d
from resnext_ignite.models.inference import fold_batch_norm
from resnext_ignite.models.resnext import ResNeXt

# (N, C, H, W) of the traced images. N, H and W are arbitrary, but not 1: tracing treats a size of 1 as a constant.
_TRACED = (2, 3, 96, 112)


class NormalizeUint8(nn.Module):
    """Normalises images and applies a network to them: uint8 RGB (N, 3, H, W) -> logits (N, num_classes).

    The normalisation is (value / 255 - mean) / std.

    Args:
        network: takes normalised images, float32 (N, 3, H, W).
        mean, std: mean and standard deviation of red, green and blue, for values from 0 to 1.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, mean: Color, std: Color) -> None:
        super().__init__()
        self.network = network
        # (value / 255 - mean) / std = value * scale + shift: one product and one sum for each value. Both buffers are
        # (1, 3, 1, 1).
        self.register_buffer("scale", (1 / (255 * torch.tensor(std))).view(1, 3, 1, 1))
        self.register_buffer("shift", (-torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (N, 3, H, W) to logits (N, num_classes)."""
        return self.network(images.float() * self.scale + self.shift)


class EvenMaxPool2d(nn.Module):
    """The stem's 3x3 max pooling with stride 2, with the padding in a separate step. No input value may be negative.

    If the pooling itself pads, torch.export derives a condition on whether the input's sides are even or odd. It then
    rejects dynamic sizes. Here, each padded side is 2n + 1 with n = ceil(side / 2), which is always odd. This class
    pads with zeros instead of minus infinity. The result is the same, because no input value is negative.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, ceil(H / 2), ceil(W / 2)). The input must be the output of a ReLU."""
        height, width = x.shape[2:]
        # Pad one row above, and one row below if H is odd; this gives 2 * ceil(H / 2) + 1 rows. The columns are padded
        # in the same way.
        below, right = 2 * ((height + 1) // 2) - height, 2 * ((width + 1) // 2) - width
        return F.max_pool2d(F.pad(x, (1, right, 1, below)), 3, 2)


def prepare_for_export(model: nn.Module, mean: Color, std: Color, *, uint8: bool, fold: bool) -> nn.Module:
    """Return a copy of the model for export, with torch's own implementation of grouped convolutions (`grouped`).

    `uint8` and `fold` have the same meaning as in `Options` (`formats.py`).
    """
    network = fold_batch_norm(model) if fold else copy.deepcopy(model).eval()
    for module in network.modules():
        if isinstance(module, GroupedConv2d):
            module.way, module.merge = "grouped", 1
    network = NormalizeUint8(network, mean, std) if uint8 else network
    return network.eval().requires_grad_(False)


def traced_images(*, uint8: bool) -> Tensor:
    """Return the images for tracing a network: zeros, uint8 or float32 (2, 3, 96, 112)."""
    return torch.zeros(_TRACED, dtype=torch.uint8 if uint8 else torch.float32)


def reference(model: nn.Module, images: Tensor, mean: Color, std: Color) -> Tensor:
    """Return the model's own logits in eager mode. The images (N, 3, H, W) are uint8, or normalised float32."""
    if images.dtype == torch.uint8:
        images = normalize(images.permute(0, 2, 3, 1), mean, std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return model.eval()(images)


def program_of(network: nn.Module, *, uint8: bool) -> ExportedProgram:
    """Export the network with torch.export, for any batch size, height and width."""
    sizes = {0: Dim("batch", min=1), 2: Dim("height", min=1), 3: Dim("width", min=1)}
    # Without this setting, torch.export rejects images so small that the last feature map is a single pixel.
    with shape_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(
            _with_even_max_pool(network), (traced_images(uint8=uint8),), dynamic_shapes={"images": sizes}
        )
    for node in program.graph.nodes:
        # Remove the stack traces, which hold local paths.
        node.meta.pop("stack_trace", None)
    return program


def _with_even_max_pool(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        if isinstance(module, ResNeXt) and isinstance(module.maxpool, nn.MaxPool2d):
            module.add_module("maxpool", EvenMaxPool2d())
    return network
