"""Measures the images/s of inference, for each implementation of this project and for torchvision's network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resnext_ignite.benchmark.limits import measure_limits
from resnext_ignite.benchmark.peers import torchvision_network
from resnext_ignite.benchmark.processes import Turn, in_processes
from resnext_ignite.benchmark.setup import measured_device, random_batch
from resnext_ignite.benchmark.training import OURS, Workload
from resnext_ignite.models import create_model
from resnext_ignite.models.cost import cost_of
from resnext_ignite.models.inference import Inference
from resnext_ignite.runtime.devices import place, set_up_machine
from resnext_ignite.runtime.timing import in_turns, medians, timed


def time_inference(work: Workload, way: str) -> Turn:
    """Return a function that measures the seconds per batch of one implementation of this project's inference."""
    device = measured_device()
    set_up_machine(device, deterministic=device.type == "cpu")
    network = Inference(_network(work, device), torch.bfloat16, way)
    network.refresh()
    return _repeated(work, device, network, channels_last=True)


def time_torchvision(work: Workload, dtype: torch.dtype, channels_last: bool, autocast: bool) -> Turn:
    """Return a function that measures the seconds per batch of torchvision's network.

    Args:
        dtype: the precision of autocast or, without autocast, of the weights and the images.
    """
    device = measured_device()
    torch.backends.cudnn.benchmark = True
    model = place(torchvision_network(work.model, work.num_classes), device, channels_last=channels_last).eval()
    if not autocast:
        model.to(dtype)

    @torch.inference_mode()
    def forward(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=autocast):
            return model(images if autocast else images.to(dtype)).float()

    return _repeated(work, device, forward, channels_last=channels_last)


def _network(work: Workload, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return place(create_model(work.model, work.num_classes), device, channels_last=True).eval()


def _repeated(
    work: Workload, device: torch.device, network: Callable[[Tensor], Tensor], *, channels_last: bool
) -> Turn:
    batch = random_batch(work.batch_size, work.image_size, work.num_classes, device, channels_last=channels_last)

    def run() -> None:
        for _ in range(work.iterations):
            network(batch.images)

    return lambda: timed(device, run) / work.iterations


def measure_evaluation(work: Workload, rounds: int = 5) -> dict[str, Any]:
    """Measure the images/s of inference, and how much each implementation's bf16 logits differ from fp32 logits.

    `plain` differs only because of the precision, bf16. Its difference is the reference for the other two differences.
    """
    device = measured_device()
    makers: dict[str, Callable[[], Turn]] = {
        f"{OURS}, {way}": partial(time_inference, work, way) for way in ("plain", "folded", "compiled")
    }
    makers |= {
        f"torchvision, {name}": partial(time_torchvision, work, *setting)
        for name, setting in {
            "fp32": (torch.float32, False, False),
            "autocast bf16, channels_last": (torch.bfloat16, True, True),
            "bf16, channels_last": (torch.bfloat16, True, False),
        }.items()
    }
    with in_processes(makers) as ways:
        seconds = in_turns(dict(ways), rounds, f"eval, {work.model}", warm_up=False)
        limits = measure_limits(device, "bf16")
    samples = {name: [work.batch_size / value for value in values] for name, values in seconds.items()}
    speeds = medians(samples)
    best = max(speed for name, speed in speeds.items() if name.startswith(OURS))
    best_peer = max(speed for name, speed in speeds.items() if name.startswith("torchvision"))
    least = limits.forward_s(cost_of(create_model(work.model, work.num_classes), work.image_size), work.batch_size)
    return {
        "unit": "images/s",
        "model": work.model,
        "batch_size": work.batch_size,
        "image_size": work.image_size,
        "differences": differences(work),
        "failed": ways.failed,
        "samples": samples,
        "ratios": {
            "eval_vs_torchvision": best / best_peer,
            "eval_folded_vs_torchvision": speeds[f"{OURS}, folded"] / best_peer,
            "eval_default_vs_torchvision": speeds[f"{OURS}, plain"] / best_peer,
            "eval_of_limit": best * least / work.batch_size,
        },
    }


def differences(work: Workload) -> dict[str, float]:
    """Return ||bf16 logits - fp32 logits|| / ||fp32 logits|| for each of this project's implementations."""
    device = measured_device()
    set_up_machine(device, deterministic=device.type == "cpu")
    model = _network(work, device)
    # Use the same batch size as in the measurement: for this size, torch.compile has already cached its code on disk.
    images = random_batch(work.batch_size, work.image_size, work.num_classes, device, channels_last=True).images
    reference = Inference(model)(images)
    found = {}
    for way in ("plain", "folded", "compiled"):
        difference = Inference(model, torch.bfloat16, way)(images) - reference
        found[way] = float(difference.norm() / reference.norm())
    return found
