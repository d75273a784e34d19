"""Defines the systems whose checkpoints this project reads, and a class for a model that was read from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from resnext_ignite.data.sources import cifar, folders
from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.runtime.model_names import parse_model_name
from resnext_ignite.weights.foreign.keys import (
    GLUONCV,
    MXNET,
    PYTORCH_CIFAR100,
    RESNEXT_PYTORCH,
    TORCHVISION,
    Naming,
    Statistics,
    Weights,
    spread_first_convolutions,
)
from resnext_ignite.weights.foreign.mxnet_network import adapt_symbol_zoo, statistics_of_data
from resnext_ignite.weights.foreign.recognition import Network


@dataclass(frozen=True)
class System:
    """A system whose checkpoints this project reads.

    Args:
        naming: the system's naming scheme; None if its files hold the layers of a network instead of named weights.
        mean, std: the usual mean and std of the system's input normalisation, for values from 0 to 1.
        is_imagenet: whether all models of the system are trained on images of 224 pixels. None: this is true only of
            the models with a 7x7 stem.
        adapt: changes the renamed weights in place, so that they fit this project's network.
        statistics: takes a model's renamed weights and its file (for error messages). Returns the mean and std of this
            model, or None if `mean` and `std` above are right for it.
    """

    naming: Naming | None
    mean: Statistics
    std: Statistics
    is_imagenet: bool | None = False
    adapt: Callable[[Weights], None] = lambda weights: None
    statistics: Callable[[Weights, Path], tuple[Statistics, Statistics] | None] = lambda weights, file: None


def _cifar_statistics_for_small_stem(weights: Weights, file: Path) -> tuple[Statistics, Statistics] | None:
    # facebookresearch/ResNeXt and other systems use a 3x3 stem for CIFAR only.
    return (cifar.MEAN, cifar.STD) if weights["conv1.weight"].shape[-1] == 3 else None


SYSTEMS = {
    # ResNeXt.pytorch's train.py uses the same mean and std for CIFAR-10 and CIFAR-100.
    "resnext.pytorch": System(RESNEXT_PYTORCH, cifar.MEAN, cifar.STD),
    # pytorch-classification's cifar.py uses ResNeXt.pytorch's network and names, but another mean and std. Its files
    # hold the weights in an outer dictionary.
    "pytorch-classification": System(RESNEXT_PYTORCH, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    # This mean and std are from conf/global_settings.py in pytorch-cifar100.
    "pytorch-cifar100": System(
        PYTORCH_CIFAR100,
        (0.5070751592, 0.4865488733, 0.4409178434),
        (0.2673342859, 0.2564384629, 0.2761504713),
        adapt=spread_first_convolutions,
    ),
    # The models that torchvision and timm publish have a 7x7 stem. A file with a 3x3 stem may still use their names for
    # the weights, because `convert --to` can write a CIFAR model with these names.
    "torchvision": System(
        TORCHVISION, folders.MEAN, folders.STD, is_imagenet=None, statistics=_cifar_statistics_for_small_stem
    ),
    # This entry is also right for timm's weights whose tag begins with tv_, fb_ssl_ or fb_swsl_.
    "timm": System(
        TORCHVISION, folders.MEAN, folders.STD, is_imagenet=None, statistics=_cifar_statistics_for_small_stem
    ),
    "torch7": System(None, folders.MEAN, folders.STD, is_imagenet=None, statistics=_cifar_statistics_for_small_stem),
    "caffe": System(None, folders.MEAN, folders.STD, is_imagenet=None, statistics=_cifar_statistics_for_small_stem),
    "mxnet": System(
        MXNET,
        folders.MEAN,
        folders.STD,
        is_imagenet=None,
        adapt=adapt_symbol_zoo,
        statistics=statistics_of_data,
    ),
    "gluoncv": System(GLUONCV, folders.MEAN, folders.STD, is_imagenet=True),
}
TARGETS = {"torchvision": TORCHVISION, "timm": TORCHVISION, "resnext.pytorch": RESNEXT_PYTORCH}


@dataclass(frozen=True)
class ForeignModel:
    """A model that was read from a file: its weights under this project's names, its network and its normalisation.

    `stated` holds the rest of the checkpoint for a safetensors file of this project (`metadata.py`). For all other
    files, it is None.
    """

    source: str
    network: Network
    weights: dict[str, Tensor]
    mean: Statistics
    std: Statistics
    stated: dict[str, Any] | None = None

    @property
    def is_imagenet(self) -> bool:
        """Whether to assume training images of 224 pixels; False if the file itself states the image size."""
        if self.stated is not None:
            return False
        stated = SYSTEMS[self.source].is_imagenet
        return parse_model_name(self.network.name).layout == "imagenet" if stated is None else stated


def renamed_for(target: str, weights: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return a model's weights under another system's names.

    Raises:
        CheckpointError: the other system has no name for a weight; the message names the first such weight.
    """
    renamed = {}
    for name, value in weights.items():
        theirs = TARGETS[target].from_project(name)
        if theirs is None:
            raise CheckpointError(f"{file}: {name}: {target} has no such weight")
        renamed[theirs] = value
    return renamed
