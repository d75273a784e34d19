"""What a resumed run may change of its config, and what it takes over from the first start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resnext_ignite.config.schema import Config, flatten, with_values

# A run may be continued with other values of these: none changes what an iteration computes from its state, but for
# `train.epochs`, at whose new number whatever depends on it (learning rate, growing images) is evaluated from there on.
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
# Left open (null, auto), these are settled by the machine or the data at the first start, and kept from then on.
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
    """`config`, with what it leaves to the machine or the data taken from a run that settled it already."""
    now = flatten(config)
    before = flatten(saved)
    return with_values(config, {key: before[key] for key in _RESOLVED_AT_START if now[key] in (None, "auto", ["auto"])})


def changed_values(config: Config, saved: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with the saved and the new value."""
    before, after = flatten(saved), flatten(config)
    return {key: (before[key], after[key]) for key in after if before[key] != after[key]}


def differing_values(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """Keys whose values are not the same in all configs, with the value in each."""
    values = [flatten(config) for config in configs]
    listed = {key: [value[key] for value in values] for key in values[0]}
    return {key: column for key, column in listed.items() if any(value != column[0] for value in column)}
