"""Handlers that draw: `curves.png`, `mistakes.png`, and TensorBoard's sheets and confusion matrix. Rank 0's alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import Engine

from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.images import UNREADABLE
from resnext_ignite.data.loaders import Split
from resnext_ignite.handlers.loggers import TensorBoard
from resnext_ignite.plots.figures import (
    draw_confusion,
    draw_curves,
    draw_sheet,
    figure_to_array,
    name_of_evaluation,
    save_figure,
)
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.storage import warned_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Curves:
    """Draws `curves.png` after evaluations, at most every `seconds`; call `draw` at the end."""

    def __init__(self, folder: RunFolder, name: str, seconds: float = 30) -> None:
        self.folder, self.name, self.seconds = folder, name, seconds
        self._last = time.monotonic()

    def __call__(self, engine: Engine) -> None:
        if time.monotonic() - self._last >= self.seconds:
            self.draw()

    def draw(self) -> None:
        """Draw now."""
        with warned_of("curves.png"):
            save_figure(draw_curves({self.name: self.folder.read_metrics()}), self.folder.curves)
        self._last = time.monotonic()


class MistakesPicture:
    """Draws `mistakes.png`, the worst mistakes of the run's last evaluation; attach to COMPLETED.

    Args:
        splits: the images of each split that is evaluated.
    """

    def __init__(self, folder: RunFolder, splits: dict[str, Split], classes: tuple[str, ...]) -> None:
        self.folder, self.splits, self.classes = folder, splits, classes

    def __call__(self, engine: Engine) -> None:
        record, result = getattr(engine.state, "record", None), getattr(engine.state, "evaluation", None)
        if record is None or result is None:
            return
        with warned_of("mistakes.png"):
            if result["mistakes"]:
                sheet = draw_mistakes(result["mistakes"], self.splits[record["split"]], self.classes)
                save_figure(sheet, self.folder.mistakes, name_of_evaluation(record))
            else:
                self.folder.mistakes.unlink(missing_ok=True)


class AugmentedSheet:
    """A sheet of the first batch as the model sees it; attach to the first ITERATION_COMPLETED."""

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
    """The worst mistakes and the confusion matrix, after evaluations at most every `seconds`; `draw` at the end.

    Args:
        splits: the images of each split that is evaluated.
    """

    def __init__(
        self, board: TensorBoard, splits: dict[str, Split], classes: tuple[str, ...], seconds: float = 300
    ) -> None:
        self.board, self.splits, self.classes, self.seconds = board, splits, classes, seconds
        self._last = time.monotonic()

    def __call__(self, engine: Engine) -> None:
        if time.monotonic() - self._last >= self.seconds:
            self.draw(engine)

    def draw(self, engine: Engine) -> None:
        """Draw the latest evaluation now, if there was one."""
        record, result = getattr(engine.state, "record", None), getattr(engine.state, "evaluation", None)
        if record is None or result is None:
            return
        split, iteration = record["split"], record["iteration"]
        confusion = figure_to_array(draw_confusion(result["confusion"], self.classes))
        self.board.writer.add_image(f"{split}/confusion", confusion, iteration, dataformats="HWC")
        if result["mistakes"]:
            sheet = figure_to_array(draw_mistakes(result["mistakes"], self.splits[split], self.classes))
            self.board.writer.add_image(f"{split}/worst_mistakes", sheet, iteration, dataformats="HWC")
        self._last = time.monotonic()


def draw_mistakes(mistakes: list[dict[str, Any]], split: Split, classes: tuple[str, ...]) -> Figure:
    """The pictures of an evaluation's mistakes, each under 'true -> predicted (loss)'."""
    wanted = torch.tensor([mistake["index"] for mistake in mistakes], dtype=torch.int64, device=split.indices.device)
    # Splits keep their images in the order of their indices.
    pictures = split.load(torch.searchsorted(split.indices, wanted)).cpu()
    captions = [f"{classes[m['label']]}\n\u2192 {classes[m['predicted']]} ({m['loss']:.1f})" for m in mistakes]
    return draw_sheet(pictures, captions)
