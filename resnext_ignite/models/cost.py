"""What a network costs an image: operations, bytes and parameters, counted without computing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Of each activation, unfused: written and read in the forward pass, read twice and written in the backward.
_PASSES_OVER_ACTIVATIONS = 5


@dataclass(frozen=True)
class Cost:
    """Of one image; a multiply-add is two operations.

    Args:
        forward_flop: operations of the forward pass; the backward's are twice as many.
        activations: numbers that the layers put out.
        convolved: those of them that convolutions and the classifier do; all that fusing leaves.
        parameters: of the network, whatever the images.
    """

    forward_flop: int
    activations: int
    convolved: int
    parameters: int

    @property
    def multiply_adds(self) -> int:
        """Of the forward pass: what papers call FLOPs."""
        return self.forward_flop // 2

    @property
    def training_flop(self) -> int:
        """Operations of forward and backward."""
        return 3 * self.forward_flop

    def training_bytes(self, bytes_a_number: int) -> int:
        """Bytes of activations that forward and backward move where every layer reads and writes memory."""
        return _PASSES_OVER_ACTIVATIONS * bytes_a_number * self.activations

    def least_training_bytes(self, bytes_a_number: int) -> int:
        """As `training_bytes`, where everything between convolutions is fused with them."""
        return _PASSES_OVER_ACTIVATIONS * bytes_a_number * self.convolved

    def least_forward_bytes(self, bytes_a_number: int) -> int:
        """Bytes that a forward pass writes and reads where all that can be is fused."""
        return 2 * bytes_a_number * self.convolved


def cost_of(model: nn.Module, image_size: int) -> Cost:
    """A network's cost at pictures of `image_size` pixels a side; takes it to the `meta` device, without weights."""
    return costs_of(model, image_size, ("",))[""]


def costs_of(model: nn.Module, image_size: int, names: Sequence[str]) -> dict[str, Cost]:
    """As `cost_of`, of modules by their names; "" is the whole network."""
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
