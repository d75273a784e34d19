"""Defines the schemas of the small files in a run folder. `folder.py` validates each file when it reads the file.

It ignores content that does not match its schema; additional keys are allowed. `training/handlers/evaluation.py`
builds the records of `metrics.jsonl`, and `training/handlers/files.py` writes the files.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, model_validator


class Best(BaseModel):
    """The fields that a report uses from the record of the best evaluation."""

    top1_error: float
    epoch: int
    split: str


class Status(BaseModel):
    """The content of `status.json`."""

    state: str
    versions: dict[str, str]
    best: Best | None = None


class MetricsLine(BaseModel):
    """A line of `metrics.jsonl`."""

    epoch: int
    iteration: int
    split: str
    images: Annotated[int, Field(gt=0)]
    correct: int
    top1_error: float
    top5_error: float
    loss: float
    lr: float
    images_per_s: float | None
    top1_error_flip: float | None = None
    wall_s: float


class Mistake(BaseModel):
    """An image with a wrong prediction."""

    index: int
    label: int
    predicted: int
    loss: float


_Count = Annotated[int, Field(ge=0, strict=True)]


class EvaluationInDetail(BaseModel):
    """The content of `evaluation.json`. A label is an index into `classes`.

    `confusion` has an entry (true label, predicted label, count) for each pair of labels whose count is not 0.
    """

    split: str
    epoch: int
    iteration: int
    classes: Annotated[list[str], Field(min_length=1)]
    confusion: list[tuple[_Count, _Count, _Count]]
    mistakes: list[Mistake]

    @model_validator(mode="after")
    def _check_labels(self) -> EvaluationInDetail:
        labels = [label for cell in self.confusion for label in cell[:2]]
        labels += [label for mistake in self.mistakes for label in (mistake.label, mistake.predicted)]
        if any(not 0 <= label < len(self.classes) for label in labels):
            raise ValueError("a label is not an index of `classes`")
        return self
