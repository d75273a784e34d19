"""The public names of the two engines; the code is in `training/engines.py`."""

from resnext_ignite.training.engines import RunEvents, create_evaluator, create_trainer

__all__ = ["RunEvents", "create_evaluator", "create_trainer"]
