"""Measures how time and memory grow with batch size, depth, cardinality, number of images and number of ranks.

Each size is measured in its own process.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch

from resnext_ignite.benchmark.processes import Turn, in_processes, peak_bytes
from resnext_ignite.benchmark.setup import build_training, measured_device, random_batch
from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.images import Images
from resnext_ignite.data.loaders import TrainLoader
from resnext_ignite.data.sampling import TrainOrder
from resnext_ignite.data.sources.cifar import MEAN, STD
from resnext_ignite.distributed.ddp import wrap_for_ranks
from resnext_ignite.distributed.launch import launch
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runtime.timing import in_turns, medians, timed

# A growth exponent above this limit counts as worse than linear. The limit is above 1 to allow for noise.
LINEAR = 1.1


def train(config_path: Path, model: str, stem_channels: int, batch_size: int) -> Turn:
    """Return a function that measures the seconds per iteration of a model, for a stem width and a batch size."""
    training = build_training(
        config_path,
        [f"model.name={model}", f"model.stem_channels={stem_channels}", f"train.batch_size={batch_size}"],
        10,
    )
    batch = random_batch(batch_size, 32, 10, training.device, channels_last=True)
    return lambda: training.run(repeat(batch), 10 if training.device.type == "cuda" else 1)


def load(count: int, batches: int = 20) -> Turn:
    """Return a function that measures the seconds to start an epoch and to load its first `batches` batches.

    The start of an epoch pads all images and shuffles their indices.

    Args:
        count: number of images in the data set.
    """
    device = measured_device()
    images = Images(
        torch.zeros(count, 32, 32, 3, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64), torch.arange(count)
    )
    augment = Augment(1, MEAN, STD, crop_padding=4, flip="random")
    loader = TrainLoader(images.to(device), TrainOrder(seed=1, count=count, batch_size=128), augment, device)
    return lambda: timed(device, lambda: list(islice(iter(loader), batches)))


def sizes(config_path: Path, *, large: bool) -> dict[str, dict[int, Callable[[], Turn]]]:
    """Return nested dicts: name of the quantity that grows -> its size -> function that prepares the measurement.

    Args:
        large: use a wider network and larger batches, for a GPU.
    """
    width, batch = (64, 128) if large else (24, 64)

    def network(depth: int = 11, cardinality: int = 4, images: int = batch) -> Callable[[], Turn]:
        return partial(train, config_path, f"cifar_resnext{depth}_{cardinality}x64d", width, images)

    return {
        "batch": {images: network(images=images) for images in (batch // 2, batch, 2 * batch, 4 * batch)},
        "depth": {depth: network(depth=depth) for depth in (11, 20, 29, 38)},
        "cardinality": {cardinality: network(cardinality=cardinality) for cardinality in (2, 4, 8, 16)},
        "images": {count: partial(load, count) for count in (50_000, 100_000, 200_000, 400_000)},
    }


def measure_growth(config_path: Path, rounds: int = 3) -> dict[str, Any]:
    """Measure the seconds and the peak bytes at each size, and compute the exponents of the growth; 1 means linear.

    An exponent is computed from the two largest sizes, where fixed costs have the least influence.
    """
    samples: dict[str, list[float]] = {}
    tables: dict[str, dict[str, dict[str, float]]] = {}
    ratios = {}
    for what, makers in sizes(config_path, large=measured_device().type == "cuda").items():
        with in_processes({str(size): make for size, make in makers.items()}) as contenders:
            taken = in_turns(dict(contenders), rounds, f"growth, {what}", warm_up=False)
            peaks = {size: contender.peak_bytes() for size, contender in contenders.items()}
        samples |= {f"{what} {size}": values for size, values in taken.items()}
        seconds = medians(taken)
        tables[what] = {size: {"seconds": seconds[size], "peak_bytes": peaks[size]} for size in seconds}
        ratios[f"time_exponent, {what}"] = exponent(list(map(int, seconds)), list(seconds.values()))
        ratios[f"memory_exponent, {what}"] = exponent(list(map(int, peaks)), list(peaks.values()))
    tables["ranks"] = measure_rank_growth(config_path)
    worse = [name for name, value in ratios.items() if value > LINEAR]
    return {"unit": "s", "worse_than_linear": worse, "tables": tables, "samples": samples, "ratios": ratios}


def measure_rank_growth(config_path: Path, batch_size: int = 128, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Return, for each number of ranks, the seconds per iteration and rank 0's peak bytes, for a fixed global batch."""
    most = torch.cuda.device_count() or 4
    table = {}
    # Do not measure 1 rank: it would run in this process, and the peak memory of this process includes the earlier
    # measurements.
    for world_size in (count for count in (2, 4, 8) if count <= most):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "figures.json"
            launch(_train_on_ranks, config_path, batch_size, rounds, file, nproc_per_node=world_size)
            table[str(world_size)] = json.loads(file.read_text())
    return table


def _train_on_ranks(local_rank: int, config_path: Path, batch_size: int, rounds: int, file: Path) -> None:
    ranks = Ranks.current()
    training = build_training(config_path, [f"train.batch_size={batch_size}"], 10, local_rank)
    model = wrap_for_ranks(training.model, training.device, ranks, sync_bn=False)
    batch = random_batch(batch_size // ranks.world_size, 32, 10, training.device, channels_last=True)
    contender = replace(training, model=model)
    seconds = in_turns({"": lambda: contender.update_alone(batch, 2)}, rounds)[""]
    if ranks.rank == 0:
        file.write_text(json.dumps({"seconds": median(seconds), "peak_bytes": peak_bytes()}))


def exponent(at: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent of the growth: the slope of log(values) over log(at), between the last two points."""
    return math.log(values[-1] / values[-2]) / math.log(at[-1] / at[-2])
