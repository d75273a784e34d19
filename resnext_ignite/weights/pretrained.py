"""Weights to start a model from: another run's, another system's, or torchvision's; and how they saw pictures."""

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
    """Start a model, called `name`, from the weights that `source` stands for (`model.pretrained`); keys must fit.

    A classifier of another shape is left as initialised. What must be downloaded is downloaded once a machine.

    Raises:
        CheckpointError: no such weights, or weights of another architecture.
    """
    if source.startswith(_TORCHVISION):
        state: dict[str, Any] = {}
        # Each rank reads what the first one on its machine has downloaded.
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
    """The config with the normalisation of the weights that it starts from, where it names none itself.

    Raises:
        CheckpointError: no such weights.
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
            f"model.pretrained: '{source}' is no file or run folder, and torchvision's weights are named as "
            f"{_TORCHVISION}IMAGENET1K_V2"
        )
    file = find_checkpoint(path)
    try:
        return load_checkpoint(file)
    except ForeignFileError:
        # Not at the top: most runs start from weights of this project, or from none.
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
        # A file that lies there already is not hashed again: whatever it is, it must not be run.
        return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu"))
    except OSError as error:
        raise CheckpointError(
            f"model.pretrained: {source}: {cached} is not there, and cannot be downloaded ({error}); put it there"
        ) from None
    except Exception as error:
        # What a damaged or hostile file makes torch say is of any kind.
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"model.pretrained: {cached} is no file of weights ({reason}); remove it") from None
