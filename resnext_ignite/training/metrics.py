"""Accumulates the metrics of both engines on the device; the host waits only when a handler reads them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from ignite.metrics import Metric
from torch import Tensor
from torch.nn import functional as F

from resnext_ignite.data.loaders import Batch
from resnext_ignite.distributed.ranks import Ranks


class TrainingSums:
    """The sums of the training metrics since the last exchange between ranks, and the first bad iteration.

    Both are on the device. An iteration is bad if its loss or gradient is not finite. The first bad iteration is stored
    as infinity until there is one. The gradient is checked after its reduction over ranks: if the gradient of one rank
    is not finite, all ranks record the iteration as bad.
    """

    NAMES = ("loss", "correct", "images", "unreadable", "skipped_updates")
    # 40 halvings lower the initial scale of 65,536 to 2^-24. At this scale, no finite gradient overflows. If the update
    # is still skipped, the unscaled gradient is not finite.
    MAX_CONSECUTIVE_SKIPS = 40

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self._first_bad = torch.full((), math.inf, dtype=torch.float64, device=device)
        self._skips_in_a_row = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, loss: Tensor, correct: Tensor, images: Tensor, unreadable: Tensor) -> None:
        """Add scalars of one micro-batch: the summed loss, and the numbers of correct, readable, unreadable images."""
        # Round to a multiple of 2^-24: float64 then holds every sum exactly, so the order of the additions does not
        # matter. A resumed run exchanges its sums at other iterations, and must still get bit-identical totals.
        exact = (loss.double() * 2**24).round() / 2**24
        self._sums[:4] += torch.stack([exact, correct.double(), images.double(), unreadable.double()])

    def check(self, finite: Tensor, iteration: int) -> None:
        """Record an iteration as bad if `finite`, a bool scalar, is false; store only the earliest bad iteration."""
        bad = torch.where(finite, math.inf, float(iteration))
        self._first_bad = torch.minimum(self._first_bad, bad.double())

    def count_skip(self, finite: Tensor, iteration: int) -> None:
        """Count an update as skipped if its gradient is not finite; the fp16 scaler skips these updates.

        After MAX_CONSECUTIVE_SKIPS skips in a row, the iteration of the first of these skips is recorded as bad.

        Args:
            finite: whether the gradient is finite, a bool scalar.
            iteration: the iteration of the update.
        """
        self._sums[4] += ~finite
        self._skips_in_a_row = torch.where(finite, 0.0, self._skips_in_a_row + 1)
        self.check(self._skips_in_a_row < self.MAX_CONSECUTIVE_SKIPS, iteration - self.MAX_CONSECUTIVE_SKIPS + 1)

    def read_and_reset(self) -> Tensor:
        """Return the sums in the order of NAMES, then the first bad iteration: float64 (6,) on the CPU. Reset the sums.

        This call waits for the device.
        """
        numbers = torch.cat([self._sums, self._first_bad[None]]).cpu()
        self._sums.zero_()
        return numbers


class ClassificationCounts(Metric):
    """Exact counts of an evaluation, accumulated on the device and reduced over all ranks once, at the end.

    `compute` returns a dict: images, correct, correct_top5 (integers), top1_error, top5_error (percent), loss (mean),
    confusion (int64 (C, C); rows are true classes, columns are predicted classes), mistakes (a list of the mistakes
    with the highest loss; each is a dict of index, label, predicted, loss).

    Args:
        num_classes: C.
        keep_mistakes: maximum number of mistakes in the list.
    """

    def __init__(self, num_classes: int, ranks: Ranks, device: torch.device, keep_mistakes: int = 0) -> None:
        self.num_classes, self.ranks, self.keep_mistakes = num_classes, ranks, keep_mistakes
        super().__init__(device=device)

    def reset(self) -> None:
        """Set all counts to zero."""
        size = self.num_classes**2
        self._counts = torch.zeros(size + 1, dtype=torch.int64, device=self._device)
        self._loss = torch.zeros(1, dtype=torch.float64, device=self._device)
        self._mistakes = torch.zeros(0, 4, dtype=torch.float64, device=self._device)

    def update(self, output: tuple[Tensor, Batch]) -> None:
        """Add a batch to the counts.

        Args:
            output: the logits of the images, float32 (n, C), and the batch.
        """
        logits, batch = output
        losses = F.cross_entropy(logits, batch.labels, reduction="none").double()
        predicted = logits.argmax(1)
        top5 = logits.topk(min(5, self.num_classes), dim=1).indices
        cells = batch.labels * self.num_classes + predicted
        self._counts[:-1] += torch.zeros_like(self._counts[:-1]).scatter_add_(0, cells, torch.ones_like(cells))
        self._counts[-1] += (top5 == batch.labels[:, None]).sum()
        self._loss += losses.sum()
        if self.keep_mistakes:
            wrong = torch.where(predicted == batch.labels, -1.0, losses)
            rows = torch.stack([wrong, batch.indices.double(), batch.labels.double(), predicted.double()], dim=1)
            rows = torch.cat([self._mistakes, rows])
            self._mistakes = rows[rows[:, 0].topk(min(self.keep_mistakes, len(rows))).indices]

    def compute(self) -> dict[str, Any]:
        """Return the metrics over all ranks; wait for the device."""
        loss = self._loss
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(self._counts)
            torch.distributed.all_reduce(loss)
        mistakes = sorted((row for rows in self.ranks.gather(self._mistakes.tolist()) for row in rows), reverse=True)
        counts = self._counts.cpu()
        confusion = counts[:-1].view(self.num_classes, self.num_classes)
        images, correct, correct_top5 = int(confusion.sum()), int(confusion.diagonal().sum()), int(counts[-1])
        return {
            "images": images,
            "correct": correct,
            "correct_top5": correct_top5,
            "top1_error": 100 * (images - correct) / images,
            "top5_error": 100 * (images - correct_top5) / images,
            "loss": float(loss) / images,
            "confusion": confusion,
            "mistakes": [
                {"index": int(index), "label": int(label), "predicted": int(predicted), "loss": loss}
                for loss, index, label, predicted in mistakes[: self.keep_mistakes]
                if loss >= 0
            ],
        }


class FlipCounts(ClassificationCounts):
    """Counts errors as ClassificationCounts does, but averages the probabilities of each image and its mirror image.

    `compute` returns a dict: correct_flip (an integer), top1_error_flip, top5_error_flip (percent), loss_flip (mean).

    Args:
        num_classes: C.
        logits_of: the network, called with the mirror images: float32 (n, 3, H, W) -> logits float32 (n, C).
    """

    NAMES = ("correct_flip", "top1_error_flip", "top5_error_flip", "loss_flip")

    def __init__(
        self, num_classes: int, ranks: Ranks, device: torch.device, logits_of: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(num_classes, ranks, device)
        self.logits_of = logits_of

    def update(self, output: tuple[Tensor, Batch]) -> None:
        """Average the class probabilities of each image and its mirror image, then count the averages.

        Args:
            output: the logits of the images, float32 (n, C), and the batch.
        """
        logits, batch = output
        mirrored = self.logits_of(batch.images.flip(-1))
        # Log-probabilities are valid logits: their softmax gives the probabilities.
        mean = torch.logaddexp(logits.log_softmax(1), mirrored.log_softmax(1)) - math.log(2)
        super().update((mean, batch))

    def compute(self) -> dict[str, Any]:
        """Return the metrics over all ranks; wait for the device."""
        figures = super().compute()
        return {name: figures[name.removesuffix("_flip")] for name in self.NAMES}


class Calibration(Metric):
    """The gap between a model's confidence and its accuracy, reduced over all ranks once, at the end.

    `compute` returns a dict: calibration_error, the expected calibration error in percent over equally wide bins of
    confidence (Guo et al., arXiv:1706.04599, equation 3), and calibration_bins, float64 (bins, 3): for each bin, the
    number of images, the number of correct predictions, and the sum of the confidences.
    """

    BINS = 15

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        super().__init__(device=device)

    def reset(self) -> None:
        """Set all counts to zero."""
        self._bins = torch.zeros(self.BINS, 3, dtype=torch.float64, device=self._device)

    def update(self, output: tuple[Tensor, Batch]) -> None:
        """Add a batch to the counts of the bins.

        Args:
            output: the logits of the images, float32 (n, C), and the batch.
        """
        logits, batch = output
        confidence, predicted = logits.double().softmax(1).max(1)
        # (0, 1/15], (1/15, 2/15], ...
        bins = (confidence * self.BINS).ceil().long().clamp(1, self.BINS) - 1
        values = torch.stack([torch.ones_like(confidence), (predicted == batch.labels).double(), confidence], dim=1)
        # (bins, n) @ (n, 3). Do not use an indexed addition here: on a GPU, it has no fixed order of additions, and its
        # result would vary in the last bits.
        self._bins += F.one_hot(bins, self.BINS).double().T @ values

    def compute(self) -> dict[str, Any]:
        """Return the metrics over all ranks; wait for the device."""
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(self._bins)
        bins = self._bins.cpu()
        images, right, confidence = bins.unbind(1)
        return {
            "calibration_error": 100 * float((right - confidence).abs().sum() / images.sum()),
            "calibration_bins": bins,
        }
