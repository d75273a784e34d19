"""How everything is measured: contenders in turns, A B A B ..., so that a machine whose speed drifts drifts for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from tqdm import tqdm


def in_turns(
    contenders: dict[str, Callable[[], float]], rounds: int, title: str = "", *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Call each contender once a round; what each returned.

    Args:
        title: of a progress bar; without one there is none.
        warm_up: begin with a round that is not counted.
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
    """The median of each contender."""
    return {name: median(values) for name, values in samples.items()}


def timed(device: torch.device, work: Callable[[], object], times: int = 1) -> float:
    """Seconds of some work on a device, done so many times in a row: by a GPU's own events, by the clock on a CPU."""
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


def timer(device: torch.device, work: Callable[[], object]) -> Callable[[], float]:
    """Times a kernel: on a GPU so many in a row that their launches hide behind the work before."""
    return lambda: timed(device, work, 20 if device.type == "cuda" else 1)
