"""Checkpoints that other systems wrote: recognised, renamed, fitted to a network; and written back for them.

Reading is `read_foreign`, writing `renamed_for`. What a file holds is verified before it is believed: nothing in it is
run, and a weight that does not fit is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnext_ignite.data import cifar, imagefolder
from resnext_ignite.errors import CheckpointError
from resnext_ignite.foreign.fit import Network, fitted, recognise
from resnext_ignite.foreign.keys import (
    PYTORCH_CIFAR100,
    SEED,
    TORCHVISION,
    Naming,
    Weights,
    spread_first_convolutions,
    without_prefixes,
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


def read_foreign(file: Path, source: str = "auto") -> ForeignModel:
    """The model in a file that another system wrote.

    Args:
        source: one of SOURCES; "auto": told by the file.

    Raises:
        CheckpointError: it cannot be read, is of no system known here or of several, or does not fit a ResNeXt.
    """
    content = load_tensors(file)
    weights, wrapped = state_of(content, file)
    if source == "auto":
        source = told_by(weights, wrapped=wrapped, file=file)
    naming = SOURCES[source].naming
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        ours = naming.to_ours(name)
        if ours is None:
            raise CheckpointError(f"{file}: {name}: {source} has no such weight in a ResNeXt; try another --from")
        renamed[ours] = value
    SOURCES[source].adapt(renamed)
    network = recognise(renamed, file)
    return ForeignModel(source, network, fitted(renamed, network, file), SOURCES[source].mean, SOURCES[source].std)


def load_tensors(file: Path) -> Any:
    """What a .safetensors file holds, or a file that torch.save wrote; nothing in it is run.

    Raises:
        CheckpointError: it cannot be read, or holds more than tensors and plain values.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{file}: no file of weights ({reason})") from None


def state_of(content: Any, file: Path) -> tuple[dict[str, Tensor], bool]:
    """The weights in a file's content, without the prefixes of wrappers, and whether a dictionary held them.

    Raises:
        CheckpointError: there are none.
    """
    wrapped = False
    # timm prefers its moving average, as its own loading does.
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content, wrapped = content[key], True
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{file}: holds no weights, but {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {name}: is {type(value).__name__}, not a weight")
    return without_prefixes(content), wrapped


def told_by(weights: Mapping[str, Tensor], *, wrapped: bool, file: Path) -> str:
    """The system that names its weights so.

    Raises:
        CheckpointError: none does.
    """
    if SEED.marker in weights:
        # Both name alike; only pytorch-classification keeps more than the weights in its files.
        return "pytorch-classification" if wrapped else "seed"
    if PYTORCH_CIFAR100.marker in weights:
        return "pytorch-cifar100"
    if TORCHVISION.marker in weights:
        return "torchvision"
    first = next(iter(weights))
    raise CheckpointError(f"{file}: {first}: no system known here names a ResNeXt's weights so; say --from")


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
