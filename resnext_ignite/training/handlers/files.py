"""The files that rank 0 keeps of a run as it goes: `metrics.jsonl`, `evaluation.json`, `status.json`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from ignite.engine import Engine

from resnext_ignite.runs.folder import Record, RunFolder
from resnext_ignite.runtime.storage import warn_on_failure
from resnext_ignite.training.handlers.evaluation import BestRecord


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
        with warn_on_failure("evaluation.json"):
            self.folder.write_evaluation(evaluation)


class StatusFile:
    """Keeps `status.json`; attach to STARTED, RunEvents.EVALUATED, and call at the end.

    Args:
        best: the record that is the best so far.
        metadata: what else the file says of the run.
    """

    def __init__(self, folder: RunFolder, best: BestRecord, metadata: dict[str, Any]) -> None:
        self.folder, self.best, self.metadata = folder, best, metadata
        self.last: Record | None = None

    def __call__(self, engine: Engine, state: str = "running", exit_code: int | None = None, reason: str = "") -> None:
        self.last = getattr(engine.state, "record", None) or self.last
        # A run that goes on can do without this file. One that has ended must not be left marked as running.
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
