"""Measures the highest operations/s and bytes/s of the machine, and computes a lower bound for a network's time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from resnext_ignite.models.cost import Cost
from resnext_ignite.runtime.devices import DTYPES
from resnext_ignite.runtime.timing import in_turns, kernel_timer


@dataclass(frozen=True)
class Limits:
    """The highest measured rates of the machine, for one precision.

    `flop_per_s` is the operations/s of a large matrix product in this precision. `bytes_per_s` counts the bytes that a
    large copy reads plus the bytes that it writes. `bytes_a_number` is the size of a number in this precision.
    """

    flop_per_s: float
    bytes_per_s: float
    bytes_a_number: int

    def training_s(self, cost: Cost, images: int) -> float:
        """Return a lower bound for the seconds of forward and backward: the larger of compute and memory bound."""
        return images * max(
            cost.training_flop / self.flop_per_s, cost.least_training_bytes(self.bytes_a_number) / self.bytes_per_s
        )

    def forward_s(self, cost: Cost, images: int) -> float:
        """Return a lower bound for the seconds of the forward pass alone."""
        return images * max(
            cost.forward_flop / self.flop_per_s, cost.least_forward_bytes(self.bytes_a_number) / self.bytes_per_s
        )


def measure_limits(device: torch.device, precision: str, rounds: int = 5) -> Limits:
    """Measure matrix products of several sizes and a large copy, and return the best rates over all rounds."""
    dtype = DTYPES[precision]
    gpu = device.type == "cuda"
    sizes, count = ((4096, 8192), 2**30) if gpu else ((1024, 2048, 3072), 2**27)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    contenders = {"copy": kernel_timer(device, lambda: target.copy_(source))}
    for size in sizes:
        left, right = (torch.randn(size, size).to(device, dtype) for _ in range(2))
        contenders[str(size)] = kernel_timer(device, partial(torch.mm, left, right))
    best = {name: min(values) for name, values in in_turns(contenders, rounds).items()}
    # A copy reads and writes each byte.
    return Limits(max(2 * size**3 / best[str(size)] for size in sizes), 2 * count / best["copy"], dtype.itemsize)
