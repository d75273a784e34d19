"""The sections of a config: every key with its unit and default. `config.py` puts them together.

Values alone live here; nothing imports torch, so that a wrong config is refused at once.
"""

from resnext_ignite.config_sections.base import Section
from resnext_ignite.config_sections.inputs import AugmentConfig, DataConfig, ModelConfig, size_step
from resnext_ignite.config_sections.training import (
    CheckpointConfig,
    DistributedConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "Section",
    "TrainConfig",
    "size_step",
]
