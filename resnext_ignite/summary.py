"""Prints a model's layers and costs: `python -m resnext_ignite.summary MODEL [MODEL ...]`.

MODEL is the name of a model, or a checkpoint. The model runs on the `meta` device, which computes only the shapes of
tensors. The command therefore takes seconds for any model.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnext_ignite.runtime.errors import ConfigError, run_command
from resnext_ignite.runtime.model_names import Architecture, parse_model_name
from resnext_ignite.runtime.tables import aligned, markdown

if TYPE_CHECKING:
    from resnext_ignite.models.layers import Layers

_HEAD = ("layer", "output", "kernels", "parameters", "multiply-adds", "kept, fp32", "receptive field")
_MARKDOWN_HEAD = (
    "`model.name`",
    "depth",
    "cardinality",
    "base width",
    "parameters",
    "multiply-adds",
    "receptive field",
    "image size",
)


@dataclass(frozen=True)
class Summary:
    """A model, the image size in pixels at which its costs are computed, and its layers."""

    name: str
    stem_channels: int
    num_classes: int
    image_size: int
    layers: Layers

    @property
    def architecture(self) -> Architecture:
        """The architecture, read from the name of the model."""
        return parse_model_name(self.name)


def summarize(
    model: str, image_size: int | None = None, classes: int | None = None, stem_channels: int | None = None
) -> Summary:
    """Return the summary of a model, which is given by its name or by a checkpoint.

    Args:
        model: a model's name, a checkpoint file or a run folder.
        image_size, classes, stem_channels: None: use the value in the checkpoint. If `model` is a model's name, None
            means 224 pixels and 1000 classes for the ImageNet layout, 32 pixels and 10 classes for the CIFAR layouts,
            and 64 channels after the stem.

    Raises:
        ConfigError: `model` is neither a name nor a file, a number is out of range, or `classes` or `stem_channels` is
            given for a checkpoint.
        CheckpointError: the file cannot be used.
    """
    from resnext_ignite.config.files import override_config
    from resnext_ignite.config.schema import Config

    try:
        imagenet = parse_model_name(model).layout == "imagenet"
        known = {"model.name": model, "model.num_classes": 1000 if imagenet else 10, "model.stem_channels": 64}
        known["data.image_size"] = 224 if imagenet else 32
    except ValueError as error:
        if not Path(model).exists():
            raise ConfigError(f"{error}; and no file has that name") from None
        if classes is not None or stem_channels is not None:
            raise ConfigError(f"{model}: a checkpoint has its own classes and stem; leave those options out") from None
        known = _of_checkpoint(Path(model))
    asked = {"model.num_classes": classes, "model.stem_channels": stem_channels, "data.image_size": image_size}
    known |= {key: value for key, value in asked.items() if value is not None}
    config = override_config(Config(), [f"{key}={value}" for key, value in known.items()])
    name, stem = config.model.name, config.model.stem_channels
    # Neither value is None here; `or 0` is for the type checker.
    num_classes, size = config.model.num_classes or 0, config.data.image_size or 0

    import torch

    from resnext_ignite.models import create_model
    from resnext_ignite.models.layers import layers_of

    # On the meta device, weights have no values, and cost neither time nor memory.
    with torch.device("meta"):
        network = create_model(name, num_classes, stem_channels=stem)
    return Summary(name, stem, num_classes, size, layers_of(network, size))


def _of_checkpoint(path: Path) -> dict[str, Any]:
    from resnext_ignite.weights.loading import open_model

    _, metadata = open_model(path)
    network = metadata.config.model
    return {
        "model.name": network.name,
        "model.num_classes": len(metadata.classes),
        "model.stem_channels": network.stem_channels,
        "data.image_size": metadata.image_size,
    }


def table(summary: Summary) -> str:
    """Return a table with a row for each layer of a model, followed by lines with the totals of the model."""
    layers = summary.layers
    rows = [_HEAD]
    for row in layers.rows:
        output = " x ".join(map(str, row.output))
        cost = (f"{row.cost.parameters:,}", _count(row.cost.multiply_adds), _bytes(row.kept))
        rows.append((row.name, output, row.kernels or "-", *cost, f"{row.receptive_field}"))
    lines = aligned(rows)
    stem = f", {summary.stem_channels} channels after the stem" if summary.stem_channels != 64 else ""
    lines += [
        f"{summary.name}{stem}: an image of {summary.image_size}x{summary.image_size}, {summary.num_classes} classes",
        f"parameters {layers.cost.parameters:,}",
        f"multiply-adds {_count(layers.cost.multiply_adds)}",
        "activations per image that training stores for the backward pass: " + _by_precision(layers.kept),
        "largest activations per image at one time in inference: " + _by_precision(layers.inference_peak),
        f"receptive field {layers.receptive_field} pixels",
    ]
    return "\n".join(lines)


def configuration_table(summaries: list[Summary]) -> str:
    """Return a Markdown table with a row for each model, as in `docs/training.md`."""
    rows: list[tuple[str, ...]] = [_MARKDOWN_HEAD]
    for summary in summaries:
        architecture, layers = summary.architecture, summary.layers
        shape = (architecture.depth, architecture.cardinality, architecture.base_width)
        costs = (f"{layers.cost.parameters / 1e6:.1f} M", f"{layers.cost.multiply_adds / 1e9:.2f} G")
        cells = (f"`{summary.name}`", *map(str, shape), *costs, str(layers.receptive_field), str(summary.image_size))
        rows.append(cells)
    return "\n".join(markdown(rows))


def as_json(summary: Summary) -> dict[str, Any]:
    """Return a summary as plain values for JSON. Bytes and multiply-adds are for one image; sizes are in pixels."""
    layers = summary.layers
    return {
        "name": summary.name,
        "stem_channels": summary.stem_channels,
        "num_classes": summary.num_classes,
        "image_size": summary.image_size,
        "parameters": layers.cost.parameters,
        "multiply_adds": layers.cost.multiply_adds,
        "kept_bytes": layers.kept,
        "inference_peak_bytes": layers.inference_peak,
        "receptive_field": layers.receptive_field,
        "layers": [
            {
                "name": row.name,
                "output": row.output,
                "kernels": row.kernels,
                "parameters": row.cost.parameters,
                "multiply_adds": row.cost.multiply_adds,
                "kept_bytes": row.kept,
                "receptive_field": row.receptive_field,
            }
            for row in layers.rows
        ],
    }


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _bytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB"


def _by_precision(bytes_: dict[str, int]) -> str:
    return ", ".join(f"{_bytes(number)} in {precision}" for precision, number in bytes_.items())


def main(arguments: list[str]) -> int:
    """Run the command; raise ResnextError for an error that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.summary",
        description="A model's layers, parameters, multiply-adds, memory of activations and receptive field.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model's name, a checkpoint file or a run folder")
    parser.add_argument("--image-size", type=int, metavar="N", help="default: the checkpoint's; 224, CIFAR layouts 32")
    parser.add_argument("--classes", type=int, metavar="N", help="default: 1000, CIFAR layouts 10")
    parser.add_argument("--stem-channels", type=int, metavar="N", help="default: 64")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="a row for each model, without layers")
    form.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parsed = parser.parse_args(arguments)
    asked = (parsed.image_size, parsed.classes, parsed.stem_channels)
    summaries = [summarize(model, *asked) for model in parsed.models]
    if parsed.json:
        print(json.dumps({"models": [as_json(summary) for summary in summaries]}))
    elif parsed.markdown:
        print(configuration_table(summaries))
    else:
        print("\n\n".join(table(summary) for summary in summaries))
    return 0


if __name__ == "__main__":
    run_command(main)
