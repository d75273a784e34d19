"""Name what is in pictures: `python -m resnext_ignite.predict --checkpoint RUN PICTURE_OR_FOLDER ...`.

They are decoded, cropped and normalised as in an evaluation. One that cannot be read is named, and the others go on.
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
from resnext_ignite.runtime.storage import check_place

if TYPE_CHECKING:
    import torch

_STANDARD_INPUT = "-"
_MOST_ON_SHEET = 64


@dataclass(frozen=True)
class Answer:
    """A class with its index and probability."""

    name: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a picture, best first; none, and the `error`, where it cannot be read."""

    file: str
    top: tuple[Answer, ...] = ()
    error: str | None = None


def find_images(names: Sequence[str]) -> list[str]:
    """The files that names stand for: files, folders (all pictures in and below them) and patterns, in this order.

    A name that is nothing of these stays, to be told like a file that cannot be read.

    Raises:
        DataError: a folder holds no picture, or a pattern matches none; the line names it.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found: list[str] = []
    for name in names:
        if os.path.isdir(name):
            files = sorted(file for file in _below(name) if file.lower().endswith(IMG_EXTENSIONS))
            if not files:
                raise DataError(f"{name}: no picture in this folder or below it ({' '.join(IMG_EXTENSIONS)})")
            found += files
        elif glob.has_magic(name) and not os.path.exists(name):
            files = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
            if not files:
                raise DataError(f"{name}: no file has such a name")
            found += files
        else:
            found.append(name)
    return found


def _below(folder: str) -> Iterator[str]:
    # Links are followed, as in training; a folder that contains itself is entered once.
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}")

    for place, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in seen]
        yield from (os.path.join(place, file) for file in files)


class Predictor:
    """A checkpoint that answers for pictures, on a GPU where there is one.

    Args:
        checkpoint: a file, ours or another system's, or a run folder.
        batch_size: pictures at once.
        workers: processes that decode; None: as many as there are cores, at most 8, where pictures fill them.

    Raises:
        CheckpointError: it cannot be used.
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
        """Each picture's likeliest classes, in order.

        Raises:
            DataError: a process that decodes is dead.
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
        """Pictures as the model sees them, before they are normalised: uint8 (n, H, W, 3)."""
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
            # Processes that would not get two batches each take longer to start than to decode them here.
            workers = min(8, len(os.sched_getaffinity(0)), len(files) // (2 * self.batch_size))
        return ImageLoader(split, self._augment(), self.device, batch_size=self.batch_size, workers=workers)

    def _augment(self) -> Any:
        from resnext_ignite.data.augment.chain import Augment

        metadata = self.metadata
        channels_last = self.config.train.channels_last
        return Augment(seed=0, mean=metadata.mean, std=metadata.std, channels_last=channels_last)


def table(predictions: Iterable[Prediction], files: Sequence[str], classes: Sequence[str]) -> Iterator[str]:
    """A line for each picture: its name, then probability and class of each answer, in columns."""
    width = max(map(len, files))
    name_width = min(24, max(map(len, classes)))
    for prediction in predictions:
        answers = (f"{100 * answer.probability:5.1f} % {answer.name:<{name_width}}" for answer in prediction.top)
        yield f"{prediction.file:<{width}}  {'  '.join(answers)}".rstrip()


def as_json(predictions: Iterable[Prediction]) -> str:
    """{predictions: [{file, top: [{class, index, probability}]}]} in one line."""
    found = [
        {
            "file": prediction.file,
            "top": [{"class": a.name, "index": a.index, "probability": a.probability} for a in prediction.top],
        }
        for prediction in predictions
    ]
    return json.dumps({"predictions": found})


def write_csv(predictions: Iterable[Prediction]) -> None:
    """A row for each answer on standard output: file, rank from 1, class, index, probability."""
    writer = csv.writer(sys.stdout)
    writer.writerow(("file", "rank", "class", "index", "probability"))
    for prediction in predictions:
        for rank, answer in enumerate(prediction.top, start=1):
            writer.writerow((prediction.file, rank, *asdict(answer).values()))


def save_sheet(predictor: Predictor, predictions: Sequence[Prediction], path: Path) -> None:
    """Draw the first pictures as the model sees them, each with its name and its likeliest class."""
    from resnext_ignite.plots.figures import draw_sheet, save_figure

    shown = predictions[:_MOST_ON_SHEET]
    captions = [f"{Path(p.file).name[-22:]}\n{p.top[0].name} {100 * p.top[0].probability:.0f} %" for p in shown]
    save_figure(draw_sheet(predictor.pictures([p.file for p in shown]), captions), path)


def _readable(predictions: Iterable[Prediction], broken: list[Prediction], given: str) -> Iterator[Prediction]:
    # The others are told at once, and kept. `given` is where standard input lies.
    for prediction in predictions:
        if prediction.error is None:
            yield prediction
        else:
            print(f"error: {prediction.error.replace(given, 'standard input')}", file=sys.stderr)
            broken.append(prediction)


def main(arguments: list[str]) -> int:
    """The command; raises ResnextError for what a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.predict", description="The likeliest classes of pictures, with probabilities."
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE|RUN", help="ours or another system's; or a run")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes a picture (default: 5)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at once (default: 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--csv", action="store_true", help="print a row for each answer and nothing else")
    parser.add_argument("--save-sheet", metavar="FILE.png", help="draw the pictures (the first 64) with their answers")
    parser.add_argument(
        "pictures",
        nargs="+",
        metavar="PICTURE|FOLDER",
        help="files, folders with all below them, patterns ('*.jpg'), or - for a picture on standard input",
    )
    parsed = parser.parse_args(arguments)
    for name in ("top_k", "batch_size"):
        if vars(parsed)[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {vars(parsed)[name]}: at least 1")
    if parsed.json and parsed.csv:
        raise ConfigError("--json and --csv: choose one")
    if parsed.save_sheet:
        check_place("--save-sheet", Path(parsed.save_sheet))
    broken: list[Prediction] = []
    with tempfile.NamedTemporaryFile(prefix="standard-input-") as given:
        if _STANDARD_INPUT in parsed.pictures:
            if sys.stdin is None:
                raise DataError("-: standard input is closed")
            # A reader of pictures moves to and fro in them, which a pipe does not allow.
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
        raise DataError(f"{len(broken)} of {len(files)} pictures could not be read")
    return 0


if __name__ == "__main__":
    run_command(main)
