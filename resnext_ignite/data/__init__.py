"""Builds the data pipeline of a config: the splits, the augmentation, and the loaders for training and evaluation."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from resnext_ignite.config.batches import check_batch_size
from resnext_ignite.config.schema import Config
from resnext_ignite.config.sections import size_step
from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.augment.mixing import Mixing
from resnext_ignite.data.augment.progressive import GrowingSize
from resnext_ignite.data.images import Images
from resnext_ignite.data.loaders import EvalLoader, TrainLoader
from resnext_ignite.data.memory_cache import keep_data_loaded, load_or_reuse
from resnext_ignite.data.sampling import TrainOrder
from resnext_ignite.data.splits import Data, load_data
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runtime.errors import ConfigError, DataError

log = logging.getLogger(__name__)

__all__ = [
    "Data",
    "Loaders",
    "build_augment",
    "build_eval_loader",
    "build_loaders",
    "build_mixing",
    "build_sizes",
    "build_train_loader",
    "keep_data_loaded",
    "load_data",
]


def build_augment(config: Config, data: Data) -> Augment:
    """Build the augmentation of a config; the normalisation uses the mean and standard deviation in `data`."""
    augment = config.augment
    return Augment(
        seed=config.seed,
        mean=data.mean,
        std=data.std,
        crop_padding=0 if augment.random_resized_crop else augment.crop_padding,
        crop_fill=augment.crop_fill,
        flip=augment.flip,
        trivial=augment.trivial,
        cutout=augment.cutout,
        erasing=augment.erasing,
        color=augment.color,
        lighting=augment.lighting,
        channels_last=config.train.channels_last,
    )


def build_mixing(config: Config) -> Mixing | None:
    """Build mixup and CutMix from a config; return None if both are off."""
    mixup, cutmix = config.augment.mixup, config.augment.cutmix
    return Mixing(config.seed, mixup, cutmix) if mixup or cutmix else None


def build_sizes(config: Config) -> GrowingSize | None:
    """Build the schedule of progressive resizing from a config; return None if the config does not use it."""
    first, full = config.augment.progressive_from, config.image_size
    if first is None:
        return None
    return GrowingSize(first, full, size_step(full), config.train.epochs, config.augment.progressive_until)


def build_train_loader(config: Config, data: Data, device: torch.device, ranks: Ranks) -> TrainLoader:
    """Build the loader of this rank's training batches.

    Raises:
        ConfigError: the config key `data.decode` is "device", but the run is not on a GPU; the batch size is larger
            than the number of images; `check_batch_size` rejects the batch size; or the config key
            `augment.crop_padding` is not smaller than the side of an image.
        DataError: the data has no training split.
    """
    on_device = config.data.decode == "device"
    if on_device and device.type != "cuda":
        raise ConfigError(f"data.decode: device is for GPUs only, and this run is on {device.type}; set it to workers")
    if "train" not in data.splits:
        raise DataError(f"{config.data.root}: no train/ folder to train on")
    split = data.splits["train"]
    if len(split) < config.train.batch_size:
        raise ConfigError(
            f"train.batch_size: {config.train.batch_size} is more than the {len(split)} training images; "
            f"at most {len(split)}"
        )
    check_batch_size(config, ranks.world_size)
    if config.augment.crop_padding >= data.image_size:
        raise ConfigError(
            f"augment.crop_padding: {config.augment.crop_padding} pixels; must be below the size {data.image_size}"
        )
    if isinstance(split, Images):
        split = split.to(device)
    if data.shards is not None and ranks.rank == 0:
        _warn_of_sorted_shards(split.labels, data.shards, config.data.shuffle_shards)
    order = TrainOrder(
        seed=config.seed,
        count=len(split),
        batch_size=config.train.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulate=config.train.accumulate,
        device=split.labels.device,
        groups=data.shards,
        window=config.data.shuffle_shards,
    )
    return TrainLoader(
        split,
        order,
        build_augment(config, data),
        device,
        mixing=build_mixing(config),
        workers=data.workers,
        random_resized_crop=config.augment.random_resized_crop,
        sizes=build_sizes(config),
        skip_unreadable=config.data.on_error == "skip",
        decode_on=device if on_device else None,
    )


def _warn_of_sorted_shards(labels: torch.Tensor, shards: torch.Tensor, window: int) -> None:
    frequencies = torch.bincount(labels[labels >= 0]) / len(labels)
    alike, by_chance = (labels[1:] == labels[:-1]).float().mean(), (frequencies**2).sum()
    if window <= int(shards.max()) and alike > (1 + by_chance) / 2:
        log.warning(
            f"the shards are sorted by class, and the images of only {window} shards are shuffled together: "
            "pack them in random order, or raise data.shuffle_shards"
        )


def build_eval_loader(config: Config, data: Data, split: str, device: torch.device, ranks: Ranks) -> EvalLoader:
    """Build the evaluation loader for this rank's slice of a split.

    Raises:
        DataError: the data has no such split, or images of the split have the label UNREADABLE.
    """
    if split not in data.splits:
        others = f"; it has {', '.join(data.splits)}" if data.splits else ""
        raise DataError(f"the data has no {split} split{others}")
    images = data.splits[split]
    return EvalLoader(
        images.to(device) if isinstance(images, Images) else images,
        build_augment(config, data),
        device,
        batch_size=config.evaluation.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=data.workers,
    )


@dataclass(frozen=True)
class Loaders:
    """The loaders of a run: one for training, and one for each evaluated split."""

    train: TrainLoader
    evaluation: dict[str, EvalLoader]
    data: Data


def build_loaders(config: Config, device: torch.device, ranks: Ranks) -> Loaders:
    """Load the data and build all loaders of a run.

    Raises:
        ConfigError: as `load_data` and `build_train_loader`.
        DataError: as `load_data` and `build_train_loader`, or there is no split to evaluate on.
    """
    data = load_or_reuse(config, lambda: load_data(config, ranks))
    splits: list[str] = [name for name in ("val", "test") if name in data.splits]
    evaluation = {name: build_eval_loader(config, data, name, device, ranks) for name in splits}
    if not evaluation:
        raise DataError(f"{config.data.root}: nothing to evaluate on: add val/ or test/, or set data.val_size")
    return Loaders(build_train_loader(config, data, device, ranks), evaluation, data)
