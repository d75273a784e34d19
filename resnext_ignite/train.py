"""Train a ResNeXt: `python -m resnext_ignite.train --config configs/quickstart.yaml [KEY=VALUE ...]`.

`run` lists the steps of a training run; the modules that it imports implement them.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from resnext_ignite.distributed.environment import launched_world_size, record_exit_for_torchrun
from resnext_ignite.runtime.console import set_up_streams
from resnext_ignite.runtime.errors import ConfigError, DataError, run_command
from resnext_ignite.runtime.signals import install_exit_on_signals

# Import torch, and modules that import it, only after the checks of the command line and the config.
if TYPE_CHECKING:
    import torch

    from resnext_ignite.config.schema import Config
    from resnext_ignite.data import Data

# Not __name__: it is `__main__` when this module runs as the command.
log = logging.getLogger("resnext_ignite.train")


def run(local_rank: int, config: Config, output_dir: Path, resume: bool = False) -> None:
    """Train on this rank, from scratch or, with `resume`, from the newest checkpoint; rank 0 prints the result.

    Raises:
        ResnextError: the run failed, or a signal stopped it. Each subclass has an exit code. If the error occurs
            after the run folder is opened, rank 0 also writes the error to `output_dir/status.json`.
    """
    import torch

    from resnext_ignite.data import build_loaders
    from resnext_ignite.distributed.ddp import warm_up_ddp_buckets, wrap_for_ranks
    from resnext_ignite.distributed.failures import report_failures
    from resnext_ignite.distributed.ranks import Ranks
    from resnext_ignite.distributed.stopping import StopAgreement, stop_on_signals
    from resnext_ignite.models import build_model
    from resnext_ignite.optim import build_lr_scheduler, build_optimizer
    from resnext_ignite.runs.folder import open_run
    from resnext_ignite.runtime import devices
    from resnext_ignite.runtime.console import set_up_console
    from resnext_ignite.training import engines
    from resnext_ignite.training.handlers.attach import attach_handlers
    from resnext_ignite.training.handlers.averaging import build_average
    from resnext_ignite.training.handlers.progress import describe_evaluation
    from resnext_ignite.training.handlers.session import Parts
    from resnext_ignite.training.tuning import resolve_auto
    from resnext_ignite.weights.pretrained import load_pretrained, with_normalisation

    ranks = Ranks.current()
    set_up_console(quiet=ranks.rank != 0)
    stop = StopAgreement(ranks, config.train.max_hours)
    run_folder = open_run(output_dir, config, ranks, resume=resume)
    with stop_on_signals(stop) as begin, run_folder as opened, report_failures(ranks):
        log.info(f"{ranks.placement()}, {config.train.batch_size // ranks.world_size} images per rank and iteration")
        device = devices.resolve_device(opened.config.train.device, local_rank)
        loaders = build_loaders(with_normalisation(opened.config), device, ranks)
        opened.check_data(loaders.data.contents)
        config = resolve_config(opened.config, loaders.data, device)
        devices.set_up_machine(device, deterministic=bool(config.train.deterministic))
        config = resolve_auto(config, loaders.data, device, ranks)
        torch.manual_seed(config.seed)
        model = devices.place(build_model(config), device, channels_last=config.train.channels_last)
        if config.model.pretrained and opened.state is None:
            load_pretrained(model, config.model.name, config.model.pretrained, ranks)
        average = build_average(config, model, len(loaders.train))
        optimizer = build_optimizer(config, model)
        lr_scheduler = build_lr_scheduler(config, optimizer, len(loaders.train))
        wrapped = wrap_for_ranks(
            model,
            device,
            ranks,
            sync_bn=config.train.sync_bn,
            compiled=config.train.compile,
            accumulate=config.train.accumulate,
            compress_gradients=config.distributed.compress_gradients,
        )
        warm_up_ddp_buckets(wrapped, engines.blank_images(config, device, ranks))
        trainer = engines.build_trainer(config, wrapped, optimizer, device)
        evaluated = model if average is None else average.ema_model
        evaluator = engines.build_evaluator(config, evaluated, device, ranks)
        parts = Parts(model, average, optimizer, lr_scheduler, trainer, evaluator)
        attached = attach_handlers(config, parts, loaders, opened, ranks, stop)
        loaders.train.start_iteration = attached.resume(config.train.epochs)
        begin()
        record = attached.train(loaders.train, len(loaders.train), config.train.epochs)
    if ranks.rank == 0 and record is not None:
        print(f"{describe_evaluation(record)} at epoch {record['epoch']}")
        print(f"run folder: {output_dir}")


def resolve_config(config: Config, data: Data, device: torch.device) -> Config:
    """Return the config with every value filled in that depends on the data or the device.

    `resolve_auto` then replaces the remaining `auto` values.

    Raises:
        DataError: the data has a single class.
        ConfigError: `model.num_classes` is set, but differs from the number of classes of the data.
    """
    from resnext_ignite.config.schema import with_values
    from resnext_ignite.runtime.devices import resolve_precision

    if len(data.classes) < 2:
        raise DataError(f"{config.data.root}: a single class, {data.classes[0]}; training needs at least two classes")
    if config.model.num_classes not in (None, len(data.classes)):
        raise ConfigError(f"model.num_classes: {config.model.num_classes}, but the data has {len(data.classes)}")
    deterministic = config.train.deterministic
    return with_values(
        config,
        {
            "model.num_classes": len(data.classes),
            "data.image_size": data.image_size,
            "data.mean": list(data.mean),
            "data.std": list(data.std),
            "train.device": device.type,
            "train.precision": resolve_precision(config.train.precision, device),
            "train.deterministic": device.type == "cpu" if deterministic is None else deterministic,
        },
    )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with code 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.train",
        description="Train a ResNeXt with the settings of a config file.",
        epilog="--help-config lists all config keys with units and defaults.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML config, as in configs/; with --resume: RUN/config.yaml")
    parser.add_argument("--output-dir", metavar="DIR", help="run folder (default: runs/<config name>/<date-time>)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output-dir")
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="spawn N ranks on this machine")
    parser.add_argument("--backend", choices=("nccl", "gloo"), help="torch.distributed backend (default: by device)")
    parser.add_argument("--help-config", action="store_true", help="print the reference of all config keys")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config values, for example train.epochs=5")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.resume and not parsed.output_dir:
        raise ConfigError("--resume: name the run with --output-dir RUN")
    if parsed.nproc_per_node is not None and parsed.nproc_per_node < 1:
        raise ConfigError(f"--nproc-per-node: {parsed.nproc_per_node}; at least 1")
    return parsed


@record_exit_for_torchrun()
def main(arguments: list[str]) -> int:
    """Run the command and return its exit code.

    Raises:
        ResnextError: an error that the user can fix.
    """
    parsed = parse_arguments(arguments)
    from resnext_ignite.config.batches import check_batch_size
    from resnext_ignite.config.files import load_config

    if parsed.help_config:
        from resnext_ignite.config.reference import config_reference

        set_up_streams(prints_result=True)
        print(config_reference(), end="")
        return 0
    path = parsed.config
    if path is None and parsed.resume and (Path(parsed.output_dir) / "config.yaml").exists():
        path = Path(parsed.output_dir) / "config.yaml"
    if path is None:
        raise ConfigError("--config FILE: missing; for example --config configs/quickstart.yaml")
    config = load_config(path, parsed.overrides)
    check_batch_size(config, parsed.nproc_per_node or launched_world_size())
    output_dir = Path(parsed.output_dir) if parsed.output_dir else default_output_dir(Path(path))

    if config.train.device == "cpu":
        # Hide the GPUs before torch looks for them. Otherwise `launch` chooses nccl, and Ignite gives each rank a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # When a rank dies, torch's C++ code logs stack traces. Hide them: this package reports the dead rank in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from resnext_ignite.distributed.launch import launch
    from resnext_ignite.runtime.console import set_up_console

    set_up_console()
    launch(
        run,
        config,
        output_dir,
        parsed.resume,
        nproc_per_node=parsed.nproc_per_node,
        backend=parsed.backend,
        timeout_s=config.distributed.timeout_s,
    )
    return 0


def default_output_dir(config_path: Path) -> Path:
    """Return `runs/<config name>/<date-time>`; the config name is the name of the config file without its suffix.

    If the config file comes from a run folder, its path is `runs/<config name>/<date-time>/config.yaml`. In this case,
    use the config name in this path.
    """
    name = config_path.resolve().parent.parent.name if config_path.name == "config.yaml" else config_path.stem
    return Path("runs") / name / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


if __name__ == "__main__":
    install_exit_on_signals()
    run_command(main, prints_result=False)
