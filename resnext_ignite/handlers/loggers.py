"""What a run tells: console, `metrics.jsonl`, `evaluation.json`, `status.json`, TensorBoard's scalars. Of rank 0."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar, TensorboardLogger, global_step_from_engine
from ignite.handlers.tensorboard_logger import OutputHandler, WeightsHistHandler
from torch import nn
from torch.utils.tensorboard.summary import hparams

from resnext_ignite.config.files import dump_config
from resnext_ignite.config.schema import Config, flatten
from resnext_ignite.engines import RunEvents
from resnext_ignite.handlers.evaluation import BestRecord
from resnext_ignite.runs.folder import Record, RunFolder
from resnext_ignite.runtime.storage import warned_of

log = logging.getLogger(__name__)
_SCALARS = ("loss", "top1_error", "lr", "images_per_s")
_EVALUATED_SCALARS = ("top1_error", "top5_error", "loss")


def describe(record: Record) -> str:
    """A record of an evaluation as people say it."""
    wrong = record["images"] - record["correct"]
    flip = f" (with mirror images {record['top1_error_flip']:.2f} %)" if "top1_error_flip" in record else ""
    return (
        f"{record['split']} error {record['top1_error']:.2f} % ({wrong} of {record['images']}), "
        f"top-5 {record['top5_error']:.2f} %, loss {record['loss']:.4f}{flip}"
    )


class Progress:
    """Training progress: a bar where standard error is a terminal, else a line at each RunEvents.PROGRESS.

    Args:
        images_per_iteration: over all ranks, for the time that is left.
    """

    def __init__(self, images_per_iteration: int) -> None:
        self.images_per_iteration = images_per_iteration
        self._drawn = -1

    def attach(self, trainer: Engine) -> None:
        """Attach to the trainer, in the form that fits standard error."""
        trainer.add_event_handler(RunEvents.EVALUATED, self.say_evaluation)
        if not sys.stderr.isatty():
            trainer.add_event_handler(RunEvents.PROGRESS, self.say_metrics)
            return
        trainer.add_event_handler(RunEvents.PROGRESS, self._mark)
        # Drawn at these points only: a terminal is slower than an iteration, and nothing new is known between.
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
            "run": f"{self._left(engine)} left",
        }

    def _left(self, engine: Engine) -> datetime.timedelta:
        state = engine.state
        iterations = (state.max_epochs or 0) * (state.epoch_length or 0) - state.iteration
        seconds = iterations * self.images_per_iteration / max(state.metrics["images_per_s"], 1e-9)
        return datetime.timedelta(seconds=round(seconds))

    def say_metrics(self, engine: Engine) -> None:
        state, metrics = engine.state, engine.state.metrics
        log.info(
            f"epoch {state.epoch}/{state.max_epochs} iteration {state.iteration} loss {metrics['loss']:.4f} "
            f"lr {metrics['lr']:.4g} {metrics['images_per_s']:.0f} images/s {self._left(engine)} left"
        )

    def say_evaluation(self, engine: Engine) -> None:
        log.info(f"epoch {engine.state.epoch}/{engine.state.max_epochs} {describe(engine.state.record)}")


class MetricsFile:
    """Adds each evaluation to `metrics.jsonl`; attach to RunEvents.EVALUATED."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def __call__(self, engine: Engine) -> None:
        self.folder.append_metrics(engine.state.record)


class EvaluationFile:
    """Keeps the latest evaluation's confusion matrix and worst mistakes in `evaluation.json`.

    Attach to RunEvents.EVALUATED after MetricsFile: where a run is cut between the two, the file is of an evaluation
    before the last line of `metrics.jsonl`, which whoever reads both can see.

    Args:
        classes: names, in the order of the labels.
    """

    def __init__(self, folder: RunFolder, classes: tuple[str, ...]) -> None:
        self.folder, self.classes = folder, classes

    def __call__(self, engine: Engine) -> None:
        record, result = engine.state.record, engine.state.evaluation
        confusion = result["confusion"]
        # Most of a thousand classes' million pairs are never confused.
        cells = torch.cat([confusion.nonzero(), confusion[confusion != 0][:, None]], dim=1)
        evaluation = {
            **{key: record[key] for key in ("split", "epoch", "iteration")},
            "classes": list(self.classes),
            "confusion": cells.tolist(),
            "mistakes": result["mistakes"],
        }
        with warned_of("evaluation.json"):
            self.folder.write_evaluation(evaluation)


class StatusFile:
    """Keeps `status.json`; attach to STARTED, RunEvents.EVALUATED, and call at the end.

    Args:
        best: the record that is the best so far.
        facts: what else the file says of the run.
    """

    def __init__(self, folder: RunFolder, best: BestRecord, facts: dict[str, Any]) -> None:
        self.folder, self.best, self.facts = folder, best, facts
        self.last: Record | None = None

    def __call__(self, engine: Engine, state: str = "running", exit_code: int | None = None, reason: str = "") -> None:
        self.last = getattr(engine.state, "record", None) or self.last
        # A run that goes on can do without this file. One that has ended must not be left marked as running.
        with warned_of("status.json") if state == "running" else contextlib.nullcontext():
            self.folder.write_status(
                state,
                exit_code=exit_code,
                epoch=engine.state.epoch,
                iteration=engine.state.iteration,
                reason=reason,
                last=self.last,
                best=self.best.best,
                **self.facts,
            )


class _DispensableEvents:
    """TensorBoard's writer as long as the disk takes what it writes; after that, with a warning, nothing."""

    def __init__(self, writer: Any) -> None:
        self.writer, self.failed = writer, False

    def add_event(self, *event: Any) -> None:
        self._try(self.writer.add_event, *event)

    def flush(self) -> None:
        self._try(self.writer.flush)

    def close(self) -> None:
        self._try(self.writer.close)

    def get_logdir(self) -> str:
        return str(self.writer.get_logdir())

    def _try(self, act: Callable[..., None], *args: Any) -> None:
        if self.failed:
            return
        self.failed = True
        with warned_of("TensorBoard's events"):
            act(*args)
            self.failed = False


def _mute_writer_thread(arguments: threading.ExceptHookArgs) -> None:
    # What it died of is raised again at the next event, and answered there.
    if type(arguments.thread).__name__ != "_AsyncWriterThread" or not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


def _put_before(now: int, folder: Path) -> None:
    """Have the event files of a folder come before one begun now: they are read in the order of their names' seconds.

    A clock may have been set back, and a process may follow another within a second.
    """
    latest = now - 1
    for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        prefix, second, rest = re.split(r"(?<=tfevents\.)(\d+)", path.name, maxsplit=1)
        if int(second) > latest:
            path.rename(folder / f"{prefix}{latest:010d}{rest}")
            latest -= 1
        else:
            latest = int(second)


class TensorBoard:
    """Event files of a run, without a doubled point after a resume.

    Args:
        folder: where the event files go.
        purge_from: points from this iteration on, of a process that was killed, are purged.
    """

    def __init__(self, folder: RunFolder, purge_from: int) -> None:
        threading.excepthook = _mute_writer_thread
        _put_before(int(time.time()), folder.path)
        self.logger = TensorboardLogger(log_dir=str(folder.path), purge_step=purge_from)
        self.writer = self.logger.writer
        self._histograms: WeightsHistHandler | None = None
        self._split = ""
        self.writer.file_writer.event_writer = _DispensableEvents(self.writer.file_writer.event_writer)

    def attach(self, trainer: Engine, config: Config, model: nn.Module, split: str, *, new: bool) -> None:
        """Attach scalars, and histograms if asked; write the config down where the run is new.

        Args:
            split: whose errors stand beside the config.
        """
        step = global_step_from_engine(trainer, custom_event_name=Events.ITERATION_COMPLETED)
        scalars = OutputHandler(tag="train", metric_names=list(_SCALARS), global_step_transform=step)
        self.logger.attach(trainer, scalars, RunEvents.METRICS_READY)
        trainer.add_event_handler(RunEvents.EVALUATED, self.write_evaluation)
        if config.logging.histograms:
            self._histograms = WeightsHistHandler(model)
            self._split = split
        if new:
            self._write_config(config, split)

    def write_metrics(self, metrics: dict[str, float], iteration: int) -> None:
        """Scalars of a log point."""
        for name in _SCALARS:
            if name in metrics:
                self.writer.add_scalar(f"train/{name}", metrics[name], iteration)

    def write_evaluation(self, engine: Engine) -> None:
        """Scalars of an evaluation, by split; and histograms of the trained weights, not of their average."""
        record = engine.state.record
        if self._histograms is not None and record["split"] == self._split:
            # Their step is the iteration, as of the scalars: a resumed run purges both by it.
            self._histograms(engine, self.logger, Events.ITERATION_COMPLETED)
        flipped = (f"{name}_flip" for name in _EVALUATED_SCALARS if f"{name}_flip" in record)
        for name in (*_EVALUATED_SCALARS, *flipped):
            self.writer.add_scalar(f"{record['split']}/{name}", record[name], record["iteration"])

    def _write_config(self, config: Config, split: str) -> None:
        """The config as text, and as a row of the HPARAMS table beside the errors that the run will log."""
        text = "".join(f"    {line}\n" for line in dump_config(config).splitlines())
        self.writer.add_text("config", text, 0)
        plain = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in flatten(config).items()
        }
        # SummaryWriter.add_hparams would draw its metrics once more, as charts of one point.
        for summary in hparams(plain, {f"{split}/{name}": 0.0 for name in _EVALUATED_SCALARS}):
            self.writer.file_writer.add_summary(summary)

    def flush(self) -> None:
        """Put everything on disk; called before each checkpoint, so that none of it is missing after a resume."""
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.logger.close()
