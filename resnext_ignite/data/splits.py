"""Loads the splits of a data set, into memory (`images.py`) or as files (`reading/image_files.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from resnext_ignite.config.schema import Config
from resnext_ignite.data.images import Images, color_to_uint8
from resnext_ignite.data.loaders import Split
from resnext_ignite.data.reading.image_files import ImageFiles, decode_into_memory
from resnext_ignite.data.sampling import Purpose, permutation
from resnext_ignite.data.sources import cifar, folders, shapes
from resnext_ignite.data.sources.folders import folder_classes, index_images
from resnext_ignite.data.sources.shards import Members, index_shards, shard_classes
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runtime.errors import ConfigError, DataError, raise_as_data_error

_SUBSET_SEED = 0


@dataclass(frozen=True)
class Data:
    """The requested splits of a data set, and the properties of the data that a model needs.

    Args:
        splits: the images of each split; the keys are train, val and test.
        classes: the names of the labels.
        mean, std: normalisation of red, green and blue, on a scale of 0 to 1.
        image_size: side of the training images in pixels.
        evaluation_size: side of all other images in pixels.
        workers: number of processes per rank that decode files.
        contents: for each split, a string with the number of images and, for files, a hash that identifies the files.
        shards: int64 (N,), the shard of each training image; None if the data is not in shards.

    `selection` is the split whose metrics select the best weights: val if it exists, else test.
    """

    splits: dict[str, Split]
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    evaluation_size: int
    workers: int
    contents: dict[str, str]
    shards: torch.Tensor | None = None

    @property
    def selection(self) -> str:
        return "val" if "val" in self.splits else "test"


def load_data(config: Config, ranks: Ranks, splits: tuple[str, ...] | None = None) -> Data:
    """Load the splits of a config: train, val (a folder of that name, or held-out training images), and test.

    If `data.on_error` is skip and the training split is loaded into memory, its unreadable images get the label
    UNREADABLE.

    Args:
        splits: names of the splits to load; None: all that exist.

    Raises:
        DataError: a file or folder is missing, damaged or unreadable; the message names it.
        ConfigError: the config requests more images than the data has; `data.in_memory` is true, but a split does not
            fit into memory; or config keys contradict each other or the data.
    """
    root = Path(config.data.root).expanduser()
    size = config.image_size
    evaluation_size = config.evaluation.image_size or size
    sizes = {"train": size, "val": evaluation_size, "test": evaluation_size}
    workers = config.data.workers
    if workers is None:
        workers = min(8, ranks.cores())
    shards = None
    with raise_as_data_error(root):
        if config.data.name in ("imagefolder", "shards"):
            loaded, contents, classes, moments = _load_folder(config, root, sizes, splits)
            shards = _shards_of(loaded.get("train"))
            loaded = {name: _decoded(split, config, name, ranks) for name, split in loaded.items()}
        else:
            loaded, contents, classes, moments = _load_tensors(config, root, splits, ranks)
            loaded = {name: split.resized(sizes[name]) for name, split in loaded.items() if isinstance(split, Images)}
    mean, std = (config.data.mean, config.data.std) if config.data.mean and config.data.std else moments
    return Data(loaded, classes, mean, std, size, evaluation_size, workers, contents, shards)


Moments = tuple[tuple[float, float, float], tuple[float, float, float]]
Loaded = tuple[dict[str, Split], dict[str, str], tuple[str, ...], Moments]


def _load_tensors(config: Config, root: Path, splits: tuple[str, ...] | None, ranks: Ranks) -> Loaded:
    name = config.data.name
    found: dict[str, Split] = {}
    classes: tuple[str, ...] = shapes.CLASSES
    moments: Moments = (shapes.MEAN, shapes.STD)
    wanted = set(splits or ("train", "val", "test"))
    sizes = {"train": config.data.train_size, "test": config.data.test_size}
    sources = {"train": bool(wanted & {"train", "val"}), "test": "test" in wanted}
    if name == "shapes":
        for source in (source for source, needed in sources.items() if needed):
            found[source] = shapes.load_shapes(source, sizes[source])
    else:
        ranks.first_on_node(lambda: cifar.prepare_cifar(name, root, download=config.data.download))
        moments = (cifar.MEAN, cifar.STD)
        for source in (source for source, needed in sources.items() if needed):
            images, classes = cifar.load_cifar(name, root, source)
            found[source] = images.subset(_subset(len(images), sizes[source], f"data.{source}_size"))
    loaded = _hold_out(config, found, wanted)
    return loaded, {name: f"{len(split)} images" for name, split in loaded.items()}, classes, moments


def _load_folder(config: Config, root: Path, sizes: dict[str, int], splits: tuple[str, ...] | None) -> Loaded:
    in_shards = config.data.name == "shards"
    there = {name for name in ("train", "val", "test") if (root / name).is_dir()}
    if not there:
        kind = "a set of shards" if in_shards else "an imagefolder"
        raise DataError(f"{root}: not {kind}: it has no train/, val/ or test/ folder; set data.root")
    both = {"val", "test"} <= there
    if both and config.data.val_size:
        raise ConfigError(f"data.val_size: {root} already has a val/ folder; set data.val_size to 0")
    # If only one of val/ and test/ exists, it is the test split.
    found_in = {"train": "train", "val": "val" if both else "", "test": "test" if "test" in there else "val"}
    found_in = {split: folder for split, folder in found_in.items() if folder in there}
    limits = {"train": config.data.train_size, "test": config.data.test_size}
    wanted = set(splits or ("train", "val", "test"))
    needed = wanted | ({"train"} if config.data.val_size and "val" in wanted else set())
    classes: tuple[str, ...] | None = None
    files: dict[str, Split] = {}
    for split, folder in found_in.items():
        if split in needed:
            index = index_shards(root, folder, classes) if in_shards else index_images(root, folder, classes)
            classes = index.classes
            count = torch.arange(len(index.labels))
            images = ImageFiles(index.paths, index.labels, count, sizes[split], config.data.eval_crop)
            files[split] = images.subset(_subset(len(images), limits.get(split), f"data.{split}_size"))
        elif split == "train":
            # The classes of the training images define the labels of all splits, even if train is not requested.
            classes = shard_classes(root, folder) if in_shards else folder_classes(root, folder)
    if classes is None:
        raise DataError(f"{root}: has no {' or '.join(sorted(wanted))} split; it holds {', '.join(sorted(there))}")
    loaded = _hold_out(config, files, wanted)
    contents = {name: split.contents() for name, split in loaded.items() if isinstance(split, ImageFiles)}
    for name, files_of in loaded.items():
        # Held-out images come from the training folder, but need the evaluation size.
        loaded[name] = replace(files_of, size=sizes[name]) if isinstance(files_of, ImageFiles) else files_of
    return loaded, contents, classes, (folders.MEAN, folders.STD)


def _shards_of(split: Split | None) -> torch.Tensor | None:
    paths = split.paths if isinstance(split, ImageFiles) else None
    return paths.shards() if isinstance(paths, Members) else None


def _decoded(files: Split, config: Config, split: str, ranks: Ranks) -> Split:
    crops = split == "train" and config.augment.random_resized_crop
    if not isinstance(files, ImageFiles) or config.data.in_memory is False or (crops and not config.data.in_memory):
        return files
    if crops:
        raise ConfigError("data.in_memory: augment.random_resized_crop needs the files; set one of the two to false")
    whole = config.data.in_memory is True
    skips = split == "train" and config.data.on_error == "skip"
    fill = color_to_uint8(config.data.mean or folders.MEAN) if skips else None
    images = decode_into_memory(
        files,
        any_size=whole,
        report=ranks.rank == 0,
        fill=fill,
        processes=ranks.local_world_size,
        threads=ranks.cores(),
    )
    if images is None and whole:
        raise ConfigError(f"data.in_memory: the {split} split does not fit into memory; set it to null or false")
    return images or files


def _subset(count: int, limit: int | None, key: str) -> torch.Tensor:
    if limit is None:
        return torch.arange(count)
    if limit > count:
        raise ConfigError(f"{key}: {limit}, but there are only {count} images")
    return permutation(_SUBSET_SEED, 0, count, Purpose.SUBSET)[:limit].sort().values


def _hold_out(config: Config, found: dict[str, Split], wanted: set[str]) -> dict[str, Split]:
    size, train = config.data.val_size, found.get("train")
    if size and train is not None:
        if size >= len(train):
            raise ConfigError(f"data.val_size: {size} of {len(train)} training images leaves none to train on")
        order = permutation(config.seed, 0, len(train), Purpose.HELD_OUT)
        found["train"] = train.subset(order[size:].sort().values)
        found["val"] = train.subset(order[:size].sort().values)
    return {name: found[name] for name in ("train", "val", "test") if name in found and name in wanted}
