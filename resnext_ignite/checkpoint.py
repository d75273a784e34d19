"""The public name of `load_model`, which opens a trained model; its code is in `runs/checkpoint.py`."""

from resnext_ignite.runs.checkpoint import ModelMetadata, load_model

__all__ = ["ModelMetadata", "load_model"]
