"""Keeps the earlier import path of `open_model`, because model cards of earlier versions use it.

The current path is `resnext_ignite.checkpoint`.
"""

from resnext_ignite.weights.loading import open_model

__all__ = ["open_model"]
