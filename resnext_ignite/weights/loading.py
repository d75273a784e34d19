"""Opens a model from a file of weights that this project or another system wrote."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from resnext_ignite.runs.checkpoint import ModelMetadata, find_checkpoint, load_model, model_of
from resnext_ignite.runtime.errors import ForeignFileError


def open_model(path: str | Path) -> tuple[nn.Module, ModelMetadata]:
    """Open a model as `load_model` does; the file may also come from another system.

    Raises:
        CheckpointError: the file is not a usable checkpoint of this project or of another system.
    """
    try:
        return load_model(path)
    except ForeignFileError:
        # Imported here, because only files of other systems need these modules.
        from resnext_ignite.weights.foreign.conversion import checkpoint_of
        from resnext_ignite.weights.foreign.reading import read_foreign

        file = find_checkpoint(Path(path))
        return model_of(checkpoint_of(read_foreign(file)), file)
