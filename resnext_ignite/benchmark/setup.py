"""Builds the objects that the suites measure: model, optimizer and trainer from a config, and batches of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.nn import functional as F

from resnext_ignite.config.files import load_config
from resnext_ignite.config.schema import Config, with_values
from resnext_ignite.data import Data, build_train_loader, load_data
from resnext_ignite.data.loaders import Batch, TrainLoader
from resnext_ignite.distributed.ddp import wrap_for_ranks
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.distributed.stopping import StopAgreement
from resnext_ignite.models import build_model
from resnext_ignite.optim import build_lr_scheduler, build_optimizer
from resnext_ignite.optim.schedules import IterationLRScheduler
from resnext_ignite.runtime import devices
from resnext_ignite.runtime.timing import timed
from resnext_ignite.training import engines
from resnext_ignite.training.handlers.log_point import LogPoint
from resnext_ignite.training.tuning import ComputeSettings, grouped_conv_for


def measured_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return devices.resolve_device("auto", 0)


@dataclass(frozen=True)
class Training:
    """The model, optimizer, schedule and trainer of a config on a single rank."""

    config: Config
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: IterationLRScheduler
    trainer: Engine

    def run(self, source: Iterator[Batch], iterations: int) -> float:
        """Run the trainer, with its log point and schedule, and return the seconds per iteration."""
        self.trainer.state.max_epochs = None
        return timed(self.device, lambda: self.trainer.run(source, max_epochs=1, epoch_length=iterations)) / iterations

    def update_alone(self, ready: Batch, iterations: int) -> float:
        """Run only forward, backward and update, on a batch that is on the device; return the seconds per iteration."""
        self.model.train()

        def update() -> None:
            for _ in range(iterations):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
                    logits = self.model(ready.images)
                F.cross_entropy(logits.float(), ready.labels).backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

        return timed(self.device, update) / iterations


def build_training(
    config_path: Path, overrides: Sequence[str], num_classes: int, local_rank: int = 0, image_size: int = 32
) -> Training:
    """Build the `Training` of a config; its trainer has a log point and a schedule, as in a run."""
    config = load_config(config_path, overrides)
    device, ranks = devices.resolve_device(config.train.device, local_rank), Ranks()
    precision = devices.resolve_precision(config.train.precision, device)
    config = with_values(config, {"model.num_classes": num_classes, "train.precision": precision})
    devices.set_up_machine(device, deterministic=device.type == "cpu")
    if "auto" in config.train.grouped_conv:
        config = with_values(config, {"train.grouped_conv": grouped_conv_for(config, image_size, device)})
    model = devices.place(build_model(config), device, channels_last=config.train.channels_last)
    optimizer = build_optimizer(config, model)
    lr_scheduler = build_lr_scheduler(config, optimizer, 1000)
    model = wrap_for_ranks(model, device, ranks, sync_bn=False, compiled=config.train.compile)
    trainer = engines.build_trainer(config, model, optimizer, device)
    lr_scheduler.attach(trainer, Events.ITERATION_STARTED)
    point = LogPoint(StopAgreement(ranks), lambda iteration: 0.0, config.logging.every_iterations)
    trainer.add_event_handler(Events.EPOCH_STARTED, point.begin_epoch)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, point)
    return Training(config, device, model, optimizer, lr_scheduler, trainer)


def prepare(
    config_path: Path, overrides: Sequence[str] = (), local_rank: int = 0
) -> tuple[Training, Data, TrainLoader]:
    """Return, for a single rank: the `Training` of a config, the embedded data set, and the loader of this data set."""
    training = build_training(config_path, ["data.name=shapes", *overrides], 10, local_rank)
    data = load_data(training.config, Ranks(), ("train",))
    return training, data, build_train_loader(training.config, data, training.device, Ranks())


def random_batch(count: int, image_size: int, num_classes: int, device: torch.device, *, channels_last: bool) -> Batch:
    """Return a batch whose images are noise: float32 (count, 3, image_size, image_size), with labels int64 (count,)."""
    images = ComputeSettings(device, torch.float32, channels_last).noise(count, 3, image_size)
    indices = torch.arange(count, device=device)
    return Batch(images, indices % num_classes, indices)
