"""Measures training on JPEG files, including their decoding: images/s, and how long the device waits for images."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from resnext_ignite.benchmark.photographs import OURS, jpegs_in, linked
from resnext_ignite.benchmark.setup import Training, build_training
from resnext_ignite.benchmark.training import Workload
from resnext_ignite.config.schema import with_values
from resnext_ignite.data import Data, build_train_loader, load_data
from resnext_ignite.data.loaders import TrainLoader
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runtime.timing import in_turns, medians

_DECODERS = ("workers", "device")
_ITERATIONS = 40
# Batches that each worker of a DataLoader prefetches by default.
_AHEAD = 2
READY = "a batch that lies ready"


def measure_end_to_end(
    folder: Path,
    work: Workload,
    *,
    decoders: tuple[str, ...] = _DECODERS,
    rounds: int = 5,
    iterations: int = _ITERATIONS,
) -> dict[str, Any]:
    """Measure the images/s of training on JPEG files, with random-resized crops, for each decoder.

    One more contender runs the same number of iterations on one batch that is already on the device. A decoder's time
    minus this contender's time is the time that the device waits for images. There is one worker per core. Each
    measurement of a decoder starts new workers and discards the first batches.

    Args:
        folder: the folder of JPEG files.
        work: the config, the model and the batch size. Training uses the JPEG files instead of the config's data set.
        decoders: the values of `data.decode` to measure.
        iterations: iterations per measurement.

    Raises:
        DataError: there are no JPEG files.
    """
    files = jpegs_in(folder)
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as root:
        values = [f"data.root={linked(files, Path(root))}", f"data.workers={workers}", "data.name=imagefolder"]
        training = build_training(
            work.config_path,
            [*work.overrides(), *values, f"data.image_size={work.image_size}", "augment.random_resized_crop=true"],
            work.num_classes,
            image_size=work.image_size,
        )
        data = load_data(training.config, Ranks(), ("train",))
        loaders = {decoder: _loader(training, data, decoder) for decoder in decoders}
        ready = next(iter(loaders[decoders[0]]))
        turns: dict[str, Callable[[], float]] = {READY: lambda: training.run(repeat(ready), iterations)}
        for decoder, loader in loaders.items():
            turns[_from_files(decoder)] = _turn(training, loader, iterations, ahead=_AHEAD * workers)
        seconds = in_turns(turns, rounds, f"photographs, {work.model}")
    middle = medians(seconds)
    return {
        "unit": "images/s",
        "model": work.model,
        "files": len(files),
        "workers": workers,
        "batch_size": work.batch_size,
        "image_size": work.image_size,
        "samples": {name: [work.batch_size / value for value in values] for name, values in seconds.items()},
        "ratios": {
            f"share of the time that waits for data, {decoder}": 1 - middle[READY] / middle[_from_files(decoder)]
            for decoder in decoders
        },
    }


def _from_files(decoder: str) -> str:
    return f"{OURS}, decoded by the {decoder}"


def _loader(training: Training, data: Data, decoder: str) -> TrainLoader:
    return build_train_loader(with_values(training.config, {"data.decode": decoder}), data, training.device, Ranks())


def _turn(training: Training, loader: TrainLoader, iterations: int, ahead: int) -> Callable[[], float]:
    """Return a function that trains on batches of the loader, and returns the seconds per iteration.

    Before the measurement, the function discards the first `ahead` batches.
    """

    def run() -> float:
        # Close the iterator at the end: workers that continue to decode would slow down the next measurement.
        with contextlib.closing(iter(loader)) as batches:
            for _ in islice(batches, ahead):
                pass
            return training.run(batches, iterations)

    return run
