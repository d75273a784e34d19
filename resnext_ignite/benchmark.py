"""Side by side with what one would use instead: `python -m resnext_ignite.benchmark [--suite data|train|all]`.

Contenders run in turns within one process, A B A B ..., so that a machine whose speed drifts drifts for both; medians
with their spread are printed, and ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from resnext_ignite.errors import run_command

_IMAGES = 10_000
_BATCH = 128


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
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from resnext_ignite import engines
    from resnext_ignite.data.augment import Augment
    from resnext_ignite.data.cifar import MEAN, STD
    from resnext_ignite.data.images import Images
    from resnext_ignite.data.loaders import TrainLoader
    from resnext_ignite.data.sampling import TrainOrder

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


def measure_overhead(config_path: Path, rounds: int = 15, iterations: int = 8) -> dict[str, Any]:
    """Share of an iteration that is not forward, backward and update, for a config's model.

    Two loops in turns, each of some iterations: the trainer with its log point, schedule and input as in a run, and
    forward, backward and update alone on a batch that lies ready. The share is of the medians.
    """
    import torch
    from ignite.engine import Events
    from torch.nn import functional as F

    from resnext_ignite import engines
    from resnext_ignite.config import with_values
    from resnext_ignite.config_files import load_config
    from resnext_ignite.data import build_train_loader, load_data
    from resnext_ignite.distributed import Ranks, StopAgreement
    from resnext_ignite.handlers.training import LogPoint
    from resnext_ignite.models import build_model
    from resnext_ignite.optim import build_lr_scheduler, build_optimizer

    config = load_config(config_path, ["data.name=shapes"])
    device, ranks = engines.resolve_device(config.train.device, 0), Ranks()
    precision = engines.resolve_precision(config.train.precision, device)
    config = with_values(config, {"model.num_classes": 10, "train.precision": precision})
    engines.set_up_machine(device, deterministic=device.type == "cpu")
    loader = build_train_loader(config, load_data(config, ranks, ("train",)), device, ranks)
    model = engines.place(build_model(config), device, channels_last=config.train.channels_last)
    optimizer = build_optimizer(config, model)
    trainer = engines.build_trainer(config, model, optimizer, device)
    build_lr_scheduler(config, optimizer, len(loader)).attach(trainer, Events.ITERATION_STARTED)
    point = LogPoint(StopAgreement(ranks), lambda: 0.0, config.logging.every_iterations)
    trainer.add_event_handler(Events.EPOCH_STARTED, point.begin_epoch)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, point)
    # One iterator for all epochs, as a run has it.
    source = iter(loader)
    ready = next(source)

    def finished() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def whole() -> float:
        start = time.perf_counter()
        trainer.state.max_epochs = None
        trainer.run(source, max_epochs=1, epoch_length=iterations)
        finished()
        return (time.perf_counter() - start) / iterations

    def bare() -> float:
        model.train()
        start = time.perf_counter()
        for _ in range(iterations):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(ready.images)
            F.cross_entropy(logits.float(), ready.labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finished()
        return (time.perf_counter() - start) / iterations

    samples = in_turns({"trainer": whole, "forward, backward, update": bare}, rounds)
    medians = {name: median(values) for name, values in samples.items()}
    share = 1 - medians["forward, backward, update"] / medians["trainer"]
    paired = sorted(1 - b / a for a, b in zip(samples["trainer"], samples["forward, backward, update"], strict=True))
    return {
        "unit": "s/iteration",
        "model": config.model.name,
        "batch_size": config.train.batch_size,
        "samples": samples,
        "ratios": {"trainer_overhead": share, "trainer_overhead_paired_median": median(paired)},
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import os

    import ignite
    import torch
    import torchvision

    names = [line.split(":", 1)[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__, "ignite": ignite.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main(arguments: list[str]) -> int:
    """The command; raises ResnextError for what a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.benchmark", description="Measure side by side, in turns; medians and ratios."
    )
    parser.add_argument("--suite", choices=("data", "train", "all"), default="all", help="default: all")
    parser.add_argument(
        "--config", default="configs/cifar10_resnext11_small.yaml", help="whose model the train suite measures"
    )
    parser.add_argument("--json", metavar="FILE", help="write the machine, every sample and the ratios")
    parsed = parser.parse_args(arguments)
    suites: dict[str, Callable[[], dict[str, Any]]] = {
        "data": measure_data,
        "train": lambda: measure_overhead(Path(parsed.config)),
    }
    results = {name: suite() for name, suite in suites.items() if parsed.suite in (name, "all")}
    for name, result in results.items():
        for contender, values in result["samples"].items():
            spread = f"{min(values):.4g} to {max(values):.4g}"
            print(f"{name}: {contender}: {median(values):.4g} {result['unit']} ({spread})")
        for ratio, value in result["ratios"].items():
            print(f"{name}: {ratio} = {value:.4f}")
    if parsed.json:
        Path(parsed.json).write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
