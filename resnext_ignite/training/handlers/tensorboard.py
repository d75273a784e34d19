"""Writes scalars, images, histograms and the config to TensorBoard on rank 0.

After a resume, no point is missing, and no point occurs twice.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import TensorboardLogger, global_step_from_engine
from ignite.handlers.tensorboard_logger import OutputHandler, WeightsHistHandler
from torch import nn
from torch.utils.tensorboard.summary import hparams

from resnext_ignite.config.files import dump_config
from resnext_ignite.config.schema import Config, flatten
from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.images import UNREADABLE
from resnext_ignite.data.loaders import Split
from resnext_ignite.plots.figures import draw_confusion, draw_mistakes, draw_sheet, figure_to_array
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.storage import warn_on_failure
from resnext_ignite.training.engines import RunEvents

log = logging.getLogger(__name__)
_SCALARS = ("loss", "top1_error", "lr", "images_per_s")
_EVALUATED_SCALARS = ("top1_error", "top5_error", "loss")


class _BestEffortEvents:
    """Wraps TensorBoard's event writer: after a failed write (full disk), it warns once and drops all later events."""

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
        with warn_on_failure("TensorBoard's events"):
            act(*args)
            self.failed = False


def _mute_writer_thread(arguments: threading.ExceptHookArgs) -> None:
    # TensorBoard raises the error of its writer thread again at the next event; `_BestEffortEvents` handles it there.
    if type(arguments.thread).__name__ != "_AsyncWriterThread" or not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


def _rename_older_event_files(now: int, folder: Path) -> None:
    """Rename event files so that they sort before a file that starts at `now` (Unix time in seconds).

    TensorBoard reads event files in the order of the seconds in their names. Without the renaming, the new file could
    sort before an older one: the clock may have been set back, or two processes may start within the same second.
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
    """The event files of a run, without duplicate points after a resume.

    Args:
        folder: the run folder, which holds the event files.
        purge_from: purge the points that a killed process wrote at this iteration and later.
    """

    def __init__(self, folder: RunFolder, purge_from: int) -> None:
        threading.excepthook = _mute_writer_thread
        _rename_older_event_files(int(time.time()), folder.path)
        self.logger = TensorboardLogger(log_dir=str(folder.path), purge_step=purge_from)
        self.writer = self.logger.writer
        self._histograms: WeightsHistHandler | None = None
        self._split = ""
        self.writer.file_writer.event_writer = _BestEffortEvents(self.writer.file_writer.event_writer)

    def attach(self, trainer: Engine, config: Config, model: nn.Module, split: str, *, new: bool) -> None:
        """Attach the writers of scalars and, if requested, of histograms; write the config if the run is new.

        Args:
            split: the split whose errors the HPARAMS table lists next to the config. Histograms are written after each
                evaluation of this split.
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
        """Write the scalars of a log point."""
        for name in _SCALARS:
            if name in metrics:
                self.writer.add_scalar(f"train/{name}", metrics[name], iteration)

    def write_evaluation(self, engine: Engine) -> None:
        """Write the scalars of an evaluation, and histograms of the trained (not the averaged) weights.

        The split's name is part of each scalar's name.
        """
        record = engine.state.record
        if self._histograms is not None and record["split"] == self._split:
            # The step of the histograms is the iteration, as for the scalars: a resumed run purges both by iteration.
            self._histograms(engine, self.logger, Events.ITERATION_COMPLETED)
        flipped = (f"{name}_flip" for name in _EVALUATED_SCALARS if f"{name}_flip" in record)
        for name in (*_EVALUATED_SCALARS, *flipped):
            self.writer.add_scalar(f"{record['split']}/{name}", record[name], record["iteration"])

    def _write_config(self, config: Config, split: str) -> None:
        """Write the config as text, and as a row of the HPARAMS table.

        The row also names the scalars of evaluations; TensorBoard fills in their values.
        """
        text = "".join(f"    {line}\n" for line in dump_config(config).splitlines())
        self.writer.add_text("config", text, 0)
        plain = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in flatten(config).items()
        }
        # Not SummaryWriter.add_hparams: it would also log the metrics as charts with a single point.
        for summary in hparams(plain, {f"{split}/{name}": 0.0 for name in _EVALUATED_SCALARS}):
            self.writer.file_writer.add_summary(summary)

    def flush(self) -> None:
        """Write all pending events to disk; called before each checkpoint, so that a resume loses none of them."""
        self.writer.flush()

    def close(self) -> None:
        """Write all pending events and close the files."""
        self.logger.close()


class AugmentedSheet:
    """Draws augmented images of the first batch, as the model gets them; attach it to the first ITERATION_COMPLETED."""

    def __init__(self, board: TensorBoard, augment: Augment, classes: tuple[str, ...], count: int) -> None:
        self.board, self.augment, self.classes, self.count = board, augment, classes, count

    def __call__(self, engine: Engine) -> None:
        batch = engine.state.batch
        images = self.augment.unnormalize(batch.images[: self.count]).permute(0, 2, 3, 1).cpu()
        labels = batch.labels[: self.count].tolist()
        captions = ["(unreadable)" if label == UNREADABLE else self.classes[label] for label in labels]
        sheet = figure_to_array(draw_sheet(images, captions))
        self.board.writer.add_image("train/augmented", sheet, engine.state.iteration, dataformats="HWC")


class MistakeSheets:
    """Draws the worst mistakes and the confusion matrix after evaluations, at most once every `seconds` seconds.

    Call `draw` at the end.

    Args:
        splits: the evaluated splits, by name.
        count: maximum number of mistakes on a sheet.
    """

    def __init__(
        self, board: TensorBoard, splits: dict[str, Split], classes: tuple[str, ...], count: int, seconds: float = 300
    ) -> None:
        self.board, self.splits, self.classes, self.count, self.seconds = board, splits, classes, count, seconds
        self._last = time.monotonic()

    def __call__(self, engine: Engine) -> None:
        if time.monotonic() - self._last >= self.seconds:
            self.draw(engine)

    def draw(self, engine: Engine) -> None:
        """Draw the worst mistakes and the confusion matrix of the latest evaluation now, if there is one."""
        record, result = getattr(engine.state, "record", None), getattr(engine.state, "evaluation", None)
        if record is None or result is None:
            return
        split, iteration = record["split"], record["iteration"]
        confusion = figure_to_array(draw_confusion(result["confusion"], self.classes))
        self.board.writer.add_image(f"{split}/confusion", confusion, iteration, dataformats="HWC")
        mistakes = result["mistakes"][: self.count]
        if mistakes:
            sheet = figure_to_array(draw_mistakes(mistakes, self.splits[split], self.classes))
            self.board.writer.add_image(f"{split}/worst_mistakes", sheet, iteration, dataformats="HWC")
        self._last = time.monotonic()
