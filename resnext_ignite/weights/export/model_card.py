"""Composes the model card (README.md) of an exported model. It uses only the checkpoint and the result of the export.

The card has Hugging Face's format: YAML between two lines of dashes, then Markdown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from resnext_ignite.config.schema import Config, nest
from resnext_ignite.models import create_model
from resnext_ignite.models.cost import cost_of
from resnext_ignite.runs.checkpoint import ModelMetadata
from resnext_ignite.weights.export.formats import TOLERANCE, Options
from resnext_ignite.weights.foreign.metadata import public_values

_DATA = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "shapes": "`shapes`, images that resnext_ignite draws from a random seed",
    "imagefolder": "a folder of images; name it here",
    "shards": "images in tar shards; name them here",
}


@dataclass(frozen=True)
class ExportedModel:
    """The exported file that a card describes.

    Args:
        name: name of the file.
        format: "onnx", "torch-export" or "safetensors".
        options: options of the export.
        difference: `largest_difference` of its logits (`formats.py`); None for safetensors, which holds only weights.
        versions: versions of the packages that wrote the file, by package name.
    """

    name: str
    format: str
    options: Options
    difference: float | None
    versions: dict[str, str]


def model_card(metadata: ModelMetadata, exported: ExportedModel) -> str:
    """Return the whole card, as Markdown."""
    name = metadata.config.model.name
    head: dict[str, Any] = {
        "pipeline_tag": "image-classification",
        "tags": ["resnext", "pytorch" if exported.format == "torch-export" else exported.format],
    }
    if metadata.source is None and metadata.config.data.name.startswith("cifar"):
        head["datasets"] = [metadata.config.data.name]
    parts = [
        f"---\n# license: missing; choose one that the training images allow\n{_yaml(head)}---",
        f"# {name}",
        _description(metadata),
        "## Errors",
        _errors(metadata),
        "## Use",
        _use(metadata, exported),
        "## Input",
        _input(metadata, exported.options),
        "## Classes",
        f"```json\n{json.dumps(metadata.classes, ensure_ascii=False)}\n```",
        "## Recipe",
        _recipe(metadata),
        "## File",
        _file(exported),
        "## Licence",
        "Not stated. State the licence here and at `license` above before you publish these weights.",
    ]
    return "\n\n".join(parts) + "\n"


def _description(metadata: ModelMetadata) -> str:
    network = metadata.config.model
    classes, size = len(metadata.classes), metadata.image_size
    cost = cost_of(create_model(network.name, classes, stem_channels=network.stem_channels), size)
    if metadata.source is None:
        origin = f"Trained with resnext_ignite on {_DATA[metadata.config.data.name]}."
    else:
        origin = (
            f"Converted from a checkpoint of {metadata.source}. That file states only the "
            "network: the image size and the normalisation below are that system's defaults, and the names of the "
            "classes are those of a data set with as many classes, or else numbers. Check them; the training data "
            "is not known."
        )
    narrow = "" if network.stem_channels == 64 else f", {network.stem_channels} channels after the stem"
    return (
        f"A ResNeXt (arXiv:1611.05431){narrow}: {classes} classes, {cost.parameters:,} parameters, "
        f"{cost.multiply_adds:,} multiply-adds for an image of {size}x{size}.\n\n{origin}"
    )


def _errors(metadata: ModelMetadata) -> str:
    if metadata.source is not None:
        return "Not known."
    last, best = metadata.errors["last"], metadata.errors["best"]
    of_these = next((r for r in (last, best) if r and r["iteration"] == metadata.iteration), None)
    if of_these is None:
        return f"These weights, of iteration {metadata.iteration}, were not evaluated."
    split = {"val": "held-out training images (`val`)"}.get(of_these["split"], f"the {of_these['split']} split")
    wrong = of_these["images"] - of_these["correct"]
    lines = [
        f"Top-1 error on {split}: {of_these['top1_error']:.2f} % ({wrong:,} wrong of {of_these['images']:,} images), "
        f"top-5 error {of_these['top5_error']:.2f} %.",
        _which_epoch(metadata, of_these["epoch"], chosen=bool(best) and best["iteration"] == metadata.iteration),
    ]
    if metadata.config.train.averages:
        lines.append("The weights are a moving average over the iterations; the errors are those of the average.")
    return "\n\n".join(lines)


def _which_epoch(metadata: ModelMetadata, epoch: int, *, chosen: bool) -> str:
    epochs = metadata.config.train.epochs
    if epoch == epochs:
        return f"These are the weights of the last of {epochs} epochs; they were not chosen by their error."
    if not chosen:
        return f"These are the weights of epoch {epoch} of {epochs} planned; they were not chosen by their error."
    best = f"These are the weights of epoch {epoch} of {epochs} planned, which had the lowest error up to then"
    if metadata.selection == "val":
        return f"{best} on held-out training images. Because of this choice, the error above is slightly optimistic."
    return f"{best} on the {metadata.selection} split itself, so the error above is not a valid test result."


def _use(metadata: ModelMetadata, exported: ExportedModel) -> str:
    size, name = metadata.image_size, json.dumps(exported.name)
    resized = f"resize(({size}, {size}), PIL.Image.Resampling.BILINEAR)"
    picture = f'picture = PIL.Image.open("picture.png").convert("RGB").{resized}'
    images = "np.asarray(picture).transpose(2, 0, 1)[None]"
    if not exported.options.uint8:
        mean, std = (f"np.reshape({list(values)}, (3, 1, 1))" for values in (metadata.mean, metadata.std))
        images = f"np.float32(({images} / 255 - {mean}) / {std})"
    if exported.format == "onnx":
        imports = "import numpy as np, onnxruntime, PIL.Image"
        logits = f'onnxruntime.InferenceSession({name}).run(None, {{"images": images}})[0]'
    elif exported.format == "torch-export":
        imports = "import numpy as np, PIL.Image, torch"
        logits = f"torch.export.load({name}).module()(torch.tensor(images))"
    else:
        imports = "import numpy as np, PIL.Image, torch, resnext_ignite.checkpoint"
        logits = f"resnext_ignite.checkpoint.open_model({name})[0](torch.tensor(images))"
    lines = [imports, picture, f"images = {images}", f"logits = {logits}"]
    return (
        "```python\n" + "\n".join([*lines, "print(int(logits[0].argmax()))  # class, as in the list below"]) + "\n```"
    )


def _input(metadata: ModelMetadata, options: Options) -> str:
    mean, std = ", ".join(map(str, metadata.mean)), ", ".join(map(str, metadata.std))
    if options.uint8:
        kind = f"`images`: uint8, 0 to 255. Inside, red, green and blue become (value / 255 - mean) / std, mean {mean}"
    else:
        kind = f"`images`: float32, red, green and blue as (value / 255 - mean) / std, mean {mean}"
    crop = metadata.config.data.eval_crop
    central = f" of the central square, {crop} of the shorter side" if crop < 1 else " of the central square"
    return (
        f"{kind}, std {std}; shape (N, 3, H, W), any N, H and W. Evaluated at {metadata.image_size}x"
        f"{metadata.image_size}{central}, resized with antialiasing if an image has another size.\n\n"
        f"`logits`: float32 (N, {len(metadata.classes)}); a softmax turns them into probabilities."
    )


def _recipe(metadata: ModelMetadata) -> str:
    if metadata.source is not None:
        return "Not known."
    before = public_values(Config())
    changed = {key: value for key, value in public_values(metadata.config).items() if value != before[key]}
    return (
        f"The values that differ from the defaults of resnext_ignite, which `--help-config` lists:\n\n"
        f"```yaml\n{_yaml(nest(changed))}```"
    )


def _file(exported: ExportedModel) -> str:
    lines = []
    if exported.difference is None:
        lines.append("Weights and BatchNorm statistics, unchanged, with torchvision's names; metadata in the file.")
    else:
        folded = "folded into the convolutions" if exported.options.fold else "as it is"
        lines.append(
            f"BatchNorm {folded}. Checked before it was saved, with two batch sizes and two image sizes: the largest "
            f"difference of a logit from the model in eager mode: {exported.difference:.1e}, over the larger of 1 and "
            f"the largest logit (at most {TOLERANCE:.0e} is allowed)."
        )
    lines.append("Written by " + ", ".join(f"{name} {version}" for name, version in exported.versions.items()) + ".")
    return "\n\n".join(lines)


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)
