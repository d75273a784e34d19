"""Measures run times. Contenders take turns (A B A B ...), so that a drift in machine speed affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from tqdm import tqdm


def in_turns(
    contenders: dict[str, Callable[[], float]], rounds: int, title: str = "", *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Call each contender, a function that returns a measurement, once per round; return all measurements by name.

    Args:
        title: title of the progress bar; empty: no progress bar.
        warm_up: begin with an extra round, and discard its values.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    turns = range(-1 if warm_up else 0, rounds)
    with tqdm(total=len(turns) * len(contenders), desc=title, leave=False, disable=None if title else True) as bar:
        for turn in turns:
            for name, contender in contenders.items():
                bar.set_postfix_str(name)
                value = contender()
                if turn >= 0:
                    samples[name].append(value)
                bar.update()
    return samples


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each contender's values."""
    return {name: median(values) for name, values in samples.items()}


def timed(device: torch.device, work: Callable[[], object], times: int = 1) -> float:
    """Call `work` `times` times in a row; return the mean duration of a call in seconds.

    On a GPU, CUDA events measure the duration; on a CPU, `time.perf_counter` does.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times
    begun = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begun) / times


def kernel_timer(device: torch.device, work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that measures a kernel and returns the mean duration of a call in seconds.

    On a CPU, the function calls the kernel once. On a GPU, it calls the kernel 20 times in a row, to hide the launch
    overhead.
    """
    return lambda: timed(device, work, 20 if device.type == "cuda" else 1)
