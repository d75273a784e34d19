"""Loads CIFAR-10 and CIFAR-100 with torchvision. Each file must match its md5 before it is unpacked or unpickled."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tarfile
from pathlib import Path

import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import extract_archive

from resnext_ignite.data.images import Images
from resnext_ignite.runtime.errors import DataError, StorageError, data_error, raise_as_data_error

# As in facebookresearch/ResNeXt: 125.3, 123.0, 113.9 and 63.0, 62.1, 66.7, on a scale of 0 to 255.
MEAN, STD = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
# The class names in the data sets' files. They are listed here because a checkpoint of another system stores only the
# number of classes.
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
CLASSES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(_CIFAR100.split()),
}
_DATASETS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def prepare_cifar(name: str, root: Path, *, download: bool) -> None:
    """Check the files of a data set in `root`. If a file is missing, unpack the archive.

    If the archive is missing too, download it first. A file with a wrong checksum is an error, and is never replaced.

    Args:
        name: cifar10 or cifar100.
        root: folder of the archive and of the unpacked files.
        download: whether to download the archive if a file is missing and the archive is not in `root` either.

    Raises:
        DataError: a file is missing and cannot be downloaded; or a checksum is wrong (the message gives the found and
            the expected checksum).
        StorageError: there is no space to unpack the archive.
    """
    if download:
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
    # The first rank of each machine prepares the folder. Several machines may share the folder, so lock it. A folder
    # that is not writable needs no lock, because it does not change.
    shared = root.is_dir() and os.access(root, os.W_OK)
    with raise_as_data_error(root), FileLock(root / f".{name}.lock") if shared else contextlib.nullcontext():
        _prepare(_DATASETS[name], root, download=download)


def _prepare(dataset: type[CIFAR10], root: Path, *, download: bool) -> None:
    files = _files(dataset, root)
    there = [(path, md5) for path, md5 in files if path.exists()]
    for path, md5 in there:
        _check(path, md5)
    if len(there) == len(files):
        return
    archive = root / dataset.filename
    if archive.exists():
        _check(archive, dataset.tgz_md5)
    elif download:
        _download(dataset, root)
    elif there:
        missing = next(path for path, _ in files if not path.exists())
        raise DataError(f"{missing}: missing, and so is {archive}; set data.download=true, or put {dataset.url} there")
    else:
        raise DataError(f"{archive}: missing; set data.download=true, or put {dataset.url} there")
    try:
        extract_archive(str(archive), str(root))
    except (OSError, EOFError, tarfile.TarError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise StorageError(f"{root}: {error.strerror}; free some space or choose another data.root") from None
        raise DataError(f"{archive}: cannot be unpacked: {error}") from None
    for path, md5 in files:
        _check(path, md5)


def load_cifar(name: str, root: Path, split: str) -> tuple[Images, tuple[str, ...]]:
    """Load a split ("train" or "test") that `prepare_cifar` has checked; return it with the names of the classes.

    Raises:
        DataError: a file is missing, or was changed after the check.
    """
    try:
        # torchvision checks all checksums again before it opens a pickle.
        dataset = _DATASETS[name](str(root), train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{root}: {name} cannot be read: {' '.join(str(error).split())}") from None
    labels = torch.tensor(dataset.targets)
    return Images(torch.from_numpy(dataset.data), labels, torch.arange(len(labels))), tuple(dataset.classes)


def _files(dataset: type[CIFAR10], root: Path) -> list[tuple[Path, str]]:
    lists = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
    return [(root / dataset.base_folder / name, md5) for name, md5 in lists]


def _check(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise data_error(path, error, "delete it and run again to fetch it anew") from None
    if found != expected:
        raise DataError(f"{path}: md5 is {found}, not {expected}; delete it and run again to fetch it anew")


def _download(dataset: type[CIFAR10], root: Path) -> None:
    from torchvision.datasets.utils import download_url

    try:
        download_url(dataset.url, str(root), dataset.filename, dataset.tgz_md5)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{dataset.url}: cannot be downloaded ({reason}); put the file into {root} and run again"
        ) from None
