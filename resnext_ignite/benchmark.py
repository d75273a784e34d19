"""Side by side with what one would use instead: `python -m resnext_ignite.benchmark [--suite NAME]`.

Contenders run in turns within one process, A B A B ..., so that a machine whose speed drifts drifts for both; medians
with their spread are printed, and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from resnext_ignite.errors import run_command

_LARGE_MODEL = "configs/cifar10_resnext29_8x64d.yaml"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
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
    parser.add_argument(
        "--suite", choices=("data", "train", "checkpoint", "ranks", "all"), default="all", help="default: all"
    )
    parser.add_argument(
        "--config",
        default="configs/cifar10_resnext11_small.yaml",
        help="whose model the train suite measures; the checkpoint and ranks suites: besides cifar_resnext29_8x64d",
    )
    parser.add_argument("--json", metavar="FILE", help="write the machine, every sample and the ratios")
    parsed = parser.parse_args(arguments)

    from resnext_ignite import benchmark_ranks, benchmark_suites

    suites: dict[str, Callable[[], dict[str, Any]]] = {
        "data": benchmark_suites.measure_data,
        "train": lambda: benchmark_suites.measure_overhead(Path(parsed.config)),
        "checkpoint": lambda: benchmark_suites.measure_checkpoint([Path(_LARGE_MODEL), Path(parsed.config)]),
        # A smaller batch than the recipe's where an iteration would take a CPU half a minute.
        "ranks": lambda: benchmark_ranks.measure_ranks({Path(_LARGE_MODEL): 32, Path(parsed.config): 128}),
    }
    results = {name: suite() for name, suite in suites.items() if parsed.suite in (name, "all")}
    for name, result in results.items():
        for contender, values in result["samples"].items():
            spread = f"{min(values):.4g} to {max(values):.4g}"
            print(f"{name}: {contender}: {median(values):.4g} {result['unit']} ({spread})")
        for ratio, value in result["ratios"].items():
            print(f"{name}: {ratio} = {value:.4g}")
    if parsed.json:
        Path(parsed.json).write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
