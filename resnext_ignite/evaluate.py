"""Count a checkpoint's errors on a split: `python -m resnext_ignite.evaluate --checkpoint RUN [--json]`.

With the run's own config, so that on the run's machine the figures are the run's own, to the last digit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from resnext_ignite.errors import CheckpointError, ConfigError, run_command

_ALLOWED = (
    "data.",
    "evaluation.batch_size",
    "evaluation.inference",
    "train.device",
    "train.precision",
    "train.channels_last",
)
_JSON_KEYS = ("images", "correct", "correct_top5", "top1_error", "top5_error", "loss")


def evaluate(checkpoint: Path, split: str, overrides: list[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The counts of ClassificationCounts for a checkpoint file or run folder, and the names of the classes.

    Raises:
        ResnextError: no usable checkpoint or data, or an override that would evaluate another model.
    """
    import torch

    from resnext_ignite import engines
    from resnext_ignite.checkpoint import load_model
    from resnext_ignite.config import with_values
    from resnext_ignite.config_files import override_config
    from resnext_ignite.data import build_eval_loader, load_data
    from resnext_ignite.distributed import Ranks
    from resnext_ignite.handlers.loggers import set_up_console
    from resnext_ignite.tuning import inference_for

    set_up_console()
    refused = [override for override in overrides if not override.startswith(_ALLOWED)]
    if refused:
        raise ConfigError(f"{refused[0]}: an evaluation takes {', '.join(_ALLOWED)} only")
    model, metadata = load_model(checkpoint)
    config = metadata.config
    if config.train.device == "cuda" and not torch.cuda.is_available():
        config = with_values(config, {"train.device": "cpu"})
    # Whatever the run did while training: an evaluation leaves no picture out.
    config = with_values(override_config(config, overrides), {"data.on_error": "fail"})
    device, ranks = engines.resolve_device(config.train.device, 0), Ranks()
    engines.set_up_machine(device, deterministic=bool(config.train.deterministic))
    data = load_data(config, ranks, (split,))
    if data.classes != metadata.classes:
        raise CheckpointError(
            f"{checkpoint}: knows the classes {_shortened(metadata.classes)}, the data has {_shortened(data.classes)}"
        )
    loader = build_eval_loader(config, data, split, device, ranks)
    model = engines.place(model, device, channels_last=config.train.channels_last)
    if config.evaluation.inference == "auto":
        config = with_values(config, {"evaluation.inference": inference_for(config, model, data, split, device)})
    evaluator = engines.build_evaluator(config, model, device, ranks)
    return evaluator.run(loader).metrics, metadata.classes


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def per_class_table(confusion: Any, classes: tuple[str, ...]) -> str:
    """Images, error and the most frequent wrong answer of each class, from counts int64 (C, C)."""
    width = max(len("class"), *(len(name) for name in classes))
    lines = [f"{'class':<{width}}  images  error %  mostly taken for"]
    for label, name in enumerate(classes):
        row = confusion[label].tolist()
        images, correct = sum(row), row[label]
        wrong = [(count, other) for other, count in enumerate(row) if other != label and count]
        count, other = max(wrong, default=(0, label))
        error = f"{100 * (images - correct) / images:.2f}" if images else "-"
        lines.append(f"{name:<{width}}  {images:>6}  {error:>7}  {f'{classes[other]} ({count})' if count else '-'}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command; raises ResnextError for what a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.evaluate",
        description="Top-1 and top-5 error, loss and a table by class, each image of the split counted once.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE|RUN", help="checkpoint file or run folder")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="default: test")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--confusion", metavar="FILE.png", help="draw the confusion matrix")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config values, as data.root=FOLDER")
    parsed = parser.parse_intermixed_args(arguments)
    metrics, classes = evaluate(Path(parsed.checkpoint), parsed.split, parsed.overrides)
    if parsed.confusion:
        from resnext_ignite.pictures import draw_confusion, save_figure

        save_figure(draw_confusion(metrics["confusion"], classes), Path(parsed.confusion))
    figures = {key: metrics[key] for key in _JSON_KEYS}
    if parsed.json:
        print(json.dumps({"checkpoint": parsed.checkpoint, "split": parsed.split, **figures}))
        return 0
    wrong = metrics["images"] - metrics["correct"]
    print(per_class_table(metrics["confusion"], classes))
    print(f"{parsed.split}: {metrics['images']} images, {wrong} wrong")
    print(f"top-1 error {metrics['top1_error']:.2f} %")
    print(f"top-5 error {metrics['top5_error']:.2f} %")
    print(f"loss {metrics['loss']:.4f}")
    if parsed.confusion:
        print(f"confusion matrix: {parsed.confusion}")
    return 0


if __name__ == "__main__":
    run_command(main)
