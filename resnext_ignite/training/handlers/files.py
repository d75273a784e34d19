"""Writes the files of a run on rank 0: `metrics.jsonl`, `evaluation.json` and `status.json`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from ignite.engine import Engine

from resnext_ignite.runs.folder import Record, RunFolder
from resnext_ignite.runtime.storage import warn_on_failure
from resnext_ignite.training.handlers.evaluation import BestRecord


class MetricsFile:
    """Appends each evaluation to `metrics.jsonl`; attach it to RunEvents.EVALUATED."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def __call__(self, engine: Engine) -> None:
        self.folder.append_metrics(engine.state.record)


class EvaluationFile:
    """Writes the confusion matrix and the worst mistakes of the latest evaluation to `evaluation.json`.

    Attach this handler to RunEvents.EVALUATED after MetricsFile. If the run is interrupted between the two writes,
    `metrics.jsonl` already ends with the new evaluation, but `evaluation.json` still holds the previous one. The values
    of `iteration` in the two files then differ.

    Args:
        classes: class names, in the order of the labels.
    """

    def __init__(self, folder: RunFolder, classes: tuple[str, ...]) -> None:
        self.folder, self.classes = folder, classes

    def __call__(self, engine: Engine) -> None:
        record, result = engine.state.record, engine.state.evaluation
        confusion = result["confusion"]
        # Sparse rows (true, predicted, count): with 1,000 classes, most of the million pairs never occur.
        cells = torch.cat([confusion.nonzero(), confusion[confusion != 0][:, None]], dim=1)
        evaluation = {
            **{key: record[key] for key in ("split", "epoch", "iteration")},
            "classes": list(self.classes),
            "confusion": cells.tolist(),
            "mistakes": result["mistakes"],
        }
        with warn_on_failure("evaluation.json"):
            self.folder.write_evaluation(evaluation)


class StatusFile:
    """Writes `status.json`; attach it to STARTED and RunEvents.EVALUATED, and call it at the end.

    Args:
        best: holds the best record so far.
        metadata: further fields of the file.
    """

    def __init__(self, folder: RunFolder, best: BestRecord, metadata: dict[str, Any]) -> None:
        self.folder, self.best, self.metadata = folder, best, metadata
        self.last: Record | None = None

    def __call__(self, engine: Engine, state: str = "running", exit_code: int | None = None, reason: str = "") -> None:
        self.last = getattr(engine.state, "record", None) or self.last
        # During the run, a failed write only causes a warning. At the end, it raises an error, because a finished run
        # must not stay marked as running.
        with warn_on_failure("status.json") if state == "running" else contextlib.nullcontext():
            self.folder.write_status(
                state,
                exit_code=exit_code,
                epoch=engine.state.epoch,
                iteration=engine.state.iteration,
                reason=reason,
                last=self.last,
                best=self.best.best,
                **self.metadata,
            )
