"""Evaluates the model during a run: decides when, records the results, keeps the best record, and may stop the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from resnext_ignite.data.loaders import EvalLoader
from resnext_ignite.distributed.ddp import average_statistics
from resnext_ignite.distributed.stopping import StopAgreement, StopReason, SyncSchedule
from resnext_ignite.runs.folder import Record
from resnext_ignite.runtime.errors import NonFiniteError
from resnext_ignite.training.engines import RunEvents
from resnext_ignite.training.metrics import FlipCounts

_METRICS = ("images", "correct", "top1_error", "top5_error", "loss")


class _EvaluationInterruptedError(Exception):
    """Ends an evaluation before its last batch, because a stop of the run is requested."""


class Evaluation:
    """Evaluates the model when `due` says so, stores the result in `engine.state`, and fires RunEvents.EVALUATED.

    Attach this handler to EPOCH_COMPLETED, and its method `before_training` to STARTED. `engine.state.record` is the
    record that `metrics.jsonl` stores; `engine.state.evaluation` also has the confusion matrix and the worst mistakes.
    If a signal requests a stop, all ranks abandon the evaluation at the same batch, and the run ends. The resumed run
    repeats the evaluation (`session.EpochEnds`).

    Args:
        evaluator: from `create_evaluator`.
        loader: loads the split that selects the best epoch.
        split: name of that split.
        models: models whose BatchNorm statistics are averaged over ranks before an evaluation; one of them is the
            evaluated model.
        stop: all ranks use it to stop at the same batch.
        every, early: see the config keys `evaluation.every` and `evaluation.early`.
        lr: returns the current learning rate.
        training: returns the training metrics of the epoch, for the record.
        before: called before each evaluation that is due, to prepare the model.
    """

    def __init__(
        self,
        evaluator: Engine,
        loader: EvalLoader,
        split: str,
        models: list[nn.Module],
        stop: StopAgreement,
        *,
        every: int,
        early: tuple[int, ...],
        lr: Callable[[], float],
        training: Callable[[], dict[str, float | None]],
        before: Callable[[Engine], None] | None = None,
    ) -> None:
        self.evaluator, self.loader, self.split, self.models, self.stop = evaluator, loader, split, models, stop
        self.every, self.early, self.lr, self.training, self.before = every, early, lr, training, before
        self.last_iteration = -1
        self.records = 0
        self.abandoned = False
        self._sync = SyncSchedule(stop)
        self._common_batches = 0
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._synchronise)
        self._seconds_before = 0.0
        self._started = time.monotonic()

    def due(self, epoch: int, max_epochs: int) -> bool:
        """Return whether an evaluation is due at the end of an epoch; epoch 0 is the start of the run."""
        return epoch in self.early or (epoch > 0 and epoch % self.every == 0) or epoch == max_epochs

    def pending(self, engine: Engine) -> bool:
        """Return whether an evaluation is due at the current iteration and not done yet."""
        state = engine.state
        assert state.max_epochs is not None
        at_an_end = state.iteration % (state.epoch_length or 1) == 0
        return at_an_end and state.iteration > self.last_iteration and self.due(state.epoch, state.max_epochs)

    def before_training(self, engine: Engine) -> None:
        """Evaluate the initial weights, if this is due; attach this method to STARTED."""
        if engine.state.iteration == 0:
            self(engine)

    def __call__(self, engine: Engine) -> None:
        if self.pending(engine):
            began = time.monotonic()
            if self.before is not None:
                self.before(engine)
            self.evaluate(engine, self.loader, self.split, began)

    def evaluate(self, engine: Engine, loader: EvalLoader, split: str, began: float | None = None) -> None:
        """Evaluate a split now.

        Args:
            began: start time for `evaluation_s` in the record, as a value of `time.monotonic()`; None: now.

        Raises:
            NonFiniteError: the loss is not finite.
        """
        for model in self.models:
            average_statistics(model, self.stop.ranks)
        began = time.monotonic() if began is None else began
        self._sync.start(0)
        self._common_batches = loader.common_batches
        try:
            self.evaluator.run(loader)
        except _EvaluationInterruptedError:
            self.abandoned = True
            engine.terminate(skip_completed=True)
            return
        result = self.evaluator.state.metrics
        if not all(math.isfinite(result[key]) for key in ("loss", "loss_flip") if key in result):
            raise NonFiniteError(
                f"iteration {engine.state.iteration}: the {split} loss is not finite; lower optimizer.lr"
            )
        engine.state.evaluation = result
        engine.state.record = {
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "split": split,
            **{key: result[key] for key in (*_METRICS, *FlipCounts.NAMES) if key in result},
            "lr": self.lr(),
            **self.training(),
            "evaluation_s": time.monotonic() - began,
            "wall_s": self.wall_seconds(),
        }
        self.last_iteration = engine.state.iteration
        self.records += 1
        engine.fire_event(RunEvents.EVALUATED)

    def _synchronise(self, evaluator: Engine) -> None:
        # Exchange only at batches that every rank has: the slices of two ranks may differ by one image, and therefore
        # by one batch.
        batch = evaluator.state.iteration
        if batch < self._common_batches and self._sync.due(batch):
            self._sync.exchange(batch, torch.zeros(0, dtype=torch.float64))
            if self.stop.reason >= StopReason.SIGNAL:
                raise _EvaluationInterruptedError

    def wall_seconds(self) -> float:
        """Return the running time of this run in seconds, summed over its first start and all resumes.

        The pause before each resume is not included.
        """
        return self._seconds_before + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, so that it neither repeats an evaluation nor counts time twice."""
        return {"last_iteration": self.last_iteration, "records": self.records, "seconds": self.wall_seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_iteration, self.records = state["last_iteration"], state["records"]
        self._seconds_before = state["seconds"]


class BestRecord:
    """Keeps the record with the lowest error; stops the run if `patience`, `target_error` or `abandon` requires this.

    Attach this handler to RunEvents.EVALUATED. Ignite's EarlyStopping is not used: if EarlyStopping is attached as its
    documentation says, it loses its count at each evaluation, counts an evaluation before training as the first result,
    and stops only its own rank.

    Args:
        split: the split that selects the best epoch; records of other splits are ignored.
        stop: receives the decision to stop, which is the same on all ranks.
        patience: stop after this many consecutive evaluations without a lower error; 0: never.
        min_delta: percentage points by which the error must fall to count as lower for `patience`.
        target_error: stop at this error in percent or below; None: never.
        abandon: error limits in percent, by epoch. If the error after one of these epochs is above the limit for this
            epoch, the run stops.
    """

    def __init__(
        self,
        split: str,
        stop: StopAgreement,
        *,
        patience: int = 0,
        min_delta: float = 0.0,
        target_error: float | None = None,
        abandon: Mapping[int, float] | None = None,
    ) -> None:
        self.split, self.stop, self.abandon = split, stop, abandon or {}
        self.patience, self.min_delta, self.target_error = patience, min_delta, target_error
        self.best: Record | None = None
        self._before: Record | None = None
        self._reference: float | None = None
        self._without = 0
        self.hopeless = ""

    def __call__(self, engine: Engine) -> None:
        record = engine.state.record
        if record["split"] != self.split or record["epoch"] == 0:
            return
        error = record["top1_error"]
        if self.best is None or error < self.best["top1_error"]:
            self._before, self.best = self.best, record
        if self._reference is None or error < self._reference - self.min_delta:
            self._reference, self._without = error, 0
        else:
            self._without += 1
        limit = self.abandon.get(record["epoch"])
        # Do not abandon a run after its last epoch: a stop would save no time, and the user may continue the run with
        # more epochs.
        if limit is not None and error > limit and record["epoch"] != engine.state.max_epochs:
            self.hopeless = (
                f"abandoned: {error:.4g} % after epoch {record['epoch']}, above the {limit:g} % of evaluation.abandon"
            )
        verdict = self.verdict()
        if verdict:
            self.stop.decide(verdict)
            engine.terminate()

    def withdraw(self) -> None:
        """Restore the previous best record; call this if the weights of the new best record could not be saved."""
        self.best = self._before

    def verdict(self) -> StopReason:
        """Return the reason to stop after the records so far, or StopReason.NONE."""
        if self.target_error is not None and self.best and self.best["top1_error"] <= self.target_error:
            return StopReason.TARGET
        if self.hopeless:
            return StopReason.ABANDONED
        return StopReason.PATIENCE if self.patience and self._without >= self.patience else StopReason.NONE

    def state_dict(self) -> dict[str, Any]:
        """Return the best record, the state of `patience` (reference error and counter), and the reason to abandon.

        The reason is an empty string if the run was not abandoned.
        """
        return {
            "best": self.best,
            "reference": self._reference,
            "without": self._without,
            "hopeless": self.hopeless,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self._reference, self._without = state["best"], state["reference"], state["without"]
        # Checkpoints of older versions lack this key, because these versions never abandoned a run.
        self.hopeless = state.get("hopeless", "")


class FinalTest:
    """Evaluates the test split once, at the end, with the weights that were best on the held-out images.

    Attach it to COMPLETED, after the best weights are saved.

    Args:
        evaluation: evaluates and records the result.
        model: the evaluated model; it has the best weights during the test, and its own weights again afterwards.
        loader: loads the test split.
        best_weights: returns the best weights on every rank. If it returns None, the test uses the model's own weights.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        model: nn.Module,
        loader: EvalLoader,
        best_weights: Callable[[], dict[str, torch.Tensor] | None],
    ) -> None:
        self.evaluation, self.model, self.loader, self.best_weights = evaluation, model, loader, best_weights

    def __call__(self, engine: Engine) -> None:
        own = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.best_weights() or own)
        try:
            self.evaluation.evaluate(engine, self.loader, "test")
        finally:
            self.model.load_state_dict(own)
