"""The tables of docs/scaling.md: time of a training iteration on many GPUs, from a model of it, not from GPUs.

Usage: python docs/scaling.py [--attained SHARE]     SHARE of the roofline at which a GPU computes, once measured
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import torch

from resnext_ignite.models import create_model
from resnext_ignite.models.cost import cost_of

# An H200: bf16 matrix products and memory as sustained, not as on the data sheet.
FLOPS, MEMORY = 790e12, 4.3e12
GPUS_A_BOX = 8
# Bus bandwidth, as nccl-tests defines it, in bytes/s: 8 GPUs by NVLink 4 (450e9 a direction, ring, at 80 %), and a
# GPU's own 400 Gbit/s InfiniBand card (46 to 48e9: NVIDIA in nccl-tests#290).
NVLINK, NETWORK = 360e9, 47e9
# Start of a collective: in the box, and for each doubling of the boxes. Assumed.
LATENCY_BOX_S, LATENCY_DOUBLING_S = 20e-6, 10e-6
BUCKET = 25 * 2**20
BACKWARD = 2 / 3


@dataclass(frozen=True)
class Workload:
    """A model's cost an image, trained in bf16, and its parameters."""

    name: str
    flop: float
    traffic: float
    parameters: int

    def seconds(self, images: float, attained: float) -> float:
        """Forward and backward of so many images on a GPU that attains a share of its roofline."""
        return images * max(self.flop / FLOPS, self.traffic / MEMORY) / attained


def workload(name: str, image_size: int, num_classes: int) -> Workload:
    """A model's operations and bytes an image, counted on the network."""
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes)
    cost = cost_of(model, image_size)
    return Workload(name, cost.training_flop, cost.training_bytes(2), cost.parameters)


def reduction(size: float, gpus: int) -> float:
    """Seconds of an all-reduce of so many bytes: within each box, then each GPU's part of it between the boxes."""
    inside, boxes = min(gpus, GPUS_A_BOX), math.ceil(gpus / GPUS_A_BOX)
    seconds = 2 * (inside - 1) / inside * size / NVLINK + LATENCY_BOX_S * (inside > 1)
    return seconds + 2 * (boxes - 1) / boxes * size / inside / NETWORK + LATENCY_DOUBLING_S * math.log2(boxes)


def iteration(work: Workload, images_a_gpu: float, gpus: int, attained: float, gradient_bytes: int = 4) -> float:
    """Seconds of an iteration: a bucket of gradients is reduced once the backward pass has filled it, one at a time."""
    compute = work.seconds(images_a_gpu, attained)
    size = work.parameters * gradient_bytes
    buckets = math.ceil(work.parameters * 4 / BUCKET)
    end = 0.0
    for number in range(1, buckets + 1):
        ready = compute * (1 - BACKWARD + BACKWARD * number / buckets)
        end = max(end, ready) + reduction(size / buckets, gpus) * (gpus > 1)
    # The update reads weights, gradients and momenta, and writes two of them.
    return max(end, compute) + 5 * 4 * work.parameters / MEMORY


def table(work: Workload, batch: int, attained: float) -> str:
    """Markdown: at a fixed global batch, and at that batch for each box of eight."""
    lines = [
        f"`{work.name}`: {work.flop / 1e9:.1f} GFLOP and {work.traffic / 1e6:.0f} MB an image, "
        f"{4 * work.parameters / 1e6:.0f} MB of gradients",
        "",
        f"| GPUs | batch {batch}: images a GPU | ms | efficiency | with bf16 gradients "
        f"| {batch} a box: batch | ms | efficiency |",
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
    """Both models, CIFAR's and ImageNet's."""
    cifar = workload("cifar_resnext29_8x64d", 32, 10)
    imagenet = workload("resnext101_64x4d", 224, 1000)
    return f"{table(cifar, 128, attained)}\n\n{table(imagenet, 256, attained)}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The tables of docs/scaling.md.")
    parser.add_argument("--attained", type=float, default=0.4, help="share of the roofline (default: 0.4, assumed)")
    sys.stdout.write(tables(parser.parse_args().attained))
