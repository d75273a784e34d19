"""Handlers that belong to the iteration itself: the log point, and the moving average of the weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine
from ignite.handlers import EMAHandler

from resnext_ignite.config import Config
from resnext_ignite.distributed import StopAgreement
from resnext_ignite.engines import RunEvents
from resnext_ignite.errors import NonFiniteError

_LONGEST_SILENCE_S = 5.0


class LogPoint:
    """Reads the training metrics of all ranks every so often, settles stops, and refuses numbers that are not finite.

    A log point is due `every_iterations` after the last one or about five seconds after it, whichever comes first -
    each one settles when the next is, for all ranks -, at the end of an epoch, and before a save: so that nothing
    computed after a bad number is ever evaluated or written. Attach it to ITERATION_COMPLETED.

    Sets `engine.state.metrics`: loss, top1_error (percent, of augmented images), lr, images_per_s; then fires
    RunEvents.METRICS_READY.

    Args:
        stop: agrees on stops over all ranks.
        lr: reads the learning rate at hand.
        every_iterations: longest distance of two log points.
        save_due: whether a checkpoint is written after an iteration inside an epoch.

    Raises:
        NonFiniteError: a loss or gradient was not finite.
    """

    def __init__(
        self,
        stop: StopAgreement,
        lr: Callable[[], float],
        every_iterations: int,
        save_due: Callable[[int], bool] = lambda iteration: False,
    ) -> None:
        self.stop, self.lr, self.every_iterations, self.save_due = stop, lr, every_iterations, save_due
        self.next_iteration: int | None = None
        self._last_iteration = 0
        self._since = time.monotonic()
        self._epoch = torch.zeros(3, dtype=torch.float64)

    def begin_epoch(self, engine: Engine) -> None:
        """Attach to EPOCH_STARTED: leave the time of evaluations out, and start an epoch's sums anew."""
        if self.next_iteration is None:
            self._last_iteration = engine.state.iteration
            self.next_iteration = engine.state.iteration + self.every_iterations
        self._since = time.monotonic()
        if engine.state.iteration % (engine.state.epoch_length or 1) == 0:
            self._epoch.zero_()

    def __call__(self, engine: Engine) -> None:
        iteration, length = engine.state.iteration, engine.state.epoch_length
        assert length is not None
        assert self.next_iteration is not None
        if iteration >= self.next_iteration or iteration % length == 0 or self.save_due(iteration):
            self._read(engine, iteration)
        if self.stop.reason and iteration != length * (engine.state.max_epochs or 0):
            engine.terminate(skip_completed=True)

    def _read(self, engine: Engine, iteration: int) -> None:
        numbers = engine.state.sums.read_and_reset()
        elapsed = time.monotonic() - self._since
        # (world_size, 5): loss, correct answers, images, first bad iteration, seconds
        numbers = self.stop.exchange(torch.cat([numbers, torch.tensor([elapsed], dtype=torch.float64)]))
        first_bad = numbers[:, 3].min().item()
        if first_bad <= iteration:
            raise NonFiniteError(
                f"iteration {first_bad:.0f}: the loss or gradient is not finite (learning rate {self.lr():.4g}); "
                "lower optimizer.lr, lengthen schedule.warmup_epochs or set train.clip_grad_norm"
            )
        loss, correct, images = numbers[:, :3].sum(0).tolist()
        seconds = numbers[:, 4].max().item()
        self._epoch += torch.tensor([loss, images, seconds], dtype=torch.float64)
        engine.state.metrics.update(
            loss=loss / images,
            top1_error=100 * (1 - correct / images),
            lr=self.lr(),
            images_per_s=images / max(seconds, 1e-9),
        )
        in_five_seconds = int(_LONGEST_SILENCE_S / max(seconds, 1e-9) * (iteration - self._last_iteration))
        self.next_iteration = iteration + max(1, min(self.every_iterations, in_five_seconds))
        self._last_iteration, self._since = iteration, time.monotonic()
        engine.fire_event(RunEvents.METRICS_READY)

    def epoch_means(self) -> dict[str, float | None]:
        """Training loss and images/s over the epoch so far; None before the first log point."""
        loss, images, seconds = self._epoch.tolist()
        if not images:
            return {"train_loss": None, "images_per_s": None}
        return {"train_loss": loss / images, "images_per_s": images / max(seconds, 1e-9)}

    def state_dict(self) -> dict[str, Any]:
        """The epoch's sums; log points themselves start anew at a checkpoint, before which there always is one."""
        return {"epoch": self._epoch.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch = torch.tensor(state["epoch"], dtype=torch.float64)


class WeightAverage(EMAHandler):
    """Ignite's moving average of weights and BatchNorm statistics, updated in a handful of fused calls.

    Ignite's own loops over all tensors (hundreds of small kernels an iteration), and by default shares the live
    model's BatchNorm buffers.

    Args:
        model: the raw model.
        decay: weight of the old average an iteration.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        super().__init__(model, momentum=1 - decay, handle_buffers="update")

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        with torch.no_grad():
            ours, theirs = self._floats(self.ema_model), self._floats(self.model)
            torch._foreach_lerp_(ours, theirs, getattr(engine.state, name))
            for mine, its in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
                if not mine.is_floating_point():
                    mine.copy_(its)

    @staticmethod
    def _floats(model: torch.nn.Module) -> list[torch.Tensor]:
        tensors = [*(parameter.data for parameter in model.parameters()), *model.buffers()]
        return [tensor for tensor in tensors if tensor.is_floating_point()]


def build_average(config: Config, model: torch.nn.Module) -> WeightAverage | None:
    """The moving average of a config, or None where `train.ema_decay` is 0."""
    return WeightAverage(model, config.train.ema_decay) if config.train.ema_decay else None
