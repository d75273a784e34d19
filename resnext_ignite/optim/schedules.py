"""Defines the learning-rate schedules, as pure functions of the iteration, and the handler that sets the rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from ignite.engine import Engine
from ignite.handlers.param_scheduler import ParamScheduler


def warmup(iteration: int, length: int) -> float:
    """Return the factor for an iteration, counted from 0: (iteration + 1) / length, but at most 1; 1 if length is 0."""
    return min(1.0, (iteration + 1) / length) if length else 1.0


def multistep(iteration: int, milestones: Sequence[int], gamma: float) -> float:
    """Return gamma ** n, where n is the number of milestones (in iterations) that are reached."""
    return gamma ** sum(iteration >= milestone for milestone in milestones)


def cosine(iteration: int, start: int, end: int, final: float) -> float:
    """Return the value of half a cosine wave from 1 at `start` to `final` at `end` (SGDR, arXiv:1608.03983, eq. 5)."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * _progress(iteration, start, end)))


def linear(iteration: int, start: int, end: int, final: float) -> float:
    """Return a value on the line from 1 at `start` to `final` at `end`. Warm-up and line together form a triangle."""
    return final + (1 - final) * (1 - _progress(iteration, start, end))


def _progress(iteration: int, start: int, end: int) -> float:
    return min(max((iteration - start) / max(end - start, 1), 0.0), 1.0)


class IterationLRScheduler(ParamScheduler):
    """Sets the learning rate before each iteration to `lr` * `factor(iteration)`.

    Ignite's schedulers count their calls. This one reads the iteration from the engine, so it needs no saved state. A
    resumed run, or a run continued with more epochs, therefore has the right rate in each iteration.

    Args:
        optimizer: each of its groups gets the rate, multiplied by the group's `lr_factor` if there is one.
        lr: learning rate at factor 1.
        factor: function of the iteration, counted from 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float, factor: Callable[[int], float]) -> None:
        super().__init__(optimizer, "lr")
        self.lr, self.factor = lr, factor

    def __call__(self, engine: Engine | None, name: str | None = None) -> None:
        """Set the rate; the engine's iteration counts from 1."""
        if engine is not None:
            self.event_index = engine.state.iteration - 1
        super().__call__(engine, name)

    def get_param(self) -> list[float]:
        """Return the rates of the groups at the current iteration."""
        rate = self.rate_at(self.event_index + 1)
        return [rate * group.get("lr_factor", 1.0) for group in self.optimizer_param_groups]

    def rate_at(self, iteration: int) -> float:
        """Return the rate of an iteration, counted from 1."""
        return self.lr * self.factor(iteration - 1)
