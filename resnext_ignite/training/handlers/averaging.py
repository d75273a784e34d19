"""Averages the weights during a run: Lookahead, and a moving average with its BatchNorm statistics."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from typing import Any

import torch
from ignite.engine import Engine
from ignite.handlers import EMAHandler
from torch import nn

from resnext_ignite.config.schema import Config
from resnext_ignite.data.loaders import TrainLoader
from resnext_ignite.models.resnext import GhostBatchNorm2d
from resnext_ignite.runtime.devices import DTYPES
from resnext_ignite.runtime.errors import ConfigError


class Lookahead:
    """Lookahead (arXiv:1907.08610, algorithm 1): slow weights that follow the trained weights.

    Every `every` iterations, the slow weights step towards the trained weights, and training continues from the slow
    weights. The optimizer's momentum and the BatchNorm statistics do not change. After the last iteration of epoch
    `max_epochs`, the model gets the slow weights. A run that ends earlier, for example because its error has reached
    the target, keeps the weights that were evaluated. Attach this handler to ITERATION_COMPLETED, before the handlers
    that average or save the weights.

    Args:
        model: the unwrapped model, with its initial weights.
        every: iterations between two steps of the slow weights.
        alpha: fraction of the distance from the slow to the trained weights that one step covers.
    """

    def __init__(self, model: nn.Module, every: int, alpha: float) -> None:
        self.every, self.alpha = every, alpha
        self._fast = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
        self._slow = {name: weight.clone() for name, weight in self._fast.items()}

    def __call__(self, engine: Engine) -> None:
        state, fast, slow = engine.state, list(self._fast.values()), list(self._slow.values())
        if state.iteration % self.every == 0:
            torch._foreach_lerp_(slow, fast, self.alpha)
        elif state.iteration != (state.max_epochs or 0) * (state.epoch_length or 0):
            return
        torch._foreach_copy_(fast, slow)

    def state_dict(self) -> dict[str, Any]:
        """Return the slow weights, by their names in the model."""
        return {"slow": dict(self._slow)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weight in self._slow.items():
            weight.copy_(state["slow"][name])


class WeightAverage(EMAHandler):
    """Ignite's moving average of weights and BatchNorm statistics, updated with a few fused calls.

    Ignite's own update loops over all tensors (hundreds of small kernels per iteration). By default, Ignite does not
    average the BatchNorm statistics: the averaged model and the trained model use the same buffers. Here, the averaged
    model has its own buffers.

    Args:
        model: the unwrapped model.
        decay: weight of the old average in each iteration's update.
        start: iterations after which averaging begins; until then, the average equals the model.
    """

    def __init__(self, model: nn.Module, decay: float, start: int = 0) -> None:
        super().__init__(model, momentum=1 - decay, handle_buffers="update")
        self.start = start

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        # lerp with weight 1 is an exact copy.
        weight = getattr(engine.state, name) if engine.state.iteration > self.start else 1.0
        with torch.no_grad():
            ours, theirs = self._floats(self.ema_model), self._floats(self.model)
            torch._foreach_lerp_(ours, theirs, weight)
            for mine, its in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
                if not mine.is_floating_point():
                    mine.copy_(its)

    @staticmethod
    def _floats(model: nn.Module) -> list[torch.Tensor]:
        tensors = [*(parameter.data for parameter in model.parameters()), *model.buffers()]
        return [tensor for tensor in tensors if tensor.is_floating_point()]


class FreshStatistics:
    """Re-estimates the BatchNorm statistics of an averaged model: averaged statistics do not fit averaged weights.

    Call this handler right before an evaluation. It loads the batches of the last trained epoch again, for the first
    `batches` iterations or, if the epoch is shorter, for all. It runs the forward pass of the averaged model on their
    micro-batches. The new statistics are the mean over these micro-batches. Each rank uses its own slice of each
    micro-batch, and does not divide this slice into ghost batches. Frozen layers keep their statistics. The new
    statistics depend only on the weights, the seed and the epoch; the caller must still average them over ranks.

    Args:
        model: the averaged model; it is never trained directly.
        loader: the loader of the training batches; it is copied, not changed.
        batches: maximum number of iterations.
        dtype: precision of the forward pass, under autocast; float32: no autocast.
    """

    def __init__(self, model: nn.Module, loader: TrainLoader, batches: int, dtype: torch.dtype) -> None:
        self.model, self.loader, self.batches, self.dtype = model, loader, batches, dtype
        model.train()
        self._norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d) and norm.training]
        model.eval()
        for norm in self._norms:
            # With momentum None, BatchNorm computes the plain mean over all batches.
            norm.momentum = None
            if isinstance(norm, GhostBatchNorm2d):
                norm.ghost_batch = len(loader.order.share)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        loader = copy.copy(self.loader)
        loader.start_iteration = max(engine.state.epoch - 1, 0) * len(loader)
        for norm in self._norms:
            norm.reset_running_stats()
            norm.train()
        autocast = torch.autocast(loader.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with contextlib.closing(iter(loader)) as batches, autocast:
            # Stop at the end of the epoch: the loader would continue with the next epoch, which is not trained yet.
            for batch in itertools.islice(batches, min(self.batches, len(loader))):
                for images in batch.images.chunk(loader.order.accumulate):
                    self.model(images)
        self.model.eval()


def build_average(config: Config, model: nn.Module, iterations_per_epoch: int) -> WeightAverage | None:
    """Build the moving average of the weights; return None if the config does not request one.

    Raises:
        ConfigError: `train.ema_horizon` is shorter than two iterations.
    """
    train = config.train
    if not train.averages:
        return None
    decay = train.ema_decay
    if train.ema_horizon:
        horizon_iterations = train.ema_horizon * iterations_per_epoch
        if horizon_iterations < 2:
            raise ConfigError(
                f"train.ema_horizon: {train.ema_horizon:g} epochs are "
                f"{horizon_iterations:.3g} iterations, which averages "
                f"nothing; at least {math.ceil(2000 / iterations_per_epoch) / 1000:g}"
            )
        decay = 1 - 1 / horizon_iterations
    return WeightAverage(model, decay, round(train.ema_start * iterations_per_epoch))


def build_fresh_statistics(
    config: Config, average: WeightAverage | None, loader: TrainLoader
) -> FreshStatistics | None:
    """Build the handler that re-estimates the BatchNorm statistics; return None if the config does not request it."""
    if average is None or not config.train.ema_reestimate_bn:
        return None
    return FreshStatistics(average.ema_model, loader, config.train.ema_reestimate_bn, DTYPES[config.train.precision])


def build_lookahead(config: Config, model: nn.Module) -> Lookahead | None:
    """Build Lookahead; return None if the config does not request it."""
    train = config.train
    return Lookahead(model, train.lookahead, train.lookahead_alpha) if train.lookahead else None
