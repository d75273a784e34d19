"""Describes a network as a table of costs and receptive fields.

The rows of the table are the stem, the max pooling (if there is one), each block, and the classifier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnext_ignite.models.cost import Cost, costs_of
from resnext_ignite.models.memory import inference_peak_bytes, kept_bytes
from resnext_ignite.models.resnext import ResNeXt

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """A part of a network, with its costs for one image.

    Args:
        name: name of a block's module; "stem", "max pooling" or "classifier" for the other parts.
        kernels: convolutions and poolings in order, such as "1x1, 3x3 / 2 in 32 groups, 1x1"; "/ 2" means stride 2.
        output: shape of the part's output: (channels, height, width), or (classes,).
        cost: cost of this part.
        kept: bytes that the forward pass of this part saves for the backward pass, in fp32.
        receptive_field: side in pixels of the receptive field of one output. The classifier has the same value as the
            last block.
    """

    name: str
    kernels: str
    output: tuple[int, ...]
    cost: Cost
    kept: int
    receptive_field: int


@dataclass(frozen=True)
class Layers:
    """The table of a network: its rows, and values for the whole network. All values are for one image.

    Args:
        rows: parts of the network, in the order of the forward pass.
        cost: cost of the whole network.
        kept: bytes that the forward pass saves for the backward pass, by precision.
        inference_peak: peak memory of the image and its activations in inference, in bytes, by precision.
    """

    rows: tuple[Row, ...]
    cost: Cost
    kept: dict[str, int]
    inference_peak: dict[str, int]

    @property
    def receptive_field(self) -> int:
        """Side in pixels of the receptive field of one output of the last block."""
        return self.rows[-1].receptive_field


def layers_of(model: ResNeXt, image_size: int) -> Layers:
    """Return the table of a network for an image of `image_size` pixels a side.

    The network moves to the `meta` device and loses its weights.
    """
    parts = _parts(model)
    modules = [name for names in parts.values() for name in names]
    costs = costs_of(model, image_size, ("", *modules))
    outputs = _outputs(model, image_size, modules)
    begins = {names[0]: row for row, names in parts.items()}
    kept = {name: kept_bytes(model, image_size, dtype, begins) for name, dtype in _PRECISIONS.items()}
    fields = receptive_fields(model, modules)
    rows = tuple(
        Row(
            name=row,
            kernels=", ".join(_window(m) for name in names for m in _windows(model.get_submodule(name))),
            output=outputs[names[-1]],
            cost=_sum([costs[name] for name in names]),
            kept=kept["fp32"][row],
            receptive_field=fields[names[-1]],
        )
        for row, names in parts.items()
    )
    peaks = {name: inference_peak_bytes(model, image_size, dtype) for name, dtype in _PRECISIONS.items()}
    return Layers(rows, costs[""], {name: sum(of_row.values()) for name, of_row in kept.items()}, peaks)


def receptive_fields(model: ResNeXt, names: list[str]) -> dict[str, int]:
    """Return the receptive field of each module: the side, in pixels, of the square that one output value depends on.

    Let r be this side, and j the distance in pixels between neighbouring outputs. Both are 1 for the image itself. A
    window of side k and stride s first adds (k - 1) * j to r, and then multiplies j by s (Araujo, Norris and Sim,
    "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019, equation 2). In a block, only the
    branch counts, because the receptive field of the shortcut is smaller. A receptive field may extend beyond the edge
    of the image, into the padding.

    Args:
        names: names of the modules, in the order of the forward pass.
    """
    side = jump = 1
    fields = {}
    for name in names:
        for window in _windows(model.get_submodule(name)):
            side += (_pair(window.kernel_size)[0] - 1) * jump
            jump *= _pair(window.stride)[0]
        fields[name] = side
    return fields


def _parts(model: ResNeXt) -> dict[str, tuple[str, ...]]:
    """Return the modules of each row, in the order of the forward pass."""
    stem: dict[str, tuple[str, ...]] = {"stem": ("conv1", "bn1")}
    if isinstance(model.maxpool, nn.MaxPool2d):
        stem["max pooling"] = ("maxpool",)
    blocks = [f"{stage}.{name}" for stage in model.stages for name, _ in model.get_submodule(stage).named_children()]
    return {**stem, **{block: (block,) for block in blocks}, "classifier": ("avgpool", "fc")}


def _windows(module: nn.Module) -> list[nn.Conv2d | nn.MaxPool2d]:
    # Skip a block's shortcut: its receptive field is smaller than the branch's.
    named = module.named_modules()
    return [m for name, m in named if isinstance(m, nn.Conv2d | nn.MaxPool2d) and not name.startswith("downsample")]


def _window(module: nn.Conv2d | nn.MaxPool2d) -> str:
    side, stride = _pair(module.kernel_size)[0], _pair(module.stride)[0]
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    return f"{side}x{side}" + (f" / {stride}" if stride > 1 else "") + (f" in {groups} groups" if groups > 1 else "")


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else value


def _outputs(model: nn.Module, image_size: int, names: list[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    by_module = {model.get_submodule(name): name for name in names}

    def see(module: nn.Module, inputs: object, output: Tensor) -> None:
        shapes[by_module[module]] = tuple(output.shape[1:])

    hooks = [module.register_forward_hook(see) for module in by_module]
    model(torch.empty(1, 3, image_size, image_size, device="meta"))
    for hook in hooks:
        hook.remove()
    return shapes


def _sum(costs: list[Cost]) -> Cost:
    return Cost(
        sum(cost.forward_flop for cost in costs),
        sum(cost.activations for cost in costs),
        sum(cost.convolved for cost in costs),
        sum(cost.parameters for cost in costs),
    )
