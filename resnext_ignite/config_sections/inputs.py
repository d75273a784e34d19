"""What is trained, and on what: the network, its pictures, and what happens to them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from resnext_ignite.config_sections.base import Fraction, PerChannel, Positive, Section
from resnext_ignite.runtime.model_names import parse_model_name


class ModelConfig(Section):
    """The network."""

    name: str = "cifar_resnext29_8x64d"
    """`cifar_resnext<9n+2>_<C>x<W>d` or `resnext50|101|152_<C>x<W>d`: depth, cardinality C, base width W."""
    num_classes: Annotated[int, Field(ge=2, le=100_000)] | None = None
    """Classes; null: as many as the data has."""
    stem_channels: Annotated[int, Field(ge=1, le=1024)] = 64
    """Channels after the stem (64 as published; smaller for small machines); all stages scale with it."""
    pretrained: str | None = None
    """Weights to start from: a checkpoint or run of this project, another system's file that `convert` reads, or
    torchvision's for this network (`torchvision:IMAGENET1K_V2`); a classifier for other classes is left as
    initialised."""
    zero_init_residual: bool = False
    """Start the last BatchNorm of each block at zero, so that every block begins as the identity."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        parse_model_name(name)
        return name

    @model_validator(mode="after")
    def _check_groups(self) -> ModelConfig:
        architecture = parse_model_name(self.name)
        if architecture.group_width(self.stem_channels) < 1:
            raise ValueError(
                f"model.stem_channels: {self.stem_channels} leaves the groups of {self.name} without a channel "
                f"(stem_channels x base width / 64 < 1): at least {-(-64 // architecture.base_width)}"
            )
        return self


class DataConfig(Section):
    """The pictures."""

    name: Literal["cifar10", "cifar100", "imagefolder", "shards", "shapes"] = "shapes"
    """`shapes` is drawn from a seed, without any file; `imagefolder` reads `root`'s `train/<class>/*` and
    `val/<class>/*` or `test/<class>/*`; `shards` reads tar files of pictures in `train/` and `val/` or `test/`, and
    what is said of an `imagefolder` goes for them."""
    root: str = "data"
    """Folder of the data (`~` is expanded); not used by `shapes`."""
    download: bool = True
    """Download CIFAR where it is missing; false: an archive that lies in `root` is still checked and unpacked."""
    val_size: Annotated[int, Field(ge=0)] = 0
    """Training images held out to choose the best weights (keyed by `seed`); 0: evaluate on the test split."""
    train_size: Annotated[int, Field(ge=1)] | None = None
    """Use only so many training images, the same ones for every seed (for `shapes`: draw so many); null: all."""
    test_size: Annotated[int, Field(ge=1)] | None = None
    """Use only so many test images; null: all."""
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Height and width in pixels; null: 32, or 224 for an `imagefolder` with an ImageNet layout."""
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`imagefolder`: side of the central square kept in evaluation, over the shorter side (ImageNet: 0.875)."""
    in_memory: bool | None = None
    """`imagefolder`: decode once into memory; null: where all pictures have their size already and they fit."""
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    """Processes a rank that decode an `imagefolder`; null: the cores a rank has, at most 8."""
    decode: Literal["workers", "device"] = "workers"
    """`imagefolder`: who decodes training JPEGs: the workers, or the GPU (nvJPEG), for which workers only read them,
    and decode what is no plain JPEG; needs `augment.random_resized_crop`. The same crops, of pixels that differ as
    decoders do. An evaluation is always decoded by the workers, so that its figures do not depend on this."""
    on_error: Literal["fail", "skip"] = "fail"
    """`imagefolder`: end on a training picture that cannot be read (exit 3), or skip it: warned of, not counted."""
    max_skipped: Annotated[int, Field(ge=0)] = 100
    """Pictures an epoch that may be skipped; one more ends the run (exit 3)."""
    shuffle_shards: Annotated[int, Field(ge=1)] = 16
    """`shards`: shards that are read at a time in training, whose images are shuffled together; the shards come in
    another order each epoch."""
    mean: PerChannel | None = None
    """Mean of red, green and blue, 0 to 1; null: that of `model.pretrained`, else the data set's published one
    (ImageNet's for a folder)."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation of red, green and blue, on the same scale."""


def size_step(image_size: int) -> int:
    """Pixels by which the side of the training images grows, of those that grow to `image_size`."""
    return 16 if image_size >= 128 else 4


class AugmentConfig(Section):
    """What happens to a training image; all of it keyed by (seed, epoch, index)."""

    crop_padding: Annotated[int, Field(ge=0, le=64)] = 4
    """Pixels added on each side before a random crop of the image's own size; 0: no crop."""
    crop_fill: Literal["zero", "mean", "reflect"] = "zero"
    """What the padding holds: black, the data's mean colour, or the picture reflected."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Mirror left to right: by chance each epoch, or every second epoch from a random start."""
    trivial: bool = False
    """TrivialAugment, wide: one of 14 operations of one of 31 strengths a picture (arXiv:2103.10158)."""
    cutout: Annotated[int, Field(ge=0, le=512)] = 0
    """Side in pixels of a square set to the mean colour, its centre anywhere in the image; 0: none."""
    erasing: Fraction = 0.0
    """Probability of a box of 2 to 33 % of the area, of an aspect of 0.3 to 3.3, set to the mean colour
    (arXiv:1708.04896)."""
    random_resized_crop: bool = False
    """`imagefolder`: crop 8 to 100 % of the area at an aspect of 3/4 to 4/3, resized; replaces the padded crop."""
    color: Fraction = 0.0
    """Strength of brightness, contrast and saturation jitter, in random order (fb.resnext on ImageNet: 0.4)."""
    lighting: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Standard deviation of the noise along ImageNet's colour axes (AlexNet, section 4.1; fb.resnext: 0.1)."""
    mixup: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Mix each image with its neighbour in the batch by a share drawn from Beta(mixup, mixup); 0: none."""
    cutmix: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Put a box of its neighbour into each image, of a share drawn likewise; with `mixup`, each gets one of them."""
    progressive_from: Annotated[int, Field(ge=8, le=512, multiple_of=4)] | None = None
    """Side in pixels of the training images in the first epoch; it grows linearly, in steps of 4 pixels (of 16 where
    the image size is 128 or more), to `data.image_size`; evaluations have one size; null: training, too."""
    progressive_until: Fraction = 0.5
    """Share of the epochs after which training images have their full size."""

    @field_validator("mixup", "cutmix")
    @classmethod
    def _not_all_or_nothing(cls, alpha: float) -> float:
        if 0 < alpha < 1e-3:
            raise ValueError(f"{alpha}: 0 for none, or at least 0.001")
        return alpha
