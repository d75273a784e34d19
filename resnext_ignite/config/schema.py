"""Defines the typed, immutable config of a run, and converts it to and from plain values.

`files.py` reads and writes config files.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from resnext_ignite.config.sections import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    Section,
    TrainConfig,
    size_step,
)
from resnext_ignite.runtime.model_names import parse_model_name


class Config(Section):
    """The config of a whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Seed of all random numbers of a run: initial weights, order of the images, augmentation, held-out images."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels: `data.image_size`, or its default if it is null."""
        # Published image sizes: 224 pixels for the ImageNet layout, 32 for the layouts with a 3x3 stem.
        photographs = (
            self.data.name in ("imagefolder", "shards") and parse_model_name(self.model.name).layout == "imagenet"
        )
        return self.data.image_size or (224 if photographs else 32)

    @model_validator(mode="after")
    def _check_batches(self) -> Config:
        batch, accumulate, ghost = self.train.batch_size, self.train.accumulate, self.train.ghost_batch
        if batch % accumulate:
            raise ValueError(f"train.accumulate: {accumulate} does not divide train.batch_size {batch}")
        if ghost and (batch // accumulate) % ghost:
            raise ValueError(
                f"train.ghost_batch: {ghost} does not divide the micro-batch of {batch // accumulate} images "
                "(train.batch_size / train.accumulate)"
            )
        self._check_grouped_conv()
        if self.train.compile == "cuda_graphs" and accumulate > 1:
            raise ValueError(
                f"train.compile: cuda_graphs does not accumulate gradients over {accumulate} micro-batches; "
                "set it to true, or train.accumulate to 1"
            )
        if self.train.freeze != "none" and self.model.pretrained is None:
            raise ValueError(
                f"train.freeze: {self.train.freeze} would freeze random weights; set model.pretrained, or none"
            )
        if ghost and self.train.sync_bn:
            raise ValueError("train.sync_bn: and train.ghost_batch exclude each other; set one of them to 0 or false")
        if self.augment.random_resized_crop and self.data.name not in ("imagefolder", "shards"):
            raise ValueError(
                "augment.random_resized_crop: needs data.name=imagefolder or shards; CIFAR and shapes are 32x32"
            )
        if self.data.decode == "device" and not self.augment.random_resized_crop:
            raise ValueError("data.decode: device needs random-resized crops; set augment.random_resized_crop=true")
        if self.optimizer.nesterov and self.optimizer.momentum == 0:
            raise ValueError("optimizer.nesterov: needs a momentum; set optimizer.nesterov=false")
        if (self.data.mean is None) != (self.data.std is None):
            raise ValueError("data.mean: give data.mean and data.std together, or neither")
        self._check_sizes()
        return self

    def _check_sizes(self) -> None:
        first, full = self.augment.progressive_from, self.image_size
        if first is None:
            return
        if first >= full or first % size_step(full):
            raise ValueError(
                f"augment.progressive_from: {first} pixels; a multiple of {size_step(full)} below the image size {full}"
            )
        if self.train.compile == "cuda_graphs":
            raise ValueError(
                "augment.progressive_from: CUDA graphs have one size; set train.compile=true, or this to null"
            )

    def _check_grouped_conv(self) -> None:
        architecture, ways = parse_model_name(self.model.name), self.train.grouped_conv
        if len(ways) not in (1, architecture.grouped_shapes) or ("auto" in ways and len(ways) > 1):
            raise ValueError(
                f"train.grouped_conv: {' '.join(ways) or 'empty'}; auto, one choice for all, or one for each of the "
                f"{architecture.grouped_shapes} shapes that {self.model.name} has"
            )
        for way in ways:
            merged = int(way.removeprefix("merged")) if way.startswith("merged") else 1
            if architecture.cardinality % merged:
                raise ValueError(
                    f"train.grouped_conv: '{way}': {merged} does not divide the {architecture.cardinality} groups"
                )


Values = dict[str, Any]


def flatten(config: Config) -> Values:
    """Return a flat dict: dotted path (`train.epochs`) -> value, in the order in which the keys are defined.

    The values are plain: YAML and JSON can represent them.
    """
    flat: Values = {}
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def nest(flat: Values) -> Values:
    """Invert `flatten`: return nested dicts, in which the first part of each dotted path is the name of the section."""
    nested: Values = {}
    for path, value in flat.items():
        *sections, key = path.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return nested


def config_of(nested: Values) -> Config:
    """Build a config from nested plain values, as YAML and JSON represent them. A missing key gets its default.

    Raises:
        pydantic.ValidationError: a key is unknown, or a value has the wrong type or is out of range.
    """
    return Config.model_validate(_with_tuples(nested))


def with_values(config: Config, values: Values) -> Config:
    """Return a validated copy of `config` with the new values in `values`: dotted path -> value.

    Raises:
        pydantic.ValidationError: as `config_of`.
    """
    return config_of(nest({**flatten(config), **values}))


def _with_tuples(value: Any) -> Any:
    # YAML and JSON give lists; the strict, immutable config needs tuples.
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_with_tuples(inner) for inner in value)
    return value
