"""How far from the machine's limits: its rates, measured, and the time that a network needs at them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resnext_ignite.models.cost import Cost
from resnext_ignite.timing import in_turns, medians, timed

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Limits:
    """Operations/s of a large matrix product at some precision, and bytes/s of a large copy (read and written)."""

    flop_per_s: float
    bytes_per_s: float
    bytes_a_number: int

    def training_s(self, cost: Cost, images: int) -> float:
        """The least time of forward and backward: the larger of the two bounds."""
        return images * max(
            cost.training_flop / self.flop_per_s, cost.training_bytes(self.bytes_a_number) / self.bytes_per_s
        )

    def forward_s(self, cost: Cost, images: int) -> float:
        """Of the forward pass alone."""
        return images * max(
            cost.forward_flop / self.flop_per_s, cost.forward_bytes(self.bytes_a_number) / self.bytes_per_s
        )


def measure_limits(device: torch.device, precision: str, rounds: int = 5) -> Limits:
    """The rates of this machine now, each the median of some rounds."""
    dtype = _DTYPES[precision]
    size, numbers = (8192, 2**30) if device.type == "cuda" else (2048, 2**27)
    left, right = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    source = torch.zeros(numbers, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    contenders = {
        "product": lambda: timed(device, lambda: torch.mm(left, right)),
        "copy": lambda: timed(device, lambda: target.copy_(source)),
    }
    seconds = medians(in_turns(contenders, rounds))
    return Limits(2 * size**3 / seconds["product"], 2 * numbers / seconds["copy"], dtype.itemsize)
