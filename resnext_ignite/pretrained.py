"""Weights to start a model from: another run's, another system's, or torchvision's by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnext_ignite.checkpoint import find_checkpoint, load_checkpoint
from resnext_ignite.distributed import Ranks
from resnext_ignite.errors import CheckpointError, ForeignFileError
from resnext_ignite.foreign import read_foreign


def load_pretrained(model: nn.Module, source: str, ranks: Ranks | None = None) -> None:
    """Start a model from the weights of a run, of a file, ours or another system's, or of torchvision's `source`.

    Keys must fit. A classifier of another shape is left as initialised. What must be downloaded is downloaded once a
    machine.

    Raises:
        CheckpointError: no such weights, or weights of another architecture.
    """
    if not Path(source).exists():
        (ranks or Ranks()).first_on_node(lambda: _download(source))
    state = _pretrained_weights(source)
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


def _download(source: str) -> None:
    _pretrained_weights(source)


def _pretrained_weights(source: str) -> dict[str, Any]:
    if Path(source).exists():
        file = find_checkpoint(Path(source))
        try:
            state = load_checkpoint(file)
        except ForeignFileError:
            return read_foreign(file).weights
        return dict(state["ema"] or state["model"])
    import torchvision

    try:
        weights = torchvision.models.get_weight(source)
    except (ValueError, KeyError):
        raise CheckpointError(
            f"model.pretrained: '{source}' is neither a file nor the name of torchvision weights "
            "(ResNeXt50_32X4D_Weights.IMAGENET1K_V2)"
        ) from None
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
