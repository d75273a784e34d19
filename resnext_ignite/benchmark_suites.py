"""What the benchmark command measures: each suite runs contenders in turns, and gives all samples and their ratios."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from resnext_ignite import engines
from resnext_ignite.checkpoint import save_checkpoint
from resnext_ignite.config import Config, with_values
from resnext_ignite.config_files import load_config
from resnext_ignite.data import Data, build_train_loader, load_data
from resnext_ignite.data.augment import Augment
from resnext_ignite.data.cifar import MEAN, STD
from resnext_ignite.data.images import Images
from resnext_ignite.data.loaders import Batch, TrainLoader
from resnext_ignite.data.sampling import TrainOrder
from resnext_ignite.distributed import Ranks, StopAgreement
from resnext_ignite.handlers.checkpointing import RunState, Stateful
from resnext_ignite.handlers.training import LogPoint
from resnext_ignite.models import build_model
from resnext_ignite.optim import IterationLRScheduler, build_lr_scheduler, build_optimizer

_IMAGES = 10_000
_BATCH = 128
_CIFAR_IMAGES = 50_000


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each contender once a round, after one round that is not counted; what each returned."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            value = contender()
            if turn:
                samples[name].append(value)
    return samples


def measure_data(rounds: int = 5) -> dict[str, Any]:
    """Input of CIFAR's size, images/s: this project's batches against torchvision's transforms in a DataLoader.

    Both crop with 4 pixels of padding, flip and normalise the same uint8 arrays, to float32 on the CPU.
    """
    engines.set_up_machine(torch.device("cpu"), deterministic=True)
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

    class Pictures(Dataset[Any]):
        """As torchvision's CIFAR10 gives them to its transforms."""

        def __len__(self) -> int:
            return _IMAGES

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return chain(Image.fromarray(pixels[index])), 0

    loaders = {
        f"torchvision, {workers} workers": DataLoader(
            Pictures(), _BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
        )
        for workers in (0, 2)
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

    # One iterator for all epochs, as a run has it.
    contenders = {name: epoch_of(loader) for name, loader in {**loaders, "resnext_ignite": iter(ours)}.items()}
    samples = in_turns(contenders, rounds)
    medians = {name: median(values) for name, values in samples.items()}
    best_peer = max(value for name, value in medians.items() if name != "resnext_ignite")
    ratio = medians["resnext_ignite"] / best_peer
    return {"unit": "images/s", "samples": samples, "ratios": {"data_vs_torchvision": ratio}}


@dataclass(frozen=True)
class Training:
    """What a run of a config trains with, on the embedded data set."""

    config: Config
    device: torch.device
    data: Data
    loader: TrainLoader
    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: IterationLRScheduler
    trainer: Engine

    def update_alone(self, ready: Batch, iterations: int) -> float:
        """Seconds an iteration of nothing but forward, backward and update, on a batch that lies ready."""
        self.model.train()
        start = time.perf_counter()
        for _ in range(iterations):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
                logits = self.model(ready.images)
            F.cross_entropy(logits.float(), ready.labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.finish()
        return (time.perf_counter() - start) / iterations

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def prepare(config_path: Path, overrides: Sequence[str] = (), local_rank: int = 0) -> Training:
    """What a single rank of a config would train with, on the embedded data set."""
    config = load_config(config_path, ["data.name=shapes", *overrides])
    device, ranks = engines.resolve_device(config.train.device, local_rank), Ranks()
    precision = engines.resolve_precision(config.train.precision, device)
    config = with_values(config, {"model.num_classes": 10, "train.precision": precision})
    engines.set_up_machine(device, deterministic=device.type == "cpu")
    data = load_data(config, ranks, ("train",))
    loader = build_train_loader(config, data, device, ranks)
    model = engines.place(build_model(config), device, channels_last=config.train.channels_last)
    optimizer = build_optimizer(config, model)
    lr_scheduler = build_lr_scheduler(config, optimizer, len(loader))
    trainer = engines.build_trainer(config, model, optimizer, device)
    return Training(config, device, data, loader, model, optimizer, lr_scheduler, trainer)


def measure_overhead(config_path: Path, rounds: int = 15, iterations: int = 8) -> dict[str, Any]:
    """Share of an iteration that is not forward, backward and update, for a config's model.

    Two loops in turns, each of some iterations: the trainer with its log point, schedule and input as in a run, and
    forward, backward and update alone on a batch that lies ready. The share is of the medians.
    """
    training = prepare(config_path)
    config, trainer = training.config, training.trainer
    training.lr_scheduler.attach(trainer, Events.ITERATION_STARTED)
    point = LogPoint(StopAgreement(Ranks()), lambda iteration: 0.0, config.logging.every_iterations)
    trainer.add_event_handler(Events.EPOCH_STARTED, point.begin_epoch)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, point)
    # One iterator for all epochs, as a run has it.
    source = iter(training.loader)
    ready = next(source)

    def whole() -> float:
        start = time.perf_counter()
        trainer.state.max_epochs = None
        trainer.run(source, max_epochs=1, epoch_length=iterations)
        training.finish()
        return (time.perf_counter() - start) / iterations

    bare = "forward, backward, update"
    samples = in_turns({"trainer": whole, bare: lambda: training.update_alone(ready, iterations)}, rounds)
    share = 1 - median(samples[bare]) / median(samples["trainer"])
    paired = [1 - alone / trained for trained, alone in zip(samples["trainer"], samples[bare], strict=True)]
    return {
        "unit": "s/iteration",
        "model": config.model.name,
        "batch_size": config.train.batch_size,
        "samples": samples,
        "ratios": {"trainer_overhead": share, "trainer_overhead_paired_median": median(paired)},
    }


def measure_checkpoint(config_paths: list[Path], rounds: int = 11, iterations: int = 5) -> dict[str, Any]:
    """Seconds of a save of a run's whole state, for the models of some configs: bare, synced, and as this project does.

    The last is written, synced, renamed, read back and compared. `checkpoint_share` is its share of a run's time at a
    save for each epoch of CIFAR's 50,000 images; the epoch is that many times the median of some bare iterations.
    """
    samples: dict[str, list[float]] = {}
    models, ratios = {}, {}
    for path in config_paths:
        training = prepare(path)
        name, batch_size = training.config.model.name, training.config.train.batch_size
        ready = next(iter(training.loader))
        # Before the saves: the first update makes the momentum that they hold.
        updates = [training.update_alone(ready, 1) for _ in range(iterations + 1)][1:]
        saves, size = _time_saves(_state_of(training), rounds)
        seconds = {contender: median(values) for contender, values in saves.items()}
        ours, epoch = seconds["save_checkpoint"], _CIFAR_IMAGES // batch_size * median(updates)
        samples |= {f"{name}, {contender}": values for contender, values in saves.items()}
        samples[f"{name}, forward, backward, update"] = updates
        models[name] = {"bytes": size, "batch_size": batch_size, "epoch_s": epoch}
        ratios[f"checkpoint_vs_torch_save, {name}"] = ours / seconds["torch.save"]
        ratios[f"checkpoint_share, {name}"] = ours / (ours + epoch)
    return {"unit": "s", "models": models, "samples": samples, "ratios": ratios}


def _state_of(training: Training) -> dict[str, Any]:
    """All that a run saves, but for the few numbers of its handlers."""
    data = training.data
    facts = {
        "config": training.config.model_dump(mode="json"),
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.image_size,
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
    return RunState(training.trainer, Ranks(), facts, parts, {}, dict).collect()


def _time_saves(state: dict[str, Any], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each way to save a state, and the bytes of the file."""

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
            # At once, lest what is not on the disk yet is written in the time of the next contender.
            for file in folder.iterdir():
                file.unlink()
            return seconds

        return run

    # Where runs lie by default: a folder for temporary files may be in memory, and syncing is free there.
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as name:
        folder = Path(name)
        contenders = {
            "torch.save": timed(lambda path: torch.save(state, path)),
            "torch.save and fsync": timed(save_synced),
            "save_checkpoint": timed(lambda path: save_checkpoint(path, state)),
        }
        return in_turns(contenders, rounds), size
