"""Counts a network's operations, bytes and parameters for one image.

The network runs on the `meta` device, where tensors have no values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Training accesses memory five times for each activation: one write and one read in the forward pass, two reads and one
# write in the backward pass.
_PASSES_OVER_ACTIVATIONS = 5


@dataclass(frozen=True)
class Cost:
    """The cost for one image; a multiply-add counts as two operations.

    Args:
        forward_flop: operations of the forward pass; the backward pass has twice as many.
        activations: total number of values that the layers output.
        convolved: number of values that the convolutions and the classifier output. Only these values go through memory
            if all the remaining layers are fused with the convolutions and the classifier.
        parameters: number of parameters; it does not depend on the image.
    """

    forward_flop: int
    activations: int
    convolved: int
    parameters: int

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the forward pass; papers call them FLOPs."""
        return self.forward_flop // 2

    @property
    def training_flop(self) -> int:
        """Operations of the forward and the backward pass."""
        return 3 * self.forward_flop

    def training_bytes(self, bytes_a_number: int) -> int:
        """Return the bytes of activations that the forward and the backward pass access, if no layers are fused."""
        return _PASSES_OVER_ACTIVATIONS * bytes_a_number * self.activations

    def least_training_bytes(self, bytes_a_number: int) -> int:
        """Return `training_bytes` for the outputs of the convolutions and the classifier only.

        This is the result if all the remaining layers are fused with them.
        """
        return _PASSES_OVER_ACTIVATIONS * bytes_a_number * self.convolved

    def least_forward_bytes(self, bytes_a_number: int) -> int:
        """Return the bytes of activations that a forward pass accesses, with fusion as in `least_training_bytes`."""
        return 2 * bytes_a_number * self.convolved


def cost_of(model: nn.Module, image_size: int) -> Cost:
    """Return a network's cost for an image of `image_size` pixels a side.

    The network moves to the `meta` device and loses its weights.
    """
    return costs_of(model, image_size, ("",))[""]


def costs_of(model: nn.Module, image_size: int, names: Sequence[str]) -> dict[str, Cost]:
    """Return the cost of each module in `names`, counted as in `cost_of`; the name "" means the whole network."""
    activations, convolved = Counter[str](), Counter[str]()
    model = model.to("meta").eval()

    def counter_of(leaf: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        around = [name for name in names if not name or f"{leaf}.".startswith(f"{name}.")]

        def count(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            for name in around:
                activations[name] += output.numel()
                convolved[name] += output.numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0

        return count

    hooks = [
        module.register_forward_hook(counter_of(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    for hook in hooks:
        hook.remove()
    flop = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    costs = {}
    for name in names:
        path = f"{type(model).__name__}.{name}".rstrip(".")
        parameters = sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
        costs[name] = Cost(flop.get(path, 0), activations[name], convolved[name], parameters)
    return costs
