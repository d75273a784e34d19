"""An earlier name of `resnext_ignite.checkpoint.open_model`, which model cards of earlier versions show."""

from resnext_ignite.weights.loading import open_model

__all__ = ["open_model"]
