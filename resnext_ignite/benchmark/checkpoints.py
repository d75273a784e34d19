"""Measures the cost of durable checkpoints: compares a synced and verified save with a plain `torch.save`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from resnext_ignite.benchmark.setup import Training, prepare
from resnext_ignite.data import Data
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runs.checkpoint import save_checkpoint
from resnext_ignite.runtime.timing import in_turns, medians
from resnext_ignite.training.handlers.checkpointing import RunState, Stateful

_CIFAR_IMAGES = 50_000


def measure_checkpoint(contests: dict[Path, int], rounds: int = 11, iterations: int = 5) -> dict[str, Any]:
    """Measure the seconds of saving a run's state: `torch.save`, `torch.save` with fsync, and `save_checkpoint`.

    `save_checkpoint` writes, syncs, reads back, compares and renames. `checkpoint_share` is the fraction of a run's
    time that `save_checkpoint` takes if the run saves once per epoch of CIFAR's 50,000 images. The time of an epoch is
    not measured. It is the number of iterations per epoch, multiplied by the median seconds of one iteration (forward,
    backward and update).

    Args:
        contests: a dict with the models to measure: config file -> batch size.
        rounds: number of saves per implementation.
        iterations: number of timed iterations of forward, backward and update.
    """
    samples: dict[str, list[float]] = {}
    models: dict[str, dict[str, Any]] = {}
    ratios: dict[str, float] = {}
    for path, batch_size in contests.items():
        training, data, loader = prepare(path, [f"train.batch_size={batch_size}"])
        name = training.config.model.name
        ready = next(iter(loader))
        # Update before the saves: the first update creates the momentum, which is part of the state.
        updates = [training.update_alone(ready, 1) for _ in range(iterations + 1)][1:]
        saves, size = _time_saves(_state_of(training, data), rounds)
        seconds = medians({**saves, "update": updates})
        ours, epoch = seconds["save_checkpoint"], _CIFAR_IMAGES // batch_size * seconds["update"]
        samples |= {f"{name}, {contender}": values for contender, values in saves.items()}
        samples[f"{name}, forward, backward, update"] = updates
        models[name] = {"bytes": size, "batch_size": batch_size, "epoch_s": epoch}
        # The ratios of the first model have no suffix.
        suffix = f", {name}" if ratios else ""
        ratios[f"checkpoint_vs_torch_save{suffix}"] = ours / seconds["torch.save"]
        ratios[f"checkpoint_share{suffix}"] = ours / (ours + epoch)
    return {"unit": "s", "models": models, "samples": samples, "ratios": ratios}


def _state_of(training: Training, data: Data) -> dict[str, Any]:
    """Return the state that a run saves, without the state of its handlers, which is only a few numbers."""
    metadata = {
        "config": training.config.model_dump(mode="json"),
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.evaluation_size,
        "selection": data.selection,
        "data": data.contents,
    }
    parts: dict[str, Stateful | None] = {
        "model": training.model,
        "ema": None,
        "optimizer": training.optimizer,
        "lr_scheduler": training.lr_scheduler,
        "scaler": training.trainer.state.scaler,
    }
    return RunState(training.trainer, Ranks(), metadata, parts, {}, dict).collect()


def _time_saves(state: dict[str, Any], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Return a dict (name of the implementation -> seconds of each save), and the size of the file in bytes."""

    def save_synced(path: Path) -> None:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    size = 0

    def timed(save: Callable[[Path], None]) -> Callable[[], float]:
        def run() -> float:
            nonlocal size
            path = folder / "state.pt"
            start = time.perf_counter()
            save(path)
            seconds = time.perf_counter() - start
            size = path.stat().st_size
            # Delete the files now. Otherwise, the system writes the pending data while the next contender is measured.
            for file in folder.iterdir():
                file.unlink()
            return seconds

        return run

    # Save into the default folder of runs. The system's temporary folder may be in memory, where fsync costs nothing.
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as name:
        folder = Path(name)
        contenders = {
            "torch.save": timed(lambda path: torch.save(state, path)),
            "torch.save and fsync": timed(save_synced),
            "save_checkpoint": timed(lambda path: save_checkpoint(path, state)),
        }
        return in_turns(contenders, rounds, "checkpoint"), size
