"""Measures how fast this project, torchvision and timm make batches from JPEG files, and how fast decoding alone is."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from resnext_ignite.benchmark.peers import has_timm
from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.loaders import TrainLoader
from resnext_ignite.data.reading.image_files import ImageFiles
from resnext_ignite.data.sampling import TrainOrder
from resnext_ignite.data.sources.folders import MEAN, STD, index_images
from resnext_ignite.runtime import devices
from resnext_ignite.runtime.errors import DataError
from resnext_ignite.runtime.timing import in_turns, medians

_BATCH = 64
_IMAGES = 1280
# To measure the decode limit, each process decodes all files this many times.
_PASSES = 4
# Batches that each worker of a DataLoader prefetches by default.
_AHEAD = 2
OURS, TORCHVISION, TIMM, LIMIT = "resnext_ignite", "torchvision", "timm", "libjpeg-turbo alone"


def measure_photographs(folder: Path, sizes: tuple[int, ...] = (224, 176, 128, 64), rounds: int = 5) -> dict[str, Any]:
    """Measure how many images/s each loader makes from JPEG files: random-resized crops, flipped and normalised.

    The batches are float32 on the CPU. Every loader has one worker per core. An epoch has `_IMAGES` images. If there
    are fewer files, they are repeated.

    Raises:
        DataError: there are no JPEG files.
    """
    files = jpegs_in(folder)
    # Set up the machine as a run does: the process then reuses freed memory for new batches, whichever loader runs.
    devices.set_up_machine(torch.device("cpu"), deterministic=True)
    # The workers need all cores. Further threads of this process would occupy cores even while idle.
    torch.set_num_threads(1)
    workers = len(os.sched_getaffinity(0))
    samples: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder_name, multiprocessing.Pool(workers) as decoders:
        root = linked(files, Path(folder_name))
        for size in sizes:
            makers = {OURS: _resnext_ignite, TORCHVISION: _torchvision, **({TIMM: _timm} if has_timm() else {})}
            contenders = {name: _rate(make(root, size, workers), workers) for name, make in makers.items()}
            contenders[LIMIT] = lambda: sum(decoders.map(_decoding_rate, [files] * workers, chunksize=1))
            found = in_turns(contenders, rounds, f"photographs, {size}")
            samples |= {f"{size} pixels, {contender}": values for contender, values in found.items()}
            speeds = medians(found)
            ratios |= {
                f"{size} pixels, vs {other}": speeds[OURS] / speeds[other]
                for other in (TORCHVISION, TIMM)
                if other in speeds
            }
            ratios[f"{size} pixels, of the decode limit"] = speeds[OURS] / speeds[LIMIT]
    return {"unit": "images/s", "files": len(files), "workers": workers, "samples": samples, "ratios": ratios}


def jpegs_in(folder: Path) -> list[Path]:
    """Return all JPEG files in a folder and its subfolders, sorted.

    Raises:
        DataError: there are none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise DataError(f"--photographs {folder}: holds no .jpg or .jpeg")
    return files


def linked(files: list[Path], root: Path) -> Path:
    """Create an imagefolder of two classes in `root`, and return `root`.

    The imagefolder has `_IMAGES` links to the files. If there are fewer files, several links lead to the same file.
    """
    for number in range(_IMAGES):
        place = root / "train" / ("a", "b")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:04}.jpg").symlink_to(files[number % len(files)].resolve())
    return root


def _rate(batches: Iterator[Any], workers: int) -> Callable[[], float]:
    """Return a function that takes one epoch from the endless iterator `batches`, and returns the images/s."""

    def run() -> float:
        # Discard the batches that the workers have decoded before this measurement.
        for _ in range(_AHEAD * workers):
            next(batches)
        start = time.perf_counter()
        for _ in range(_IMAGES // _BATCH):
            next(batches)
        rate = _IMAGES / (time.perf_counter() - start)
        # Let the workers finish prefetching before the next contender is measured.
        time.sleep(2 * _AHEAD * workers * _BATCH / rate)
        return rate

    return run


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _resnext_ignite(root: Path, size: int, workers: int) -> Iterator[Any]:
    index = index_images(root, "train")
    files = ImageFiles(index.paths, index.labels, torch.arange(_IMAGES), size)
    order = TrainOrder(seed=1, count=_IMAGES, batch_size=_BATCH)
    augment = Augment(1, MEAN, STD, flip="random")
    loader = TrainLoader(files, order, augment, torch.device("cpu"), workers=workers, random_resized_crop=True)
    return iter(loader)


def _torchvision(root: Path, size: int, workers: int) -> Iterator[Any]:
    """Return an endless iterator over batches, made in the same way as in torchvision's reference script."""
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return _endless(
        DataLoader(
            ImageFolder(root / "train", chain),
            _BATCH,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            persistent_workers=True,
        )
    )


def _timm(root: Path, size: int, workers: int) -> Iterator[Any]:
    """Return an endless iterator over batches, made in the same way as in timm's script.

    The workers return uint8 images, and timm's prefetcher normalises them.

    timm's colour jitter and automatic augmentation are off, so that all loaders augment in the same way.
    """
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("folder", root=str(root), split="train", is_training=True)
    return _endless(
        create_loader(
            dataset,
            (3, size, size),
            _BATCH,
            is_training=True,
            color_jitter=0.0,
            auto_augment=None,
            interpolation="bilinear",
            mean=MEAN,
            std=STD,
            num_workers=workers,
            device=torch.device("cpu"),
            pin_memory=False,
            persistent_workers=True,
        )
    )


def _decoding_rate(files: list[Path]) -> float:
    """Return the images/s of reading and decoding whole files in this process."""
    start = time.perf_counter()
    for _ in range(_PASSES):
        for file in files:
            simplejpeg.decode_jpeg(file.read_bytes(), "RGB")
    return _PASSES * len(files) / (time.perf_counter() - start)
