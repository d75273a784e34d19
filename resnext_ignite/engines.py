"""Provides the public functions that create the two engines. Their code is in `training/engines.py`."""

from resnext_ignite.training.engines import RunEvents, create_evaluator, create_trainer

__all__ = ["RunEvents", "create_evaluator", "create_trainer"]
