"""Measures the images/s of this project's trainer and of other packages' loops, and the overhead of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._inductor import config as inductor

from resnext_ignite.benchmark.limits import measure_limits
from resnext_ignite.benchmark.peers import (
    Peer,
    amp_loop,
    has_timm,
    resnext_pytorch_loop,
    timm_network,
    torchvision_loop,
    torchvision_network,
)
from resnext_ignite.benchmark.processes import Turn, in_processes
from resnext_ignite.benchmark.setup import build_training, measured_device, prepare, random_batch
from resnext_ignite.models import create_model
from resnext_ignite.models.cost import cost_of
from resnext_ignite.runtime.devices import resolve_precision
from resnext_ignite.runtime.timing import in_turns, medians, timed

OURS = "resnext_ignite"
_RESNEXT_PYTORCH, _TORCHVISION, _AMP = "ResNeXt.pytorch's loop", "torchvision's script, --amp", "bf16 channels_last"


@dataclass(frozen=True)
class Workload:
    """The work of each contender: a config's model on batches of noise.

    Args:
        config_path: the config file, for this project's trainer.
        model: the name of the config's model; the loops of the other packages build the model from this name.
        batch_size: images per iteration.
        image_size: pixels per side.
        iterations: iterations per measurement.
    """

    config_path: Path
    model: str
    batch_size: int
    image_size: int
    num_classes: int
    iterations: int = 1

    def overrides(self) -> list[str]:
        """Return the config values of this work, with a learning rate at which the loss on noise stays finite."""
        return [f"train.batch_size={self.batch_size}", "schedule.name=constant", "optimizer.lr=1e-4"]


def time_trainer(work: Workload, overrides: list[str], forced_layout: bool = False) -> Turn:
    """Return a function that measures the seconds per iteration of this project's trainer.

    Args:
        overrides: further config values, `KEY=VALUE`.
        forced_layout: make inductor use channels_last, which it does not do by default for grouped convolutions.
    """
    inductor.force_layout_optimization = forced_layout
    training = build_training(
        work.config_path, [*work.overrides(), *overrides], work.num_classes, image_size=work.image_size
    )
    config = training.config
    batch = random_batch(
        work.batch_size,
        work.image_size,
        work.num_classes,
        training.device,
        channels_last=config.train.channels_last,
    )
    return lambda: training.run(repeat(batch), work.iterations)


def time_peer(work: Workload, way: Callable[[str, int, torch.device], Peer], channels_last: bool) -> Turn:
    """Return a function that measures the seconds per iteration of another package's loop."""
    device = measured_device()
    torch.backends.cudnn.benchmark = True
    peer = way(work.model, work.num_classes, device)
    batch = random_batch(work.batch_size, work.image_size, work.num_classes, device, channels_last=channels_last)
    peer.model.train()

    def run() -> None:
        for _ in range(work.iterations):
            peer.iterate(batch)

    return lambda: timed(device, run) / work.iterations


def contenders(work: Workload, device: torch.device) -> dict[str, Callable[[], Turn]]:
    """Return a dict that maps each contender's name to the function that prepares its measurement.

    The names of this project's contenders begin with `OURS`.
    """
    makers: dict[str, Callable[[], Turn]] = {
        OURS: partial(time_trainer, work, []),
        f"{OURS}, compiled": partial(time_trainer, work, ["train.compile=true"]),
    }
    if device.type == "cuda":
        makers |= {
            f"{OURS}, grouped_conv=auto": partial(time_trainer, work, ["train.grouped_conv=auto"]),
            f"{OURS}, compiled, forced layout": partial(time_trainer, work, ["train.compile=true"], True),
            f"{OURS}, compiled, CUDA graphs": partial(time_trainer, work, ["train.compile=cuda_graphs"]),
        }
    makers[_RESNEXT_PYTORCH] = partial(time_peer, work, resnext_pytorch_loop, False)
    makers[_TORCHVISION] = partial(time_peer, work, torchvision_loop, False)
    torchvision_amp = partial(amp_loop, torchvision_network)
    makers[f"torchvision's network, {_AMP}"] = partial(time_peer, work, torchvision_amp, True)
    if device.type == "cuda" or not has_timm():
        # At least one peer must be compiled. Compilation takes long on a CPU: leave out this peer there if timm is
        # installed, because timm's script is compiled, too (see below).
        compiled_way = partial(amp_loop, torchvision_network, compiled=True)
        makers[f"torchvision's network, {_AMP}, compiled"] = partial(time_peer, work, compiled_way, True)
    if has_timm():
        for suffix, compiled in (("", False), (", compiled", True)):
            way = partial(amp_loop, timm_network, compiled=compiled)
            makers[f"timm's script, {_AMP}{suffix}"] = partial(time_peer, work, way, True)
    return makers


def measure_training(work: Workload, rounds: int = 5) -> dict[str, Any]:
    """Measure the images/s of a model in this project's trainer and in other packages' loops, on one batch of noise."""
    device = measured_device()
    with in_processes(contenders(work, device)) as ways:
        limits = measure_limits(device, resolve_precision("auto", device))
        seconds = in_turns(dict(ways), rounds, f"train, {work.model}", warm_up=False)
        peaks = {name: way.peak_bytes() for name, way in ways.items()}
    samples = {name: [work.batch_size / value for value in values] for name, values in seconds.items()}
    speeds = medians(samples)
    best = max(speed for name, speed in speeds.items() if name.startswith(OURS))
    least = limits.training_s(cost_of(create_model(work.model, work.num_classes), work.image_size), work.batch_size)
    peers = {
        "train_vs_resnext_pytorch": [_RESNEXT_PYTORCH],
        "train_vs_torchvision": [_TORCHVISION],
        "train_vs_best_amp_peer": [name for name in speeds if _AMP in name],
        "train_vs_timm": [name for name in speeds if name.startswith("timm")],
    }
    fastest = {
        ratio: max((speeds[name] for name in names if name in speeds), default=0.0) for ratio, names in peers.items()
    }
    ratios = {ratio: best / speed for ratio, speed in fastest.items() if speed}
    # This project's speed with an unchanged config, divided by the speed of the fastest bf16, channels_last peer.
    ratios["train_default_vs_best_amp_peer"] = speeds[OURS] / fastest["train_vs_best_amp_peer"]
    ratios["train_of_limit"] = best * least / work.batch_size
    return {
        "failed": ways.failed,
        "unit": "images/s",
        "model": work.model,
        "batch_size": work.batch_size,
        "image_size": work.image_size,
        "limits": {"flop_per_s": limits.flop_per_s, "bytes_per_s": limits.bytes_per_s},
        "peak_bytes": peaks,
        "samples": samples,
        "ratios": ratios,
    }


def measure_overhead(config_path: Path, rounds: int = 11, iterations: int = 8) -> dict[str, Any]:
    """Measure the overhead: the fraction of an iteration's time that is not spent in forward, backward and update.

    One contender is the trainer with log point, schedule and input, as in a run. The other contender is forward,
    backward and update alone, on one batch on the device. `trainer_overhead` is the fraction computed from the two
    medians. `trainer_overhead_paired_median` is the median of the fractions computed for each round.

    Args:
        iterations: iterations per measurement.
    """
    training, _, loader = prepare(config_path)
    # Use one iterator for all epochs, as a run does.
    source = iter(loader)
    ready = next(source)
    bare = "forward, backward, update"
    ways = {
        "trainer": lambda: training.run(source, iterations),
        bare: lambda: training.update_alone(ready, iterations),
    }
    samples = in_turns(ways, rounds, "overhead")
    share = 1 - median(samples[bare]) / median(samples["trainer"])
    paired = [1 - alone / trained for trained, alone in zip(samples["trainer"], samples[bare], strict=True)]
    return {
        "unit": "s/iteration",
        "model": training.config.model.name,
        "batch_size": training.config.train.batch_size,
        "samples": samples,
        "ratios": {"trainer_overhead": share, "trainer_overhead_paired_median": median(paired)},
    }
