"""Predicts the classes of images: `python -m resnext_ignite.predict --checkpoint RUN IMAGE_OR_FOLDER ...`.

Images are decoded, cropped and normalised as in an evaluation. The command reports an image that cannot be read, and
continues with the other images.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnext_ignite.runtime.errors import ConfigError, DataError, run_command
from resnext_ignite.runtime.storage import check_output_path

if TYPE_CHECKING:
    import torch

_STANDARD_INPUT = "-"
_MOST_ON_SHEET = 64


@dataclass(frozen=True)
class Answer:
    """A predicted class: its name, index and probability (0 to 1)."""

    name: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, the most probable one first.

    If the image cannot be read, `top` is empty, and `error` is the reason.
    """

    file: str
    top: tuple[Answer, ...] = ()
    error: str | None = None


def find_images(names: Sequence[str]) -> list[str]:
    """Return the image files for the names on the command line, in the order of the names.

    A name is a file, a folder (all images in it and below it) or a pattern. A name that is none of these is returned
    unchanged; the prediction later reports it as a file that cannot be read.

    Raises:
        DataError: a folder holds no image, or a pattern matches no file; the message names it.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found: list[str] = []
    for name in names:
        if os.path.isdir(name):
            files = sorted(file for file in _below(name) if file.lower().endswith(IMG_EXTENSIONS))
            if not files:
                raise DataError(f"{name}: no image in this folder or below it ({' '.join(IMG_EXTENSIONS)})")
            found += files
        elif glob.has_magic(name) and not os.path.exists(name):
            files = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
            if not files:
                raise DataError(f"{name}: no file matches this pattern")
            found += files
        else:
            found.append(name)
    return found


def _below(folder: str) -> Iterator[str]:
    # Follow links, as training does. A link may lead back to a folder above it: enter each folder only once.
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}")

    for place, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in seen]
        yield from (os.path.join(place, file) for file in files)


class Predictor:
    """Predicts the classes of images with the model of a checkpoint, on a GPU if there is one.

    Args:
        checkpoint: a run folder, or a file of this project or of another system.
        batch_size: number of images in one forward pass.
        workers: number of decoding processes; None: one per core, but at most 8, and at most one for every two batches.

    Raises:
        CheckpointError: the checkpoint cannot be used.
    """

    def __init__(self, checkpoint: Path, *, batch_size: int = 32, workers: int | None = None) -> None:
        from resnext_ignite.models.inference import Inference
        from resnext_ignite.runtime import devices
        from resnext_ignite.weights.loading import open_model

        model, self.metadata = open_model(checkpoint)
        self.config = self.metadata.config
        self.device = devices.resolve_device("auto", 0)
        self.batch_size, self.workers = batch_size, workers
        devices.set_up_machine(self.device, deterministic=False)
        model = devices.place(model, self.device, channels_last=self.config.train.channels_last)
        self.network = Inference(model, devices.DTYPES[self.config.train.precision])

    def __call__(self, files: Sequence[str], top_k: int = 5) -> Iterator[Prediction]:
        """Yield the most probable classes of each image, in the order of `files`.

        Args:
            files: paths of images.
            top_k: number of classes per image.

        Raises:
            DataError: a decoding process died.
        """
        for images, positions, unreadable in self._load(files):
            probabilities = self.network(images).double().softmax(1)
            best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
            rows = zip(positions.tolist(), best.values.tolist(), best.indices.tolist(), strict=True)
            for position, values, indices in rows:
                if position in unreadable:
                    yield Prediction(files[position], error=unreadable[position])
                    continue
                classes = self.metadata.classes
                answers = [Answer(classes[i], i, value) for value, i in zip(values, indices, strict=True)]
                yield Prediction(files[position], tuple(answers))

    def pictures(self, files: Sequence[str]) -> torch.Tensor:
        """Return the images as the model receives them, but without the normalisation: uint8 (n, H, W, 3)."""
        import torch

        return torch.cat(
            [self._augment().unnormalize(images).permute(0, 2, 3, 1).cpu() for images, _, _ in self._load(files)]
        )

    def _load(self, files: Sequence[str]) -> Iterable[tuple[torch.Tensor, torch.Tensor, dict[int, str]]]:
        import torch

        from resnext_ignite.data.loaders import ImageLoader
        from resnext_ignite.data.reading.image_files import ImageFiles
        from resnext_ignite.data.sources.paths import Paths

        count = torch.arange(len(files))
        split = ImageFiles(Paths.of(files), count, count, self.metadata.image_size, self.config.data.eval_crop)
        workers = self.workers
        if workers is None:
            # Starting a process takes longer than decoding two batches in this process.
            workers = min(8, len(os.sched_getaffinity(0)), len(files) // (2 * self.batch_size))
        return ImageLoader(split, self._augment(), self.device, batch_size=self.batch_size, workers=workers)

    def _augment(self) -> Any:
        from resnext_ignite.data.augment.chain import Augment

        metadata = self.metadata
        channels_last = self.config.train.channels_last
        return Augment(seed=0, mean=metadata.mean, std=metadata.std, channels_last=channels_last)


def table(predictions: Iterable[Prediction], files: Sequence[str], classes: Sequence[str]) -> Iterator[str]:
    """Yield a line for each image, with aligned columns: its name, then the probability and class of each answer."""
    width = max(map(len, files))
    name_width = min(24, max(map(len, classes)))
    for prediction in predictions:
        answers = (f"{100 * answer.probability:5.1f} % {answer.name:<{name_width}}" for answer in prediction.top)
        yield f"{prediction.file:<{width}}  {'  '.join(answers)}".rstrip()


def as_json(predictions: Iterable[Prediction]) -> str:
    """Return one line of JSON: {predictions: [{file, top: [{class, index, probability}]}]}."""
    found = [
        {
            "file": prediction.file,
            "top": [{"class": a.name, "index": a.index, "probability": a.probability} for a in prediction.top],
        }
        for prediction in predictions
    ]
    return json.dumps({"predictions": found})


def write_csv(predictions: Iterable[Prediction]) -> None:
    """Write CSV to standard output. Each answer is a row: file, rank (from 1), class, index, probability."""
    writer = csv.writer(sys.stdout)
    writer.writerow(("file", "rank", "class", "index", "probability"))
    for prediction in predictions:
        for rank, answer in enumerate(prediction.top, start=1):
            writer.writerow((prediction.file, rank, *asdict(answer).values()))


def save_sheet(predictor: Predictor, predictions: Sequence[Prediction], path: Path) -> None:
    """Draw the first images as the model receives them, each with its file name and its most probable class."""
    from resnext_ignite.plots.figures import draw_sheet, save_figure

    shown = predictions[:_MOST_ON_SHEET]
    captions = [f"{Path(p.file).name[-22:]}\n{p.top[0].name} {100 * p.top[0].probability:.0f} %" for p in shown]
    save_figure(draw_sheet(predictor.pictures([p.file for p in shown]), captions), path)


def _readable(predictions: Iterable[Prediction], broken: list[Prediction], given: str) -> Iterator[Prediction]:
    # Yield the predictions for readable images. Report each unreadable image immediately, and add it to `broken`.
    # `given` is the name of the file that holds a copy of standard input.
    for prediction in predictions:
        if prediction.error is None:
            yield prediction
        else:
            print(f"error: {prediction.error.replace(given, 'standard input')}", file=sys.stderr)
            broken.append(prediction)


def main(arguments: list[str]) -> int:
    """Run the command; raise ResnextError for an error that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.predict", description="Predict the most probable classes of images."
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="FILE|RUN", help="a file of this project or another system, or a run"
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images per forward pass (default: 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--csv", action="store_true", help="print a row for each answer and nothing else")
    parser.add_argument("--save-sheet", metavar="FILE.png", help="draw the first 64 images with their predictions")
    parser.add_argument(
        "pictures",
        nargs="+",
        metavar="IMAGE|FOLDER",
        help="files, folders with all below them, patterns ('*.jpg'), or - for an image on standard input",
    )
    parsed = parser.parse_args(arguments)
    for name in ("top_k", "batch_size"):
        if vars(parsed)[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {vars(parsed)[name]}: at least 1")
    if parsed.json and parsed.csv:
        raise ConfigError("--json and --csv: choose one")
    if parsed.save_sheet:
        check_output_path("--save-sheet", Path(parsed.save_sheet))
    broken: list[Prediction] = []
    with tempfile.NamedTemporaryFile(prefix="standard-input-") as given:
        if _STANDARD_INPUT in parsed.pictures:
            if sys.stdin is None:
                raise DataError("-: standard input is closed")
            # Copy standard input to a file: decoders must seek, and a pipe does not allow this.
            given.write(sys.stdin.buffer.read())
            given.flush()
        files = find_images([given.name if name == _STANDARD_INPUT else name for name in parsed.pictures])
        predictor = Predictor(Path(parsed.checkpoint), batch_size=parsed.batch_size)
        predictions = _readable(predictor(files, parsed.top_k), broken, given.name)
        if parsed.save_sheet:
            predictions = iter(kept := list(predictions))
            if kept:
                save_sheet(predictor, kept, Path(parsed.save_sheet))
        predictions = (replace(p, file=_STANDARD_INPUT) if p.file == given.name else p for p in predictions)
        if parsed.json:
            print(as_json(predictions))
        elif parsed.csv:
            write_csv(predictions)
        else:
            for line in table(predictions, files, predictor.metadata.classes):
                print(line, flush=True)
    if broken:
        raise DataError(f"{len(broken)} of {len(files)} images could not be read")
    return 0


if __name__ == "__main__":
    run_command(main)
