"""Converts a model of another system to a checkpoint of this project."""

from __future__ import annotations

from typing import Any

from torchvision.models import ResNeXt50_32X4D_Weights

from resnext_ignite.config.schema import config_of
from resnext_ignite.data.sources.cifar import CLASSES
from resnext_ignite.weights.foreign.systems import ForeignModel


def checkpoint_of(model: ForeignModel) -> dict[str, Any]:
    """Return a checkpoint with weights, config, classes and normalisation; a run cannot resume from it."""
    if model.stated is not None:
        return {**model.stated, "model": model.weights, "ema": None}
    classes, data = classes_of(model)
    config = config_of(
        {
            "model": {
                "name": model.network.name,
                "num_classes": model.network.num_classes,
                "stem_channels": model.network.stem_channels,
            },
            "data": {
                "name": data,
                "image_size": 224 if model.is_imagenet else 32,
                "mean": list(model.mean),
                "std": list(model.std),
                "eval_crop": 0.875 if model.is_imagenet else 1.0,
            },
            "augment": {"crop_padding": 0} if model.is_imagenet else {},
            # The other systems computed their published errors in fp32.
            "train": {"precision": "fp32"},
        }
    )
    return {
        "config": config.model_dump(mode="json"),
        "model": model.weights,
        "ema": None,
        "classes": list(classes),
        "mean": list(model.mean),
        "std": list(model.std),
        "image_size": config.data.image_size,
        "selection": "test",
        "trainer": {"iteration": 0},
        "errors": {"last": None, "best": None},
        "source": model.source,
    }


def classes_of(model: ForeignModel) -> tuple[tuple[str, ...], str]:
    """Return a model's class names and the value of `data.name`; both are guessed from the number of classes.

    If no known data set has this number of classes, the class names are numbers.
    """
    count = model.network.num_classes
    if model.is_imagenet and count == 1000:
        return tuple(ResNeXt50_32X4D_Weights.IMAGENET1K_V1.meta["categories"]), "imagefolder"
    if not model.is_imagenet and model.source not in ("torchvision", "timm"):
        # Systems other than torchvision and timm train networks with a 3x3 stem on CIFAR only.
        for data, names in CLASSES.items():
            if count == len(names):
                return names, data
    return tuple(str(number) for number in range(count)), "imagefolder"
