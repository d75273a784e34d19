"""Measure this project against the alternatives: `python -m resnext_ignite.benchmark [--suite NAME ...]`.

The implementations that a suite compares are its contenders. They run in turns, A B A B ..., so that a drift of the
machine's speed affects all of them. The command prints the median and the range of each contender, and ratios between
contenders.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import IO, Any

from resnext_ignite.runtime.errors import ConfigError, run_command

# A suite that measures several models has one part per model, for example train and train:resnext50_32x4d.
SUITES = ("data", "train", "overhead", "eval", "startup", "checkpoint", "ranks", "kernels", "growth")
# `--suite all` leaves these suites out: `folders` takes long, `photographs` takes long and needs a folder of image
# files, and `export` takes long and needs onnxruntime.
_ON_REQUEST = ("folders", "photographs", "export")
_LARGE = Path("configs/cifar10_resnext29_8x64d.yaml")
_SMALL = Path("configs/cifar10_resnext11_small.yaml")
_IMAGENET = Path("configs/imagenet_resnext50_32x4d.yaml")


def machine() -> dict[str, Any]:
    """Return the hardware, the package versions, the date, and the commit of this project."""
    import ignite
    import torch
    import torchvision

    from resnext_ignite.benchmark.exporting import has_onnxruntime
    from resnext_ignite.benchmark.peers import has_timm

    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "ignite": ignite.__version__}
    if has_timm():
        import timm

        versions["timm"] = timm.__version__
    if has_onnxruntime():
        versions["onnxruntime"] = importlib.metadata.version("onnxruntime")
    names = [line.split(":", 1)[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return the commit of the measured source, or None if the source is not in a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def parts(photographs: Path = Path()) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return a dict: name of the part -> function that measures it. Batches are smaller on a CPU than on a GPU.

    Args:
        photographs: folder of JPEG files for the suite `photographs`.
    """
    from resnext_ignite.benchmark.checkpoints import measure_checkpoint
    from resnext_ignite.benchmark.data import measure_data
    from resnext_ignite.benchmark.end_to_end import measure_end_to_end
    from resnext_ignite.benchmark.evaluation import measure_evaluation
    from resnext_ignite.benchmark.exporting import has_onnxruntime, measure_export
    from resnext_ignite.benchmark.folders import measure_folders
    from resnext_ignite.benchmark.growth import measure_growth
    from resnext_ignite.benchmark.kernels import measure_kernels
    from resnext_ignite.benchmark.photographs import measure_photographs
    from resnext_ignite.benchmark.ranks import measure_ranks
    from resnext_ignite.benchmark.setup import measured_device
    from resnext_ignite.benchmark.startup import measure_startup
    from resnext_ignite.benchmark.training import Workload, measure_overhead, measure_training

    gpu = measured_device().type == "cuda"
    large, iterations, rounds = (128, 10, 7) if gpu else (32, 1, 3)
    work = Workload(_LARGE, "cifar_resnext29_8x64d", large, 32, 10, iterations)
    kernels = {f"cifar_resnext29_{cardinality}x64d": (128 if gpu else 4, 32) for cardinality in (8, 16)}
    kernels["resnext50_32x4d"] = (64 if gpu else 2, 224)
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "data": measure_data,
        "train": lambda: measure_training(work, rounds),
        "overhead": lambda: measure_overhead(_SMALL if not gpu else _LARGE),
        "eval": lambda: measure_evaluation(work, rounds),
        "startup": lambda: measure_startup(_SMALL),
        "checkpoint": lambda: measure_checkpoint({_LARGE: large, _SMALL: 128}),
        "ranks": lambda: measure_ranks({_LARGE: large if gpu else 16, _SMALL: 128}, rounds, iterations if gpu else 1),
        "kernels": lambda: measure_kernels(kernels),
        "growth": lambda: measure_growth(_SMALL),
        "folders": measure_folders,
        "photographs": lambda: measure_photographs(photographs),
    }
    if has_onnxruntime():
        found["export"] = lambda: measure_export("cifar_resnext29_8x64d")
    if gpu:
        imagenet = Workload(_IMAGENET, "resnext50_32x4d", 64, 224, 1000, iterations)
        found["train:resnext50_32x4d"] = lambda: measure_training(imagenet, rounds)
        found["photographs:resnext50_32x4d"] = lambda: measure_end_to_end(photographs, imagenet, rounds=rounds)
        found["eval:resnext50_32x4d"] = lambda: measure_evaluation(imagenet, rounds)
    return found


def main(arguments: list[str]) -> int:
    """Run the command; raise ResnextError for an error that the user can correct."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.benchmark", description="Time contenders in turns; print medians and ratios."
    )
    parser.add_argument(
        "--suite",
        nargs="+",
        choices=(*SUITES, *_ON_REQUEST, "all"),
        default=["all"],
        help="default: all, without folders, photographs and export",
    )
    parser.add_argument(
        "--json",
        metavar="FILE.json",
        type=Path,
        help="write the machine, every sample and all ratios, and plot them in FILE.png",
    )
    parser.add_argument("--photographs", metavar="FOLDER", type=Path, help="JPEG files for the suite photographs")
    parser.add_argument("--continue", action="store_true", dest="go_on", help="skip the suites that FILE.json holds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU, if any")
    parsed = parser.parse_args(arguments)
    wanted = SUITES if "all" in parsed.suite else parsed.suite
    if parsed.go_on and parsed.json is None:
        raise ConfigError("--continue: name the file to continue with --json FILE.json")
    if parsed.json is not None and parsed.json.suffix != ".json":
        raise ConfigError(f"--json {parsed.json}: the name must end in .json; the plot is written beside it")
    if "photographs" in wanted and parsed.photographs is None:
        raise ConfigError("--suite photographs: name a folder of JPEG files with --photographs FOLDER")
    choose_device(parsed.device)
    measured = parts(parsed.photographs or Path())
    if "export" in wanted and "export" not in measured:
        raise ConfigError("--suite export: onnxruntime is missing; pip install 'resnext-ignite[export]'")

    results: dict[str, Any] = {"machine": machine(), "suites": {}, "ratios": {}}
    if parsed.go_on and parsed.json.exists():
        results = load_results(parsed.json, results)
    for name, measure in measured.items():
        suite, _, model = name.partition(":")
        if suite not in wanted or name in results["suites"]:
            continue
        begun = time.monotonic()
        result = measure()
        results["suites"][name] = {**result, "took_s": time.monotonic() - begun}
        results["ratios"] |= {f"{r}, {model}" if model else r: value for r, value in result["ratios"].items()}
        print_result(name, result)
        if parsed.json:
            # Write after each part, so that an interruption loses only the current part.
            write(parsed.json, results)
    if parsed.json:
        from resnext_ignite.benchmark.plot import draw_benchmark
        from resnext_ignite.plots.figures import save_figure

        save_figure(draw_benchmark(results), parsed.json.with_suffix(".png"))
    return 0


def load_results(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Return the results in a file, so that further suites can be added to them.

    Args:
        path: a JSON file that an earlier call of the command wrote.
        results: the results of this call. Only its `machine` is used: it must equal `machine` in the file, except for
            the date.

    Raises:
        ConfigError: the results in the file are from another machine, other versions or another commit.
    """
    before: dict[str, Any] = json.loads(path.read_text())
    then, now = before["machine"], results["machine"]
    differs = [key for key in now if key != "date" and then.get(key) != now[key]]
    if differs:
        key = differs[0]
        raise ConfigError(f"--continue: {path}: {key} was {then.get(key)}, and is {now[key]}; name another file")
    return before


def choose_device(name: str) -> None:
    """Hide all GPUs from this process and its children if `name` is "cpu".

    Raises:
        ConfigError: `name` is "cuda", and there is no GPU.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no GPU that torch can use; leave it out")


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results as JSON, atomically."""
    from resnext_ignite.runtime.storage import replace_durably

    def write_to(file: IO[bytes]) -> None:
        file.write((json.dumps(results, indent=1) + "\n").encode())

    replace_durably(path, write_to)


def print_result(name: str, result: dict[str, Any]) -> None:
    """Print the median and the range of each contender of a suite, and the ratios of the suite."""
    for contender, values in result["samples"].items():
        spread = f"{min(values):.4g} to {max(values):.4g}"
        print(f"{name}: {contender}: {median(values):.4g} {result['unit']} ({spread})")
    for ratio, value in result["ratios"].items():
        print(f"{name}: {ratio} = {value:.4g}")
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
