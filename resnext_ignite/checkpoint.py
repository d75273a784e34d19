"""Provides the public functions that open a model. Their code is in `runs/checkpoint.py` and `weights/loading.py`."""

from resnext_ignite.runs.checkpoint import ModelMetadata, load_model
from resnext_ignite.weights.loading import open_model

__all__ = ["ModelMetadata", "load_model", "open_model"]
