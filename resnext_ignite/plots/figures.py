"""Draws curves, confusion matrices, calibration and images, and converts figures to files and arrays."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnext_ignite.data.loaders import Split
from resnext_ignite.runtime.storage import replace_durably

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
_MOST_NAMED_CLASSES = 40


@functools.cache
def pyplot() -> Any:
    """Return matplotlib's pyplot, set up for machines without a display.

    matplotlib is imported in the first call, not with this module: the import takes half a second, which would delay
    the first iteration of a run.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    # The names of classes and runs may contain dollar signs. By default, matplotlib draws the text between two dollar
    # signs as a formula.
    mpl.rcParams["text.parse_math"] = False
    # Write text to an SVG as text, not as outlines.
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as loaded

    return loaded


def printable(text: str) -> str:
    """Replace the characters of a name that fonts cannot draw or XML does not allow.

    Bytes that are not valid UTF-8 become `?`; unprintable characters other than line feeds become U+FFFD.
    """
    text = text.encode("utf-8", "replace").decode()
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)


def draw_curves(runs: Mapping[str, Sequence[Record]], size: tuple[float, float] = (8, 8)) -> Figure:
    """Draw error, loss and learning rate over epochs, for one run or for several runs in the same axes.

    Args:
        runs: name of the run -> records of its `metrics.jsonl`.
        size: width and height in inches.
    """
    figure, (top, middle, bottom) = pyplot().subplots(
        3, 1, figsize=size, sharex=True, height_ratios=(3, 2, 1), layout="constrained"
    )
    colors = pyplot().rcParams["axes.prop_cycle"].by_key()["color"]
    several = len(runs) > 1
    for number, (run, records) in enumerate(runs.items()):
        name = printable(run)
        color = colors[number % len(colors)]
        for split in dict.fromkeys(record["split"] for record in records):
            points = [record for record in records if record["split"] == split]
            epochs = [record["epoch"] for record in points]
            label = f"{name} {split}" if several else split
            # The curve of a split that is evaluated only once is a single point, which is invisible without a marker.
            style: dict[str, Any] = {"color": color if several or number else None, "marker": "o", "markersize": 3}
            top.plot(epochs, [p["top1_error"] for p in points], label=label, **style)
            middle.plot(epochs, [p["loss"] for p in points], label=label, **style)
        trained = [record for record in records if record.get("train_loss") is not None]
        label = f"{name} training" if several else "training (augmented)"
        middle.plot(
            [r["epoch"] for r in trained],
            [r["train_loss"] for r in trained],
            linestyle="--",
            color=color if several else "0.4",
            label=label,
        )
        bottom.plot([r["epoch"] for r in trained], [r["lr"] for r in trained], color=color if several else "0.4")
        if records and not several:
            last = records[-1]
            top.set_title(f"{name}: {last['split']} error {last['top1_error']:.2f} % at epoch {last['epoch']}")
    top.set_ylabel("top-1 error (%)")
    highest = max((record["top1_error"] for records in runs.values() for record in records), default=100)
    top.set_ylim(0, 1.05 * max(highest, 1))
    middle.set_ylabel("loss")
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("epoch")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    for axes in (top, middle):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def draw_confusion(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix with one row per true class and one column per predicted class.

    The colour of a cell shows its count, divided by the number of images of its true class.

    Args:
        confusion: counts of images, int64 (C, C).
        classes: the names of the C classes.
    """
    classes = [printable(name) for name in classes]
    counts = confusion.double()
    fractions = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    count = len(classes)
    side = min(max(4.5, 0.42 * count + 2.5), 14)
    figure, axes = pyplot().subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="fraction of the true class")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= _MOST_NAMED_CLASSES:
        axes.set_xticks(range(count), classes, rotation=90, fontsize=8)
        axes.set_yticks(range(count), classes, fontsize=8)
    if count <= 20:
        for row, column in np.ndindex(count, count):
            cell = int(confusion[row, column])
            if cell:
                color = "white" if fractions[row, column] > 0.5 else "black"
                axes.text(column, row, str(cell), ha="center", va="center", fontsize=6, color=color)
    return figure


def draw_calibration(bins: Tensor) -> Figure:
    """Draw the accuracy as a function of the confidence, and the histogram of the confidences.

    Args:
        bins: the result `calibration_bins` of the metric `Calibration` (`training/metrics.py`), float64 (B, 3). A row
            is one bin: number of images, number of correct predictions, sum of the confidences.
    """
    images, right, confidence = bins.numpy().T
    count = len(images)
    figure, (top, bottom) = pyplot().subplots(
        2, 1, figsize=(5, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    seen = images > 0
    accuracy, mean_confidence = (sums[seen] / images[seen] for sums in (right, confidence))
    centres, width = (np.arange(count) + 0.5) / count, 0.92 / count
    top.bar(centres[seen], accuracy, width=width, label="accuracy")
    top.plot(mean_confidence, accuracy, "o", color="black", markersize=3, label="at the mean confidence")
    top.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1, label="calibrated")
    error = 100 * np.abs(right - confidence).sum() / images.sum()
    top.set_title(f"expected calibration error {error:.2f} %")
    top.set_ylabel("accuracy")
    top.set_ylim(0, 1.03)
    top.legend(fontsize=8)
    bottom.bar(centres, images / images.sum(), width=width)
    bottom.set_ylabel("fraction of images")
    bottom.set_xlabel("confidence")
    bottom.set_xlim(0, 1)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def draw_sheet(images: Tensor, captions: Sequence[str] = (), columns: int = 8) -> Figure:
    """Draw images uint8 (N, H, W, 3) in rows, each under its caption."""
    rows = max(1, -(-len(images) // columns))
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(1.45 * columns, 1.75 * rows), layout="constrained", squeeze=False
    )
    for number, place in enumerate(axes.flat):
        place.axis("off")
        if number < len(images):
            place.imshow(images[number].numpy(), interpolation="nearest")
            if number < len(captions):
                place.set_title(printable(captions[number]), fontsize=7)
    return figure


def draw_mistakes(mistakes: list[dict[str, Any]], split: Split, classes: tuple[str, ...]) -> Figure:
    """Draw the images for which the prediction is wrong, each under the caption 'true -> predicted (loss)'."""
    wanted = torch.tensor([mistake["index"] for mistake in mistakes], dtype=torch.int64, device=split.indices.device)
    # searchsorted needs sorted indices: the images of a split are sorted by index.
    pictures = split.load(torch.searchsorted(split.indices, wanted)).cpu()
    captions = [f"{classes[m['label']]}\n\u2192 {classes[m['predicted']]} ({m['loss']:.1f})" for m in mistakes]
    return draw_sheet(pictures, captions)


def name_of_evaluation(record: Record) -> str:
    """Return a string that identifies an evaluation within its run."""
    return f"{record['split']}, epoch {record['epoch']}, iteration {record['iteration']}"


def save_figure(figure: Figure, path: Path, description: str = "") -> None:
    """Write the figure as a PNG, atomically, with a description as metadata; close the figure."""
    metadata = {"Description": description} if description else {}
    try:
        replace_durably(path, lambda file: figure.savefig(file, format="png", dpi=110, metadata=metadata))
    finally:
        pyplot().close(figure)


def figure_to_svg(figure: Figure) -> bytes:
    """Return the figure as an SVG with selectable text; close the figure."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True)
    pyplot().close(figure)
    return file.getvalue()


def figure_to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG; close the figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    pyplot().close(figure)
    return file.getvalue()


def figure_to_array(figure: Figure) -> NDArray[np.uint8]:
    """Return the figure as uint8 (H, W, 3), the layout that TensorBoard takes; close the figure."""
    figure.set_dpi(110)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
    pyplot().close(figure)
    return pixels
