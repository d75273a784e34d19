"""Loads the initial weights of a model (`model.pretrained`), and the mean and std that they were trained with.

The weights come from another run, from another system or from torchvision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnext_ignite.config.schema import Config, with_values
from resnext_ignite.data.sources import folders
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runs.checkpoint import find_checkpoint, load_checkpoint
from resnext_ignite.runtime.errors import CheckpointError, ForeignFileError

_TORCHVISION = "torchvision:"


def load_pretrained(model: nn.Module, name: str, source: str, ranks: Ranks | None = None) -> None:
    """Load weights from `source` into a model. Their names and shapes must match those of the model's weights.

    Only the shape of the classifier may differ: in that case, the model keeps its own initial classifier. If
    torchvision's weights are not cached, one rank on each machine downloads them.

    Args:
        name: value of `model.name`, which selects torchvision's weights.
        source: value of `model.pretrained`.
        ranks: ranks of the run; None for a single process.

    Raises:
        CheckpointError: `source` does not exist or cannot be read, or its weights do not fit the model.
    """
    stated: dict[str, Any] = {}
    if source.startswith(_TORCHVISION):
        state: dict[str, Any] = {}
        # The first rank on each machine downloads. The other ranks then read the cached file.
        (ranks or Ranks()).first_on_node(lambda: state.update(_torchvision_weights(name, source)))
        state = state or _torchvision_weights(name, source)
    else:
        checkpoint = _checkpoint(source)
        stated = (checkpoint.get("config") or {}).get("model") or {}
        state = dict(checkpoint.get("ema") or checkpoint["model"])
    own = model.state_dict()
    for key in ("fc.weight", "fc.bias"):
        if key in state and state[key].shape != own[key].shape:
            state[key] = own[key]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        network = (stated.get("name"), stated.get("stem_channels", 64))
        advice = ""
        if stated and network != (name, own["conv1.weight"].shape[0]):
            advice = f" set model.name={network[0]} model.stem_channels={network[1]}, the network of these weights;"
        raise CheckpointError(f"model.pretrained: {source} does not fit {name}:{advice} {first[:160]}") from None


def with_normalisation(config: Config) -> Config:
    """Return the config with the mean and std that its pretrained weights were trained with.

    A config that sets mean and std itself, or that has no pretrained weights, is returned unchanged.

    Raises:
        CheckpointError: the pretrained weights do not exist, or their file states no mean and std.
    """
    source = config.model.pretrained
    if source is None or config.data.mean is not None:
        return config
    moments: dict[str, Any] = {"mean": folders.MEAN, "std": folders.STD}
    if not source.startswith(_TORCHVISION):
        moments = _checkpoint(source)
    try:
        return with_values(config, {"data.mean": list(moments["mean"]), "data.std": list(moments["std"])})
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"model.pretrained: {source}: no mean and std; set data.mean and data.std") from None


def _checkpoint(source: str) -> dict[str, Any]:
    path = Path(source).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"model.pretrained: '{source}' is not a file or run folder; weights of torchvision are named as in "
            f"{_TORCHVISION}IMAGENET1K_V2"
        )
    file = find_checkpoint(path)
    try:
        return load_checkpoint(file)
    except ForeignFileError:
        # Imported here, because only files of other systems need these modules.
        from resnext_ignite.weights.foreign.conversion import checkpoint_of
        from resnext_ignite.weights.foreign.reading import read_foreign

        return checkpoint_of(read_foreign(file))


def _torchvision_weights(name: str, source: str) -> dict[str, Any]:
    import torchvision

    try:
        known = torchvision.models.get_model_weights(name)
    except ValueError:
        raise CheckpointError(f"model.pretrained: {source}: torchvision has no {name}") from None
    try:
        weights = known[source.removeprefix(_TORCHVISION)]
    except KeyError:
        names = " or ".join(_TORCHVISION + weights.name for weights in known)
        raise CheckpointError(f"model.pretrained: {source}: torchvision's weights of {name} are {names}") from None
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        # torch checks the hash of a downloaded file, but not of a cached one. With `weights_only`, a manipulated cached
        # file cannot run code.
        return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu"))
    except OSError as error:
        raise CheckpointError(
            f"model.pretrained: {source}: {cached} is not there, and cannot be downloaded ({error}); put it there"
        ) from None
    except Exception as error:
        # A damaged or hostile file can make torch raise any exception.
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"model.pretrained: {cached} is no file of weights ({reason}); remove it") from None
