"""Builds models by name. The network is in `resnext.py`; the grammar of names is in `runtime/model_names.py`."""

from __future__ import annotations

from resnext_ignite.config.schema import Config
from resnext_ignite.models.resnext import ResNeXt
from resnext_ignite.runtime.model_names import parse_model_name


def create_model(
    name: str,
    num_classes: int,
    *,
    stem_channels: int = 64,
    ghost_batch: int = 0,
    zero_init_residual: bool = False,
    grouped_conv: tuple[str, ...] = ("grouped",),
) -> ResNeXt:
    """Build a newly initialised ResNeXt: (N, 3, H, W) -> logits (N, num_classes).

    Args:
        name: `cifar_resnext<9n+2>_<C>x<W>d` or `[cifar4_]resnext50|101|152_<C>x<W>d`.
        num_classes: number of outputs.
        stem_channels: number of channels that the stem outputs. The stages output 4, 8 and 16 times this number; a
            fourth stage outputs 32 times this number.
        ghost_batch: number of images over which BatchNorm computes its training statistics; 0: the whole batch.
        zero_init_residual: initialise the weight of the last BatchNorm of each block to 0, so that each block initially
            outputs only its shortcut.
        grouped_conv: implementations of the grouped 3x3 convolutions; see ResNeXt.

    Raises:
        ValueError: the name does not follow the grammar, or a group would have no channel.
    """
    architecture = parse_model_name(name)
    planes = architecture.planes(stem_channels)
    group_widths = tuple(architecture.group_width(stage) for stage in planes)
    if min(group_widths) < 1:
        raise ValueError(f"stem_channels={stem_channels}: too few for {name}, whose groups would have no channel")
    return ResNeXt(
        layout=architecture.layout,
        blocks=architecture.blocks,
        planes=planes,
        group_widths=group_widths,
        cardinality=architecture.cardinality,
        num_classes=num_classes,
        ghost_batch=ghost_batch,
        zero_init_residual=zero_init_residual,
        grouped_conv=grouped_conv,
    )


def build_model(config: Config) -> ResNeXt:
    """Build, on the CPU, the model that a resolved config describes.

    Its initial weights come from torch's global random generator.

    Raises:
        ValueError: `model.num_classes` or `train.grouped_conv` is not resolved yet.
    """
    if config.model.num_classes is None:
        raise ValueError("model.num_classes: not resolved yet; it comes from the data")
    if "auto" in config.train.grouped_conv:
        raise ValueError("train.grouped_conv: not resolved yet; it is measured on the device")
    model = create_model(
        config.model.name,
        config.model.num_classes,
        stem_channels=config.model.stem_channels,
        ghost_batch=config.train.ghost_batch,
        zero_init_residual=config.model.zero_init_residual,
        grouped_conv=config.train.grouped_conv,
    )
    model.freeze(config.train.freeze)
    return model
