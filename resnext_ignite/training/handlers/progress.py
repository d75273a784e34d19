"""Writes the console output of a run: a progress bar or log lines, and the result of each evaluation."""

from __future__ import annotations

import datetime
import logging
import sys

from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar

from resnext_ignite.runs.folder import Record
from resnext_ignite.training.engines import RunEvents

log = logging.getLogger(__name__)


def describe_evaluation(record: Record) -> str:
    """Return the record of an evaluation as one line of text."""
    wrong = record["images"] - record["correct"]
    flip = f" (with mirror images {record['top1_error_flip']:.2f} %)" if "top1_error_flip" in record else ""
    return (
        f"{record['split']} error {record['top1_error']:.2f} % ({wrong} of {record['images']}), "
        f"top-5 error {record['top5_error']:.2f} %, loss {record['loss']:.4f}{flip}"
    )


class Progress:
    """Shows the training progress: a bar if standard error is a terminal, else a line at each RunEvents.PROGRESS.

    Args:
        images_per_iteration: number of images of all ranks in one iteration, to estimate the remaining time.
    """

    def __init__(self, images_per_iteration: int) -> None:
        self.images_per_iteration = images_per_iteration
        self._drawn = -1

    def attach(self, trainer: Engine) -> None:
        """Attach the handlers to the trainer: the progress bar or the log lines, and a log line for each evaluation."""
        trainer.add_event_handler(RunEvents.EVALUATED, self.log_evaluation)
        if not sys.stderr.isatty():
            trainer.add_event_handler(RunEvents.PROGRESS, self.log_metrics)
            return
        trainer.add_event_handler(RunEvents.PROGRESS, self._mark)
        # Draw the bar only after RunEvents.PROGRESS, not at each iteration: writing to a terminal may take longer than
        # an iteration.
        at_log_point = Events.ITERATION_COMPLETED(event_filter=lambda engine, iteration: iteration == self._drawn)
        bar = ProgressBar(file=sys.stderr)
        bar.attach(trainer, output_transform=lambda output: self._postfix(trainer), event_name=at_log_point)

    def _mark(self, engine: Engine) -> None:
        self._drawn = engine.state.iteration

    def _postfix(self, engine: Engine) -> dict[str, str]:
        metrics = engine.state.metrics
        return {
            "loss": f"{metrics['loss']:.4f}",
            "images/s": f"{metrics['images_per_s']:.0f}",
            "run": f"{self._remaining_time(engine)} left",
        }

    def _remaining_time(self, engine: Engine) -> datetime.timedelta:
        state = engine.state
        iterations = (state.max_epochs or 0) * (state.epoch_length or 0) - state.iteration
        seconds = iterations * self.images_per_iteration / max(state.metrics["images_per_s"], 1e-9)
        return datetime.timedelta(seconds=round(seconds))

    def log_metrics(self, engine: Engine) -> None:
        state, metrics = engine.state, engine.state.metrics
        log.info(
            f"epoch {state.epoch}/{state.max_epochs} iteration {state.iteration} loss {metrics['loss']:.4f} "
            f"lr {metrics['lr']:.4g} {metrics['images_per_s']:.0f} images/s {self._remaining_time(engine)} left"
        )

    def log_evaluation(self, engine: Engine) -> None:
        log.info(f"epoch {engine.state.epoch}/{engine.state.max_epochs} {describe_evaluation(engine.state.record)}")
