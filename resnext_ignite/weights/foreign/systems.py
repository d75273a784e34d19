"""The systems whose checkpoints are read, and what was read of one."""

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
from resnext_ignite.weights.foreign.mxnet_model import adapt_symbol_zoo, statistics_of_data
from resnext_ignite.weights.foreign.recognition import Network


@dataclass(frozen=True)
class System:
    """A system whose checkpoints are read.

    Args:
        naming: of its weights; None: they have no names, and the network in its files is followed.
        mean, std: by which it normalised pictures, 0 to 1.
        is_imagenet: trained on pictures of 224 pixels; None: where the stem is 7x7.
        adapt: makes of renamed weights, in place, those of this project's network.
        statistics: takes mean and std from renamed weights, instead of the above; its second argument is named in
            errors.
    """

    naming: Naming | None
    mean: Statistics
    std: Statistics
    is_imagenet: bool | None = False
    adapt: Callable[[Weights], None] = lambda weights: None
    statistics: Callable[[Weights, Path], tuple[Statistics, Statistics] | None] = lambda weights, file: None


def _cifars_behind_a_small_stem(weights: Weights, file: Path) -> tuple[Statistics, Statistics] | None:
    # facebookresearch/ResNeXt has a 3x3 stem for CIFAR alone, as others do.
    return (cifar.MEAN, cifar.STD) if weights["conv1.weight"].shape[-1] == 3 else None


SYSTEMS = {
    # train.py there: the same statistics for CIFAR-10 and CIFAR-100.
    "resnext.pytorch": System(RESNEXT_PYTORCH, cifar.MEAN, cifar.STD),
    # cifar.py there: ResNeXt.pytorch's network and names, in a dictionary, with other statistics.
    "pytorch-classification": System(RESNEXT_PYTORCH, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    # conf/global_settings.py there.
    "pytorch-cifar100": System(
        PYTORCH_CIFAR100,
        (0.5070751592, 0.4865488733, 0.4409178434),
        (0.2673342859, 0.2564384629, 0.2761504713),
        adapt=spread_first_convolutions,
    ),
    # Their own have a 7x7 stem; under their names, CIFAR's come as `convert --to` writes them.
    "torchvision": System(
        TORCHVISION, folders.MEAN, folders.STD, is_imagenet=None, statistics=_cifars_behind_a_small_stem
    ),
    # The tv_, fb_ssl_ and fb_swsl_ weights too.
    "timm": System(TORCHVISION, folders.MEAN, folders.STD, is_imagenet=None, statistics=_cifars_behind_a_small_stem),
    "torch7": System(None, folders.MEAN, folders.STD, is_imagenet=None, statistics=_cifars_behind_a_small_stem),
    "caffe": System(None, folders.MEAN, folders.STD, is_imagenet=None, statistics=_cifars_behind_a_small_stem),
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
    """What was read: the weights under this project's names, their network, and how pictures were normalised.

    `stated` is the rest of a checkpoint, where a file of this project's own says it (`stated.py`).
    """

    source: str
    network: Network
    weights: dict[str, Tensor]
    mean: Statistics
    std: Statistics
    stated: dict[str, Any] | None = None

    @property
    def is_imagenet(self) -> bool:
        """Whether it was trained on pictures of 224 pixels; False where the file itself states a size."""
        if self.stated is not None:
            return False
        told = SYSTEMS[self.source].is_imagenet
        return parse_model_name(self.network.name).layout == "imagenet" if told is None else told


def renamed_for(target: str, weights: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """A model's weights under another system's names.

    Raises:
        CheckpointError: that system has no such network; the line names the first weight that says so.
    """
    renamed = {}
    for name, value in weights.items():
        theirs = TARGETS[target].from_ours(name)
        if theirs is None:
            raise CheckpointError(f"{file}: {name}: {target} has no such weight")
        renamed[theirs] = value
    return renamed
