"""Builds the optimizer and the learning-rate schedule of a config. `config/sections.py` defines the config keys."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import nn

from resnext_ignite.config.schema import Config
from resnext_ignite.optim.muon import Muon
from resnext_ignite.optim.schedules import IterationLRScheduler, cosine, linear, multistep, warmup


def lr_factor(config: Config, iterations_per_epoch: int) -> Callable[[int], float]:
    """Return a function that maps an iteration, counted from 0, to the factor by which `optimizer.lr` is multiplied."""
    schedule = config.schedule
    warm = round(schedule.warmup_epochs * iterations_per_epoch)
    total = config.train.epochs * iterations_per_epoch
    milestones = [milestone * iterations_per_epoch for milestone in schedule.milestones]
    shapes: dict[str, Callable[[int], float]] = {
        "multistep": lambda iteration: multistep(iteration, milestones, schedule.gamma),
        "cosine": lambda iteration: cosine(iteration, warm, total, schedule.final_factor),
        "triangular": lambda iteration: linear(iteration, warm, total, schedule.final_factor),
        "constant": lambda iteration: 1.0,
    }
    shape = shapes[schedule.name]
    return lambda iteration: warmup(iteration, warm) * shape(iteration)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    decay_norm_and_bias: bool,
    backbone_lr_factor: float = 1.0,
    without: Container[str] = (),
) -> list[dict[str, Any]]:
    """Return the trainable parameters as optimizer groups, one for each pair of weight decay and `lr_factor`.

    A group whose factor is 1 has no key `lr_factor`.

    Args:
        model: the model; its last layer is `fc`.
        weight_decay: weight decay of the parameters with more than one dimension.
        decay_norm_and_bias: also use this weight decay for parameters with one dimension (norm weights and biases); if
            false, these parameters do not decay.
        backbone_lr_factor: `lr_factor` of all parameters except the weights and biases of `fc`.
        without: names of parameters to leave out.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in without:
            decay = weight_decay if decay_norm_and_bias or parameter.ndim > 1 else 0.0
            factor = 1.0 if name.startswith("fc.") else backbone_lr_factor
            groups.setdefault((decay, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, **({} if factor == 1 else {"lr_factor": factor})}
        for (decay, factor), parameters in groups.items()
    ]


def hidden_convolutions(model: nn.Module) -> dict[str, int]:
    """Return a dict of the trainable convolutions that Muon updates: name of the weight -> number of channel groups.

    SGD updates the stem. Muon's author also leaves the first layer to another optimizer. In the small window that a
    filter of the stem covers, the mean brightness dominates, so the stem's gradient is large in this one direction.
    Orthogonalisation would scale all other directions, which are mostly noise, to the same size.
    """
    return {
        f"{name}.weight": module.groups
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad and name.partition(".")[0] != "conv1"
    }


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of a config for a model's parameters."""
    optimizer = config.optimizer
    convolutions = hidden_convolutions(model) if optimizer.name == "muon" else {}
    groups = parameter_groups(
        model,
        optimizer.weight_decay,
        decay_norm_and_bias=optimizer.decay_norm_and_bias,
        backbone_lr_factor=optimizer.backbone_lr_factor,
        without=convolutions,
    )
    if optimizer.name == "sgd":
        return torch.optim.SGD(
            groups, lr=optimizer.lr, momentum=optimizer.momentum, nesterov=optimizer.nesterov, fused=True
        )
    for conv_groups in sorted(set(convolutions.values())):
        groups.append(
            {
                "params": [model.get_parameter(name) for name, count in convolutions.items() if count == conv_groups],
                "conv_groups": conv_groups,
                "lr_factor": optimizer.muon_lr / optimizer.lr * optimizer.backbone_lr_factor,
                "momentum": optimizer.muon_momentum,
                "weight_decay": optimizer.muon_weight_decay,
            }
        )
    return Muon(
        groups,
        lr=optimizer.lr,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        exact=bool(config.train.deterministic),
    )


def build_lr_scheduler(
    config: Config, optimizer: torch.optim.Optimizer, iterations_per_epoch: int
) -> IterationLRScheduler:
    """Build the learning-rate handler of a config; attach it to ITERATION_STARTED."""
    return IterationLRScheduler(optimizer, config.optimizer.lr, lr_factor(config, iterations_per_epoch))
