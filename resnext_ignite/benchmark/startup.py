"""Measures the seconds from the start of `train` to the end of its first iteration, and the seconds of the imports."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnext_ignite.runtime.timing import in_turns, medians

_IMPORTS = "import torch, torchvision, ignite.engine, ignite.handlers, ignite.metrics, ignite.distributed"


def measure_startup(config_path: Path, rounds: int = 3) -> dict[str, Any]:
    """Measure the seconds that a run takes to complete its first iteration, and the seconds of the imports alone.

    The run trains on the embedded data set.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = iter(range(1_000_000))

        def first_iteration() -> float:
            command = [sys.executable, "-m", "resnext_ignite.train", "--config", str(config_path)]
            command += ["--output-dir", str(Path(folder) / str(next(runs))), "data.name=shapes", "evaluation.early=[]"]
            return _seconds_until("epoch 1/", [*command, "logging.every_iterations=1"])

        ways: dict[str, Callable[[], float]] = {
            "to the first iteration": first_iteration,
            "imports of torch, torchvision and ignite": lambda: _seconds_until(None, [sys.executable, "-c", _IMPORTS]),
        }
        samples = in_turns(ways, rounds, "startup")
    run, imports = medians(samples).values()
    return {"unit": "s", "samples": samples, "ratios": {"startup_beyond_imports_s": run - imports}}


def _seconds_until(words: str | None, command: list[str]) -> float:
    """Run a command until it writes `words` to standard error, kill it, and return the seconds that it ran.

    If `words` is None, run the command until it exits.

    Raises:
        RuntimeError: the command fails, or exits before it writes `words`.
    """
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if words is not None and words in line:
                seconds = time.perf_counter() - begun
                process.kill()
                return seconds
        process.wait()
    if words is not None or process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}: {''.join(lines[-3:])}")
    return time.perf_counter() - begun
