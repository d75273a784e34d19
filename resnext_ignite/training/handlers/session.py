"""Runs a trainer with its handlers attached: restores a saved state, trains, and finishes the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ignite.engine import Engine, Events
from torch import nn, optim

from resnext_ignite.distributed.stopping import StopAgreement, StopReason
from resnext_ignite.optim.schedules import IterationLRScheduler
from resnext_ignite.runs.checkpoint import load_checkpoint
from resnext_ignite.runs.folder import ENDED, OpenRun, Record
from resnext_ignite.runtime.errors import CheckpointError, OrphanedError, PreemptedError
from resnext_ignite.training.handlers.averaging import WeightAverage
from resnext_ignite.training.handlers.checkpointing import RunState, SaveCheckpoints, last_handled_epoch
from resnext_ignite.training.handlers.evaluation import BestRecord, Evaluation
from resnext_ignite.training.handlers.files import StatusFile

log = logging.getLogger(__name__)
_REASONS = {
    StopReason.NONE: "",
    StopReason.PATIENCE: "no lower error in evaluation.patience evaluations",
    StopReason.TARGET: "evaluation.target_error reached",
    StopReason.TIME_LIMIT: "train.max_hours reached; continue with --resume",
    StopReason.SIGNAL: "",
    StopReason.ORPHANED: "",
}


@dataclass(frozen=True)
class Parts:
    """The parts of a training run. `model` is not wrapped in DDP; `average` is its moving average, or None."""

    model: nn.Module
    average: WeightAverage | None
    optimizer: optim.Optimizer
    lr_scheduler: IterationLRScheduler
    trainer: Engine
    evaluator: Engine

    @property
    def evaluated(self) -> nn.Module:
        """Return the model to evaluate: the moving average if there is one, else the trained model."""
        return self.model if self.average is None else self.average.ema_model


class EpochEnds:
    """Records the last epoch whose EPOCH_COMPLETED handlers have all run.

    In two cases, a run ends before these handlers have all run: it stops after the last iteration of an epoch and saves
    its state immediately, or it stops during an evaluation and abandons this evaluation. When this run resumes, it
    fires EPOCH_COMPLETED before it trains. Attach this handler to EPOCH_COMPLETED, right before the handler that saves
    the checkpoint.

    Args:
        evaluation: the EPOCH_COMPLETED handler that evaluates; its method `due` decides after which epochs.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.last = 0

    def __call__(self, engine: Engine) -> None:
        if not self.evaluation.abandoned:
            self.last = engine.state.epoch

    def outstanding(self, state: dict[str, Any], max_epochs: int) -> bool:
        """Return whether a run must fire EPOCH_COMPLETED when it resumes from a saved state."""
        iteration, length = state["trainer"]["iteration"], state["trainer"]["epoch_length"]
        epoch = iteration // length
        if iteration == 0 or iteration % length:
            return False
        handled = last_handled_epoch(state) >= epoch
        # Older checkpoints do not record the handled epoch, only the last evaluation.
        evaluated = state["handlers"]["evaluation"]["last_iteration"] >= iteration
        return not handled or (self.evaluation.due(epoch, max_epochs) and not evaluated)

    def state_dict(self) -> dict[str, Any]:
        """Return the last handled epoch."""
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = state["last"]


class AttachedRun:
    """A trainer with all handlers attached, as `attach_handlers` returns it.

    Args:
        status: writes `status.json`; None on all ranks except rank 0.
    """

    def __init__(
        self,
        parts: Parts,
        state: RunState,
        saver: SaveCheckpoints,
        evaluation: Evaluation,
        epoch_ends: EpochEnds,
        best: BestRecord,
        stop: StopAgreement,
        status: StatusFile | None,
        run: OpenRun,
    ) -> None:
        self.parts, self.state, self.saver, self.evaluation, self.best = parts, state, saver, evaluation, best
        self.epoch_ends, self.stop, self.status, self.run = epoch_ends, stop, status, run

    def resume(self, max_epochs: int) -> int:
        """Restore the saved state, if there is one; return the iteration from which the run continues."""
        saved = self.run.state
        if saved is None:
            return 0
        self.state.restore(saved, max_epochs)
        trainer = self.parts.trainer
        trainer.state.record = saved["errors"]["last"]
        self.saver.restore_best()
        return trainer.state.iteration

    def train(self, loader: Iterable[Any], epoch_length: int, max_epochs: int) -> Record | None:
        """Train to the end; return the record of the last evaluation, or None if there was none.

        Raises:
            PreemptedError: a signal stopped the run; its state is saved.
            OrphanedError: on one of the machines, the launcher that started the ranks died; the state is saved.
        """
        trainer = self.parts.trainer
        started_at = trainer.state.iteration
        outstanding = self.run.state is not None and self.epoch_ends.outstanding(self.run.state, max_epochs)
        if started_at >= epoch_length * max_epochs or self.best.verdict():
            if self._is_finished(started_at):
                log.info(f"{self.run.folder.path} is already finished; to train longer, raise train.epochs")
                return self.state.ranks.from_rank_zero(lambda: self.run.folder.read_metrics()[-1])
            # The run was interrupted after its last iteration was saved: only its final handlers remain.
            self._forget_lost_evaluations()
            if outstanding:
                trainer.fire_event(Events.EPOCH_COMPLETED)
            if not self.evaluation.abandoned:
                trainer.fire_event(Events.COMPLETED)
        else:
            self._forget_lost_evaluations()
            if outstanding:
                # Fire the event inside `trainer.run`, so that a handler can terminate the run as usual.
                trainer.add_event_handler(Events.STARTED, lambda engine: engine.fire_event(Events.EPOCH_COMPLETED))
            trainer.run(loader, max_epochs=max_epochs, epoch_length=epoch_length)
        ended = trainer.state.iteration >= epoch_length * max_epochs and not self.evaluation.abandoned
        return self._finish(ended, started_at)

    def _is_finished(self, iteration: int) -> bool:
        def is_finished() -> bool:
            if self.run.folder.read_status().get("state") not in ENDED:
                return False
            try:
                final = load_checkpoint(self.run.folder.checkpoints / "final.pt")
            except CheckpointError:
                return False
            return bool(final["trainer"]["iteration"] == iteration)

        return self.state.ranks.from_rank_zero(is_finished)

    def _forget_lost_evaluations(self) -> None:
        # Remove the records of evaluations that came after the state was saved: the resumed run repeats these
        # evaluations.
        if self.state.ranks.rank == 0:
            self.run.folder.truncate_metrics(self.evaluation.records)

    def _finish(self, whole: bool, started_at: int) -> Record | None:
        state = self.parts.trainer.state
        if self.stop.reason >= StopReason.SIGNAL and not whole:
            # Barrier: no rank may report "saved" until rank 0's save succeeded.
            self.state.ranks.gather(None)
            if self.status is not None:
                # Write the position now: `open_run` adds the state and the reason when the error leaves its block.
                self.status(self.parts.trainer)
            if self.stop.reason == StopReason.ORPHANED:
                error = OrphanedError(
                    f"the launcher of the ranks of a machine has died: saved at iteration {state.iteration}; "
                    "continue with --resume"
                )
                # All ranks raise this error. Set `quiet` on every rank, so that `report_failures` does not post the
                # error: after a post, the watchers (`failures.py`) would end all ranks within seconds.
                error.quiet = self.state.ranks.rank != 0
                raise error
            name = self.stop.signal_name
            if state.iteration == started_at == 0:
                raise PreemptedError(f"stopped by {name} before there was anything to save; start again with --resume")
            raise PreemptedError(f"stopped by {name} and saved at iteration {state.iteration}; continue with --resume")
        if self.status is not None:
            ended_by = self.stop.reason or self.best.verdict()
            reason = "" if whole else {**_REASONS, StopReason.ABANDONED: self.best.hopeless}[ended_by]
            if reason:
                log.info(f"stopped: {reason}")
            self.status(self.parts.trainer, "completed" if whole else "stopped_early", 0, reason)
        return getattr(state, "record", None)
