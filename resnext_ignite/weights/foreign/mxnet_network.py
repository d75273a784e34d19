"""Adapts ResNeXts of MXNet's symbol zoo: their BatchNorms have another eps, and an extra one normalises the images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.weights.foreign.graph import with_project_eps
from resnext_ignite.weights.foreign.keys import Statistics, Weights

# The epsilon of every BatchNorm in the symbol zoo's ResNeXt, including the BatchNorm of the images.
_EPS = 2e-5


def adapt_symbol_zoo(weights: Weights) -> None:
    """Change the variances in place, so that this project's eps gives the same BatchNorm as the symbol zoo's eps."""
    for name in weights:
        if name.endswith("running_var") and not name.startswith("bn_data"):
            weights[name] = with_project_eps(weights[name], _EPS)


def statistics_of_data(weights: Weights, file: Path) -> tuple[Statistics, Statistics] | None:
    """Remove the images' BatchNorm from the weights, and return it as mean and std for values from 0 to 1.

    Return None if there is none. MXNet computes with a gamma of 1 (fix_gamma), whatever gamma is in the file. The
    result follows from (x - m) / s + b = (x - (m - b * s)) / s, with x from 0 to 255.

    Raises:
        CheckpointError: a part of the BatchNorm is missing, or its mean or std is not valid.
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
