"""Adapts ResNeXts from MXNet's symbol zoo.

In these networks, BatchNorm has a different eps, and an additional BatchNorm (`bn_data`) normalises the images.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.weights.foreign.graph import with_project_eps
from resnext_ignite.weights.foreign.keys import Statistics, Weights

# The epsilon of every BatchNorm in the symbol zoo's ResNeXt, including `bn_data`.
_EPS = 2e-5


def adapt_symbol_zoo(weights: Weights) -> None:
    """Change the variances in place, so that each BatchNorm computes the same function with this project's eps."""
    for name in weights:
        if name.endswith("running_var") and not name.startswith("bn_data"):
            weights[name] = with_project_eps(weights[name], _EPS)


def statistics_of_data(weights: Weights, file: Path) -> tuple[Statistics, Statistics] | None:
    """Remove `bn_data` from the weights, and return the equivalent mean and std, for values from 0 to 1.

    Return None if the weights have no `bn_data`. MXNet ignores the gamma in the file, and uses 1 instead (fix_gamma).
    `bn_data` computes (x - m) / s + b for x from 0 to 255, with s = sqrt(moving_var + eps). This equals
    (x - (m - b * s)) / s. The mean is therefore (m - b * s) / 255, and the std is s / 255.

    Raises:
        CheckpointError: a part of `bn_data` is missing, or the resulting mean or std is not valid.
    """
    parts = {name: weights.pop(f"bn_data.{name}", None) for name in ("weight", "bias", "running_mean", "running_var")}
    if all(value is None for value in parts.values()):
        return None
    shift, mean, var = (parts[name] for name in ("bias", "running_mean", "running_var"))
    if shift is None or mean is None or var is None or {shift.shape, mean.shape, var.shape} != {torch.Size([3])}:
        raise CheckpointError(f"{file}: bn_data: needs beta, moving_mean and moving_var with 3 channels each")
    std = (var.double() + _EPS).sqrt() / 255
    centre = mean.double() / 255 - shift.double() * std
    if not (torch.isfinite(centre).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise CheckpointError(f"{file}: bn_data: its statistics are not those of images: moving_var {var.tolist()}")
    return _three(centre), _three(std)


def _three(values: Tensor) -> Statistics:
    red, green, blue = values.tolist()
    return red, green, blue
