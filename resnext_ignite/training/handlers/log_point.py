"""Defines the log point: the handler that synchronises the ranks and computes the training metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine

from resnext_ignite.distributed.stopping import StopAgreement, SyncSchedule
from resnext_ignite.runtime.errors import DataError, NonFiniteError
from resnext_ignite.training.engines import RunEvents
from resnext_ignite.training.metrics import TrainingSums


class LogPoint:
    """Synchronises the ranks: they decide together whether to stop, and compute the training metrics over all ranks.

    Attach this handler to ITERATION_COMPLETED. The synchronisations at multiples of `every_iterations` and at the end
    of an epoch are called log points; a resumed run has them at the same iterations. The ranks also synchronise about
    every five seconds (`SyncSchedule`) and before each save inside an epoch. Each synchronisation checks the losses
    and gradients for non-finite values; every evaluation and every save follows a synchronisation.

    Each synchronisation sets `engine.state.metrics` to the values over all ranks since the last log point: loss,
    top1_error (percent, of augmented images), lr, images_per_s, skipped_updates. A log point fires
    RunEvents.METRICS_READY. Log points and the synchronisations of `SyncSchedule` fire RunEvents.PROGRESS.

    Args:
        stop: all ranks use it to stop at the same iteration.
        lr_at: returns the learning rate of an iteration, counted from 1.
        every_iterations: iterations between two log points.
        max_skipped: maximum number of unreadable images per epoch.
        save_due: returns whether a checkpoint is written after an iteration inside an epoch.

    Raises:
        NonFiniteError: a loss or gradient was not finite.
        DataError: more than `max_skipped` images of this epoch could not be read.
    """

    # Length of `_since_log` and `_epoch`, which hold the sums of TrainingSums and the seconds.
    _SIZE = len(TrainingSums.NAMES) + 1

    def __init__(
        self,
        stop: StopAgreement,
        lr_at: Callable[[int], float],
        every_iterations: int,
        max_skipped: int = 0,
        save_due: Callable[[int], bool] = lambda iteration: False,
    ) -> None:
        self.stop, self.lr_at, self.every_iterations = stop, lr_at, every_iterations
        self.max_skipped, self.save_due = max_skipped, save_due
        self.last: dict[str, float] = {}
        self._sync = SyncSchedule(stop)
        self._since_log = torch.zeros(self._SIZE, dtype=torch.float64)
        self._epoch = torch.zeros(self._SIZE, dtype=torch.float64)

    def begin_epoch(self, engine: Engine) -> None:
        """Reset the sums of the epoch, and restart the clock, to exclude the time of the evaluation before this epoch.

        A run that resumes inside an epoch keeps the sums. Attach this method to EPOCH_STARTED.
        """
        self._sync.start(engine.state.iteration)
        if engine.state.iteration % (engine.state.epoch_length or 1) == 0:
            self._epoch.zero_()

    def __call__(self, engine: Engine) -> None:
        iteration, length = engine.state.iteration, engine.state.epoch_length
        assert length is not None
        logs = iteration % self.every_iterations == 0 or iteration % length == 0
        sync_due = self._sync.due(iteration)
        if logs or sync_due or self.save_due(iteration):
            self._synchronise(engine, iteration)
            if logs:
                self._since_log.zero_()
                self.last = dict(engine.state.metrics)
                engine.fire_event(RunEvents.METRICS_READY)
            if logs or sync_due:
                engine.fire_event(RunEvents.PROGRESS)
        if self.stop.reason and iteration != length * (engine.state.max_epochs or 0):
            engine.terminate(skip_completed=True)

    def _synchronise(self, engine: Engine, iteration: int) -> None:
        # (world_size, 7): the five sums, the first bad iteration, the seconds
        numbers = self._sync.exchange(iteration, engine.state.sums.read_and_reset())
        first_bad = numbers[:, -2].min().item()
        if first_bad <= iteration:
            raise NonFiniteError(
                f"iteration {first_bad:.0f}: the loss or gradient is not finite "
                f"(learning rate {self.lr_at(int(first_bad)):.4g}); "
                "lower optimizer.lr, lengthen schedule.warmup_epochs or set train.clip_grad_norm"
            )
        sums = torch.cat([numbers[:, :-2].sum(0), numbers[:, -1].max()[None]])
        self._since_log += sums
        self._epoch += sums
        loss, correct, images, _, skipped_updates, seconds = self._since_log.tolist()
        engine.state.metrics.update(
            loss=loss / max(images, 1),
            top1_error=100 * (1 - correct / max(images, 1)),
            lr=self.lr_at(iteration),
            images_per_s=images / max(seconds, 1e-9),
            skipped_updates=skipped_updates,
        )
        unreadable = int(self._epoch[3])
        if unreadable > self.max_skipped:
            raise DataError(
                f"{unreadable} training images of this epoch cannot be read, more than data.max_skipped "
                f"{self.max_skipped}; repair the files named above, or raise data.max_skipped"
            )

    def epoch_metrics(self) -> dict[str, float | None]:
        """Return training loss, images/s, and numbers of skipped images and updates over the epoch so far.

        Loss and images/s are None before the first synchronisation.
        """
        loss, _, images, unreadable, skipped_updates, seconds = self._epoch.tolist()
        return {
            "train_loss": loss / images if images else None,
            "images_per_s": images / max(seconds, 1e-9) if images else None,
            "skipped_images": int(unreadable),
            "skipped_updates": int(skipped_updates),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last log point and over the epoch, and the last metrics."""
        return {"since_log": self._since_log.tolist(), "epoch": self._epoch.tolist(), "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._since_log = torch.tensor(state["since_log"], dtype=torch.float64)
        self._epoch = torch.tensor(state["epoch"], dtype=torch.float64)
        self.last = state["last"]
