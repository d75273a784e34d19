"""Evaluate a checkpoint on a split: `python -m resnext_ignite.evaluate --checkpoint RUN [--json]`.

The evaluation uses the config that the checkpoint stores. On the machine that trained the run, it therefore reports
exactly the metrics that the run recorded. The checkpoint may also come from another system, if `convert` can read it.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnext_ignite.runtime.errors import CheckpointError, ConfigError, run_command
from resnext_ignite.runtime.storage import check_output_path

if TYPE_CHECKING:
    import torch

    from resnext_ignite.config.schema import Config
    from resnext_ignite.data import Data
    from resnext_ignite.data.loaders import CropsLoader, EvalLoader
    from resnext_ignite.distributed.ranks import Ranks

log = logging.getLogger(__name__)
_ALLOWED_OVERRIDES = (
    "data.",
    "evaluation.batch_size",
    "evaluation.flip_tta",
    "evaluation.image_size",
    "evaluation.inference",
    "train.device",
    "train.precision",
    "train.channels_last",
)
_JSON_KEYS = ("images", "correct", "correct_top5", "top1_error", "top5_error", "loss", "calibration_error")
# These keys exist only with evaluation.flip_tta.
_FLIP_KEYS = ("correct_flip", "top1_error_flip", "top5_error_flip", "loss_flip")
_MISTAKES = 32
_VIEWS = {"one": "", "flip": " with mirror images", "ten-crop": " with ten crops"}
_PLOTS = {"confusion": "confusion matrix", "mistakes": "worst mistakes", "calibration": "calibration"}


def evaluate(
    checkpoint: Path, split: str, overrides: list[str], *, views: str = "one", keep_mistakes: int = 0
) -> tuple[dict[str, Any], Data]:
    """Evaluate a checkpoint file or run folder; return the metrics and the data.

    The metrics come from ClassificationCounts and Calibration, and also from FlipCounts if the config has
    `evaluation.flip_tta` and `views` is "one".

    Args:
        views: "one": each image once, as in the run's own evaluations; "flip": mean logits over each image and its
            mirror image; "ten-crop": mean logits over five crops and their mirror images.
        keep_mistakes: number of worst mistakes to list.

    Raises:
        ResnextError: the checkpoint or the data cannot be used, or an override is not in `_ALLOWED_OVERRIDES`.
    """
    import torch

    from resnext_ignite.config.files import override_config
    from resnext_ignite.config.schema import with_values
    from resnext_ignite.data import load_data
    from resnext_ignite.distributed.ranks import Ranks
    from resnext_ignite.models.inference import MeanOverViews
    from resnext_ignite.runtime import devices
    from resnext_ignite.runtime.console import set_up_console
    from resnext_ignite.training import engines
    from resnext_ignite.training.metrics import Calibration
    from resnext_ignite.training.tuning import inference_for
    from resnext_ignite.weights.loading import open_model

    set_up_console()
    refused = [override for override in overrides if not override.startswith(_ALLOWED_OVERRIDES)]
    if refused:
        raise ConfigError(
            f"{refused[0]}: cannot be overridden in an evaluation; only {', '.join(_ALLOWED_OVERRIDES)} can"
        )
    model, metadata = open_model(checkpoint)
    config = metadata.config
    if config.evaluation.image_size and any(override.startswith("data.image_size=") for override in overrides):
        raise ConfigError("data.image_size: this run sets evaluation.image_size; override that key instead")
    if config.train.device == "cuda" and not torch.cuda.is_available():
        config = with_values(config, {"train.device": "cpu"})
    # `progressive_from` applies only to training. Remove it: a config is invalid if it is not below the image size, and
    # an evaluation may use a smaller image size than the training did.
    config = with_values(config, {"augment.progressive_from": None})
    # data.on_error: an evaluation must count every image. It therefore fails if it cannot read an image.
    fixed = {"data.on_error": "fail", "logging.mistakes": keep_mistakes}
    config = with_values(override_config(config, overrides), fixed)
    if views != "one" and config.evaluation.flip_tta:
        log.info(f"evaluation.flip_tta: ignored, because --views {views} already averages over views")
        config = with_values(config, {"evaluation.flip_tta": False})
    if config.evaluation.image_size:
        # With `--split train`, the training images must have the evaluation size, too.
        config = with_values(config, {"data.image_size": config.evaluation.image_size})
    if views == "ten-crop":
        # The crops are taken from the image files; images in memory are already cropped to the centre.
        config = with_values(config, {"data.in_memory": False})
    device, ranks = devices.resolve_device(config.train.device, 0), Ranks()
    devices.set_up_machine(device, deterministic=bool(config.train.deterministic))
    data = load_data(config, ranks, (split,))
    _check_classes(checkpoint, metadata.classes, data.classes, foreign=metadata.source is not None)
    loader = _loader(config, data, split, device, ranks, views)
    model = devices.place(model, device, channels_last=config.train.channels_last)
    if views != "one":
        model = MeanOverViews(model, flip=True)
    if config.evaluation.inference == "auto":
        config = with_values(config, {"evaluation.inference": inference_for(config, model, data, split, device)})
    evaluator = engines.build_evaluator(config, model, device, ranks)
    Calibration(ranks, device).attach(evaluator, "calibration")
    return evaluator.run(loader).metrics, data


def _check_classes(checkpoint: Path, own: tuple[str, ...], found: tuple[str, ...], *, foreign: bool) -> None:
    if own == found:
        return
    if foreign and len(own) == len(found):
        # A file of another system stores no class names: `own` holds the class names of a known data set, or numbers.
        # The names in the data may differ: for example, the class folders of ImageNet have WordNet IDs as names.
        log.info(f"{checkpoint}: assuming that its {len(own)} classes are those of the data, in the same order")
        return
    raise CheckpointError(f"{checkpoint}: has the classes {_shortened(own)}, but the data has {_shortened(found)}")


def _loader(
    config: Config, data: Data, split: str, device: torch.device, ranks: Ranks, views: str
) -> EvalLoader | CropsLoader:
    from resnext_ignite.data import build_eval_loader
    from resnext_ignite.data.loaders import CropsLoader
    from resnext_ignite.data.reading.cropping import FIVE_CROPS
    from resnext_ignite.data.reading.image_files import ImageFiles

    if views != "ten-crop":
        return build_eval_loader(config, data, split, device, ranks)
    files = data.splits.get(split)
    if not isinstance(files, ImageFiles) or files.crop_ratio == 1:
        raise ConfigError("--views ten-crop: needs data of image files or shards, and data.eval_crop < 1")
    crops = [replace(data, splits={split: replace(files, anchor=anchor)}) for anchor in FIVE_CROPS]
    return CropsLoader([build_eval_loader(config, crop, split, device, ranks) for crop in crops])


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def per_class_table(confusion: Any, classes: tuple[str, ...]) -> str:
    """Return a table with one line per class: number of images, error, most frequent wrong prediction.

    Args:
        confusion: int64 (C, C); rows are true classes, columns are predicted classes.
        classes: the names of the C classes.
    """
    from resnext_ignite.runs.class_metrics import metrics_by_class

    width = max(len("class"), *(len(name) for name in classes))
    lines = [f"{'class':<{width}}  images  error %  mostly taken for"]
    for name, figures in zip(classes, metrics_by_class(confusion), strict=True):
        error = "-" if figures.error is None else f"{figures.error:.2f}"
        mostly = f"{classes[figures.taken_for]} ({figures.times})" if figures.times else "-"
        lines.append(f"{name:<{width}}  {figures.images:>6}  {error:>7}  {mostly}")
    return "\n".join(lines)


def draw(pictures: dict[str, Path], metrics: dict[str, Any], data: Data, split: str) -> None:
    """Draw the requested plots into files. `pictures` is a dict: name of the plot -> path of its file."""
    if not pictures:
        return
    from resnext_ignite.plots.figures import draw_calibration, draw_confusion, draw_mistakes, save_figure

    if "confusion" in pictures:
        save_figure(draw_confusion(metrics["confusion"], data.classes), pictures["confusion"])
    if "mistakes" in pictures:
        save_figure(draw_mistakes(metrics["mistakes"], data.splits[split], data.classes), pictures["mistakes"])
    if "calibration" in pictures:
        save_figure(draw_calibration(metrics["calibration_bins"]), pictures["calibration"])


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code.

    Raises:
        ResnextError: an error that the user can fix.
    """
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.evaluate",
        description="Top-1 and top-5 error, loss and a table by class, each image of the split counted once.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE|RUN", help="checkpoint file or run folder")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="default: test")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--views",
        choices=("one", "flip", "ten-crop"),
        default="one",
        help="average over mirror images or ten crops; the metrics then differ from the run's (default: one)",
    )
    parser.add_argument("--confusion", metavar="FILE.png", help="draw the confusion matrix")
    parser.add_argument("--mistakes", metavar="FILE.png", help=f"draw the worst mistakes, at most {_MISTAKES}")
    parser.add_argument("--calibration", metavar="FILE.png", help="plot accuracy against confidence")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config values, for example data.root=FOLDER")
    parsed = parser.parse_intermixed_args(arguments)
    pictures = {name: Path(vars(parsed)[name]) for name in _PLOTS if vars(parsed)[name]}
    for name, path in pictures.items():
        check_output_path(f"--{name}", path)
    metrics, data = evaluate(
        Path(parsed.checkpoint),
        parsed.split,
        parsed.overrides,
        views=parsed.views,
        keep_mistakes=_MISTAKES if parsed.mistakes else 0,
    )
    # Draw before printing: the reader of the output may exit early (`| head`), which ends this command.
    draw(pictures, metrics, data, parsed.split)
    figures = {key: metrics[key] for key in (*_JSON_KEYS, *_FLIP_KEYS) if key in metrics}
    if parsed.json:
        views = {} if parsed.views == "one" else {"views": parsed.views}
        print(json.dumps({"checkpoint": parsed.checkpoint, "split": parsed.split, **views, **figures}))
        return 0
    wrong = metrics["images"] - metrics["correct"]
    print(per_class_table(metrics["confusion"], data.classes))
    print(f"{parsed.split}{_VIEWS[parsed.views]}: {metrics['images']} images, {wrong} wrong")
    print(f"top-1 error {metrics['top1_error']:.2f} %")
    print(f"top-5 error {metrics['top5_error']:.2f} %")
    print(f"loss {metrics['loss']:.4f}")
    if "top1_error_flip" in metrics:
        print(f"with mirror images (evaluation.flip_tta): top-1 error {metrics['top1_error_flip']:.2f} %")
    print(f"expected calibration error {metrics['calibration_error']:.2f} %")
    for name, path in pictures.items():
        print(f"{_PLOTS[name]}: {path}")
    return 0


if __name__ == "__main__":
    run_command(main)
