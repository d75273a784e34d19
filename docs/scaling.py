"""Tables of docs/scaling.md: the time of a training iteration on many GPUs, computed from a model, not measured.

Usage: python docs/scaling.py [--attained FRACTION]     FRACTION of the roofline that a GPU attains, once measured
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import torch

from resnext_ignite.models import create_model
from resnext_ignite.models.cost import cost_of

# Sustained rates of an H200, not those of its data sheet: bf16 matrix products in operations/s, memory in bytes/s.
FLOPS, MEMORY = 790e12, 4.3e12
GPUS_A_BOX = 8
# Bus bandwidth as nccl-tests defines it, in bytes/s. NVLINK: 8 GPUs with NVLink 4 (450e9 in each direction, ring, at
# 80 %). NETWORK: one 400 Gbit/s InfiniBand card for each GPU (46 to 48e9: NVIDIA in nccl-tests#290).
NVLINK, NETWORK = 360e9, 47e9
# Assumed latency of a collective: within a machine, and for each doubling of the number of machines.
LATENCY_BOX_S, LATENCY_DOUBLING_S = 20e-6, 10e-6
# Bytes of a DistributedDataParallel bucket.
BUCKET = 25 * 2**20
# Fraction of the compute that the backward pass takes.
BACKWARD = 2 / 3


@dataclass(frozen=True)
class Workload:
    """A model's cost per image when trained in bf16: operations, bytes of activations; and its number of parameters."""

    name: str
    flop: float
    traffic: float
    parameters: int

    def seconds(self, images: float, attained: float) -> float:
        """Return the seconds of forward and backward on a GPU that attains the fraction `attained` of its roofline."""
        return images * max(self.flop / FLOPS, self.traffic / MEMORY) / attained


def workload(name: str, image_size: int, num_classes: int) -> Workload:
    """Count a model's operations and bytes per image, and its parameters."""
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes)
    cost = cost_of(model, image_size)
    return Workload(name, cost.training_flop, cost.training_bytes(2), cost.parameters)


def reduction(size: float, gpus: int) -> float:
    """Return the seconds of an all-reduce of `size` bytes: within each machine, then between machines."""
    inside, boxes = min(gpus, GPUS_A_BOX), math.ceil(gpus / GPUS_A_BOX)
    seconds = 2 * (inside - 1) / inside * size / NVLINK + LATENCY_BOX_S * (inside > 1)
    # Each GPU's card carries its part of the bytes between the machines.
    return seconds + 2 * (boxes - 1) / boxes * size / inside / NETWORK + LATENCY_DOUBLING_S * math.log2(boxes)


def iteration(work: Workload, images_a_gpu: float, gpus: int, attained: float, gradient_bytes: int = 4) -> float:
    """Return the seconds of an iteration.

    A bucket of gradients is reduced when the backward pass has filled it; the buckets are reduced one at a time.
    """
    compute = work.seconds(images_a_gpu, attained)
    size = work.parameters * gradient_bytes
    buckets = math.ceil(work.parameters * 4 / BUCKET)
    end = 0.0
    for number in range(1, buckets + 1):
        ready = compute * (1 - BACKWARD + BACKWARD * number / buckets)
        end = max(end, ready) + reduction(size / buckets, gpus) * (gpus > 1)
    # The update reads weights, gradients and momenta, and writes weights and momenta: five passes over fp32 values.
    return max(end, compute) + 5 * 4 * work.parameters / MEMORY


def table(work: Workload, batch: int, attained: float) -> str:
    """Return a Markdown table: a fixed global batch of `batch` images, and `batch` images per machine of eight GPUs."""
    lines = [
        f"`{work.name}`: {work.flop / 1e9:.1f} GFLOP and {work.traffic / 1e6:.0f} MB per image, "
        f"{4 * work.parameters / 1e6:.0f} MB of gradients",
        "",
        f"| GPUs | global batch {batch}: images per GPU | ms | efficiency | with bf16 gradients "
        f"| {batch} images per machine: global batch | ms | efficiency |",
        "|---|---|---|---|---|---|---|---|",
    ]
    alone = iteration(work, batch, 1, attained) / batch
    for gpus in (1, 8, 16, 32, 64, 128, 256, 512, 1024):
        cells = [str(gpus)]
        if gpus <= batch:
            plain, small = (iteration(work, batch / gpus, gpus, attained, size) for size in (4, 2))
            shares = [f"{100 * alone * batch / gpus / seconds:.0f} %" for seconds in (plain, small)]
            cells += [f"{batch / gpus:g}", f"{1e3 * plain:.2f}", *shares]
        else:
            cells += [""] * 4
        a_gpu = batch / GPUS_A_BOX
        if gpus >= GPUS_A_BOX:
            weak = iteration(work, a_gpu, gpus, attained)
            cells += [f"{a_gpu * gpus:g}", f"{1e3 * weak:.2f}", f"{100 * alone * a_gpu / weak:.0f} %"]
        else:
            cells += [""] * 3
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(attained: float) -> str:
    """Return the tables of both models, one for CIFAR and one for ImageNet."""
    cifar = workload("cifar_resnext29_8x64d", 32, 10)
    imagenet = workload("resnext101_64x4d", 224, 1000)
    return f"{table(cifar, 128, attained)}\n\n{table(imagenet, 256, attained)}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The tables of docs/scaling.md.")
    parser.add_argument("--attained", type=float, default=0.4, help="share of the roofline (default: 0.4, assumed)")
    sys.stdout.write(tables(parser.parse_args().attained))
