"""Lists the config keys that a resumed run may change, and compares the configs of runs.

It also lists the keys for which the first start of a run replaces null or auto with a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resnext_ignite.config.schema import Config, flatten, with_values

# A resumed run may have new values for these keys. Only a new value of `train.epochs` changes the result of an
# iteration: the learning rate and, with progressive resizing, the size of the images depend on the number of epochs.
SAFE_ON_RESUME = (
    "train.epochs",
    "train.max_hours",
    "data.root",
    "data.download",
    "data.workers",
    "data.on_error",
    "data.max_skipped",
    "evaluation.every",
    "evaluation.early",
    "evaluation.flip_tta",
    "checkpoint.every_epochs",
    "checkpoint.every_iterations",
    "checkpoint.keep",
    "distributed.timeout_s",
    "logging.every_iterations",
    "logging.tensorboard",
    "logging.curves",
    "logging.mistakes",
    "logging.images",
    "logging.histograms",
)
# If the config leaves one of these keys open (null or auto), the first start of the run resolves its value from the
# machine or the data. A resumed run keeps that value.
_RESOLVED_AT_START = (
    "model.num_classes",
    "data.image_size",
    "data.mean",
    "data.std",
    "train.device",
    "train.precision",
    "train.grouped_conv",
    "train.deterministic",
    "evaluation.inference",
)


def adopt_resolved(config: Config, saved: Config) -> Config:
    """Return a copy of `config` that takes over the resolved values of a run.

    For each key in `_RESOLVED_AT_START` that is null or auto in `config`, the copy has the value in `saved`, the
    resolved config of the run.
    """
    now = flatten(config)
    before = flatten(saved)
    return with_values(config, {key: before[key] for key in _RESOLVED_AT_START if now[key] in (None, "auto", ["auto"])})


def changed_values(config: Config, saved: Config) -> dict[str, tuple[Any, Any]]:
    """Return a dict of the keys whose values differ: key -> (value in `saved`, value in `config`)."""
    before, after = flatten(saved), flatten(config)
    return {key: (before[key], after[key]) for key in after if before[key] != after[key]}


def differing_values(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """Return a dict of the keys whose values differ between the configs: key -> list with one value per config."""
    values = [flatten(config) for config in configs]
    listed = {key: [value[key] for value in values] for key in values[0]}
    return {key: column for key, column in listed.items() if any(value != column[0] for value in column)}
