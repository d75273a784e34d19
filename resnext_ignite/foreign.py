"""The earlier import path of `resnext_ignite.checkpoint.open_model`. Model cards of earlier versions use it."""

from resnext_ignite.weights.loading import open_model

__all__ = ["open_model"]
