"""A model from any file of weights: this project's, or another system's."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from resnext_ignite.runs.checkpoint import ModelMetadata, find_checkpoint, load_model, model_of
from resnext_ignite.runtime.errors import ForeignFileError


def open_model(path: str | Path) -> tuple[nn.Module, ModelMetadata]:
    """As `load_model`, of a file that another system wrote, too.

    Raises:
        CheckpointError: it can be used as neither.
    """
    try:
        return load_model(path)
    except ForeignFileError:
        # Not at the top: few files are another system's.
        from resnext_ignite.weights.foreign.conversion import checkpoint_of
        from resnext_ignite.weights.foreign.reading import read_foreign

        file = find_checkpoint(Path(path))
        return model_of(checkpoint_of(read_foreign(file)), file)
