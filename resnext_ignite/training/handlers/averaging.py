"""Averages of the weights over a run: Lookahead's slow weights, the moving average, and its BatchNorm statistics."""

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
    """Slow weights that follow the trained ones every so often, and from which these go on (arXiv:1907.08610, alg. 1).

    The optimizer's momentum and BatchNorm's statistics go on as they are. After the last iteration of `max_epochs` the
    weights are the slow ones; a run that ends before, by patience or a target, keeps those that it was judged by.
    Attach it to ITERATION_COMPLETED, before what averages or measures the weights.

    Args:
        model: the raw model, with the weights at which the run starts.
        every: iterations between two steps of the slow weights.
        alpha: share of the way to the weights that such a step goes.
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
        """The slow weights, by their names in the model."""
        return {"slow": dict(self._slow)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weight in self._slow.items():
            weight.copy_(state["slow"][name])


class WeightAverage(EMAHandler):
    """Ignite's moving average of weights and BatchNorm statistics, updated in a handful of fused calls.

    Ignite's own loops over all tensors (hundreds of small kernels an iteration), and by default shares the live
    model's BatchNorm buffers.

    Args:
        model: the raw model.
        decay: weight of the old average an iteration.
        start: iterations after which the average begins; until then it is the model.
    """

    def __init__(self, model: nn.Module, decay: float, start: int = 0) -> None:
        super().__init__(model, momentum=1 - decay, handle_buffers="update")
        self.start = start

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        # A weight of 1 copies, bit for bit.
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
    """Takes the BatchNorm statistics of an averaged model anew: those of averaged weights are not averaged statistics.

    They become the mean, over the micro-batches of the first `batches` iterations of the epoch that was just trained
    (all, where it has fewer), of this rank's share of each; ghost batches are not told apart, what is frozen keeps its
    own. They depend on the weights, the seed and the epoch alone, and are still to be averaged over ranks. Call it
    right before an evaluation.

    Args:
        model: is never trained itself.
        loader: the training batches; it is left as it is.
        batches: iterations.
        dtype: arithmetic of the forward pass (autocast; float32: none).
    """

    def __init__(self, model: nn.Module, loader: TrainLoader, batches: int, dtype: torch.dtype) -> None:
        self.model, self.loader, self.batches, self.dtype = model, loader, batches, dtype
        model.train()
        self._norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d) and norm.training]
        model.eval()
        for norm in self._norms:
            # Each batch counts as much as every other.
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
            # No further: of the next epoch's images none is trained on yet.
            for batch in itertools.islice(batches, min(self.batches, len(loader))):
                for images in batch.images.chunk(loader.order.accumulate):
                    self.model(images)
        self.model.eval()


def build_average(config: Config, model: nn.Module, iterations_per_epoch: int) -> WeightAverage | None:
    """The moving average of a config, or None where it has none.

    Raises:
        ConfigError: `train.ema_horizon` is not even two iterations.
    """
    train = config.train
    if not train.averages:
        return None
    decay = train.ema_decay
    if train.ema_horizon:
        remembered = train.ema_horizon * iterations_per_epoch
        if remembered < 2:
            raise ConfigError(
                f"train.ema_horizon: {train.ema_horizon:g} epochs are {remembered:.3g} iterations, which averages "
                f"nothing; at least {math.ceil(2000 / iterations_per_epoch) / 1000:g}"
            )
        decay = 1 - 1 / remembered
    return WeightAverage(model, decay, round(train.ema_start * iterations_per_epoch))


def build_fresh_statistics(
    config: Config, average: WeightAverage | None, loader: TrainLoader
) -> FreshStatistics | None:
    """What takes the statistics of a config's average anew, or None where they are averaged."""
    if average is None or not config.train.ema_reestimate_bn:
        return None
    return FreshStatistics(average.ema_model, loader, config.train.ema_reestimate_bn, DTYPES[config.train.precision])


def build_lookahead(config: Config, model: nn.Module) -> Lookahead | None:
    """The Lookahead of a config, or None where it has none."""
    train = config.train
    return Lookahead(model, train.lookahead, train.lookahead_alpha) if train.lookahead else None
