"""Measures how fast this project and torchvision make training batches from images in memory (images/s)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.images import Images
from resnext_ignite.data.loaders import TrainLoader
from resnext_ignite.data.sampling import TrainOrder
from resnext_ignite.data.sources.cifar import MEAN, STD
from resnext_ignite.runtime import devices
from resnext_ignite.runtime.timing import in_turns, medians

_IMAGES = 10_000
_BATCH = 128


def measure_data(rounds: int = 5) -> dict[str, Any]:
    """Measure the images/s of this project's loader, and of a DataLoader with torchvision's transforms.

    Both make float32 batches on the CPU from the same uint8 images of CIFAR's size: they crop with 4 pixels of padding,
    flip and normalise.
    """
    devices.set_up_machine(torch.device("cpu"), deterministic=True)
    pixels = np.random.default_rng(0).integers(0, 256, (_IMAGES, 32, 32, 3), dtype=np.uint8)
    labels = torch.zeros(_IMAGES, dtype=torch.int64)
    chain = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    class PilImages(Dataset[Any]):
        """Passes PIL images to the transforms, as torchvision's CIFAR10 does."""

        def __len__(self) -> int:
            return _IMAGES

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return chain(Image.fromarray(pixels[index])), 0

    loaders = {
        f"torchvision, {workers} workers": DataLoader(
            PilImages(), _BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
        )
        for workers in sorted({0, 2, len(os.sched_getaffinity(0))})
    }
    images = Images(torch.from_numpy(pixels), labels, torch.arange(_IMAGES))
    augment = Augment(1, MEAN, STD, crop_padding=4, flip="random")
    ours = TrainLoader(images, TrainOrder(seed=1, count=_IMAGES, batch_size=_BATCH), augment, torch.device("cpu"))
    batches = _IMAGES // _BATCH

    def epoch_of(loader: Any) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            for count, _ in enumerate(loader, start=1):
                if count == batches:
                    break
            return batches * _BATCH / (time.perf_counter() - start)

        return run

    # Use one iterator of this project's loader for all epochs, as a run does.
    contenders = {name: epoch_of(loader) for name, loader in {**loaders, "resnext_ignite": iter(ours)}.items()}
    samples = in_turns(contenders, rounds, "data")
    speeds = medians(samples)
    best_peer = max(value for name, value in speeds.items() if name != "resnext_ignite")
    ratio = speeds["resnext_ignite"] / best_peer
    return {"unit": "images/s", "samples": samples, "ratios": {"data_vs_torchvision": ratio}}
