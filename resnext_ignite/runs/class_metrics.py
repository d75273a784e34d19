"""Computes the error of each class from the confusion matrix of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ClassMetrics:
    """The metrics of one class: its number of images, its number of correct predictions, and the most frequent mistake.

    `taken_for` is the most frequent wrong prediction, and `times` its count. If no prediction is wrong, `taken_for` is
    `label` and `times` is 0.
    """

    label: int
    images: int
    correct: int
    taken_for: int
    times: int

    @property
    def error(self) -> float | None:
        """Return the error in percent, or None if the class has no images."""
        return 100 * (self.images - self.correct) / self.images if self.images else None


def metrics_by_class(confusion: Tensor) -> list[ClassMetrics]:
    """Return the metrics of each class, from a confusion matrix of counts, int64 (C, C): one row per true class."""
    metrics = []
    for label, row in enumerate(confusion.tolist()):
        wrong = [(count, other) for other, count in enumerate(row) if other != label and count]
        times, taken_for = max(wrong, default=(0, label))
        metrics.append(ClassMetrics(label, sum(row), row[label], taken_for, times))
    return metrics
