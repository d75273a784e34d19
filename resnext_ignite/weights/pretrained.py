"""Loads the initial weights of a model (`model.pretrained`), and the normalisation of their training.

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
    """Load the weights that `source` names into a model; the names and shapes of the weights must match.

    The classifier is the exception: if its shape differs, the model keeps its own initial classifier. If torchvision's
    weights are not cached, one rank on each machine downloads them.

    Args:
        name: `model.name`; torchvision's weights are looked up by it.
        source: `model.pretrained`.
        ranks: ranks of the run; None: a single process.

    Raises:
        CheckpointError: `source` does not exist, or its weights are of another architecture.
    """
    if source.startswith(_TORCHVISION):
        state: dict[str, Any] = {}
        # The first rank on each machine downloads. The other ranks then read the cached file.
        (ranks or Ranks()).first_on_node(lambda: state.update(_torchvision_weights(name, source)))
        state = state or _torchvision_weights(name, source)
    else:
        checkpoint = _checkpoint(source)
        state = dict(checkpoint.get("ema") or checkpoint["model"])
    own = model.state_dict()
    for key in ("fc.weight", "fc.bias"):
        if key in state and state[key].shape != own[key].shape:
            state[key] = own[key]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"model.pretrained: {source} does not fit: {' '.join(str(error).split())[:200]}"
        ) from None


def with_normalisation(config: Config) -> Config:
    """Return the config with the normalisation of its pretrained weights, unless it sets its own.

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
        # torch checks the hash only after a download. `weights_only` prevents a changed cached file from running code.
        return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu"))
    except OSError as error:
        raise CheckpointError(
            f"model.pretrained: {source}: {cached} is not there, and cannot be downloaded ({error}); put it there"
        ) from None
    except Exception as error:
        # A damaged or hostile file can make torch raise any exception.
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"model.pretrained: {cached} is no file of weights ({reason}); remove it") from None
