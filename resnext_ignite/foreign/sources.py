"""The systems whose checkpoints are read, and what was read of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from resnext_ignite.data import cifar, imagefolder
from resnext_ignite.foreign.fit import Network
from resnext_ignite.foreign.keys import (
    PYTORCH_CIFAR100,
    SEED,
    TORCHVISION,
    Naming,
    Weights,
    spread_first_convolutions,
)

Statistics = tuple[float, float, float]


@dataclass(frozen=True)
class Source:
    """A system whose checkpoints are read.

    Args:
        naming: of its weights.
        mean, std: by which it normalised pictures, 0 to 1.
        is_imagenet: trained on pictures of 224 pixels.
        adapt: makes of renamed weights, in place, those of this project's network.
    """

    naming: Naming
    mean: Statistics
    std: Statistics
    is_imagenet: bool = False
    adapt: Callable[[Weights], None] = lambda weights: None


SOURCES = {
    # train.py there: the same statistics for CIFAR-10 and CIFAR-100.
    "seed": Source(SEED, cifar.MEAN, cifar.STD),
    # cifar.py there: ResNeXt.pytorch's network and names, in a dictionary, with other statistics.
    "pytorch-classification": Source(SEED, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    # conf/global_settings.py there.
    "pytorch-cifar100": Source(
        PYTORCH_CIFAR100,
        (0.5070751592, 0.4865488733, 0.4409178434),
        (0.2673342859, 0.2564384629, 0.2761504713),
        adapt=spread_first_convolutions,
    ),
    "torchvision": Source(TORCHVISION, imagefolder.MEAN, imagefolder.STD, is_imagenet=True),
    # The tv_, fb_ssl_ and fb_swsl_ weights too.
    "timm": Source(TORCHVISION, imagefolder.MEAN, imagefolder.STD, is_imagenet=True),
}
TARGETS = {"torchvision": TORCHVISION, "timm": TORCHVISION, "seed": SEED}


@dataclass(frozen=True)
class ForeignModel:
    """What was read: the weights under this project's names, their network, and how pictures were normalised."""

    source: str
    network: Network
    weights: dict[str, Tensor]
    mean: Statistics
    std: Statistics

    @property
    def is_imagenet(self) -> bool:
        """Whether it was trained on pictures of 224 pixels."""
        return SOURCES[self.source].is_imagenet
