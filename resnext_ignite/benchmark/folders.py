"""Measures the cost of listing a million images: the seconds to get the list, and the bytes of memory per worker."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from resnext_ignite.runtime.timing import in_turns, medians

# The numbers of ImageNet's training images and classes.
_IMAGES, _CLASSES = 1_281_167, 1000


def measure_folders(images: int = _IMAGES, classes: int = _CLASSES, rounds: int = 3) -> dict[str, Any]:
    """Measure the seconds to list a folder of empty image files, and by how much the list increases a worker's memory.

    The folder is in memory (/dev/shm) if possible, so that the measurement does not depend on a disk.
    """
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as name:
        root, cache = Path(name), Path(name) / "cache"
        _make_tree(root / "train", images, classes)
        # Wait: a list is cached only if its folders have not changed for UNCHANGED_S (2 s, `disk_cache.py`).
        time.sleep(2.5)
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = str(cache)
        try:
            return _measured(root, rounds)
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before


def _make_tree(folder: Path, images: int, classes: int) -> None:
    for label in tqdm(range(classes), desc="making an empty tree", unit=" classes", disable=None):
        place = folder / f"n{label:08}"
        place.mkdir(parents=True)
        for number in range(images * label // classes, images * (label + 1) // classes):
            os.close(os.open(place / f"n{label:08}_{number}.JPEG", os.O_CREAT | os.O_WRONLY))


def _measured(root: Path, rounds: int) -> dict[str, Any]:
    from torchvision.datasets import ImageFolder

    from resnext_ignite.data.sources.folders import index_images

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    samples = {"resnext_ignite, the first time": [seconds(lambda: index_images(root, "train"))]}
    samples |= in_turns(
        {
            "torchvision's ImageFolder": lambda: seconds(lambda: ImageFolder(root / "train")),
            "resnext_ignite, from its cache": lambda: seconds(lambda: index_images(root, "train")),
        },
        rounds,
        "folders",
    )
    index, torchvision_samples = index_images(root, "train"), ImageFolder(root / "train").samples
    growth = {
        "torchvision's ImageFolder": _growth(torchvision_samples),
        "resnext_ignite, from its cache": _growth(index.paths),
    }
    median = medians(samples)
    return {
        "unit": "s",
        "images": len(index.labels),
        "worker_growth_bytes": growth,
        "samples": samples,
        "ratios": {
            "open_vs_torchvision": median["torchvision's ImageFolder"] / median["resnext_ignite, from its cache"],
            "worker_growth_mb": growth["resnext_ignite, from its cache"] / 1e6,
            "worker_growth_mb, torchvision": growth["torchvision's ImageFolder"] / 1e6,
        },
    }


def _growth(samples: Sequence[Any]) -> int:
    """Return by how many bytes the private memory of a forked process grows while it reads all samples once.

    The workers of a DataLoader are forked in the same way.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        before = _private_bytes()
        for position in range(len(samples)):
            samples[position]
        os.write(write, str(_private_bytes() - before).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        grown = int(answer.read())
    os.waitpid(child, 0)
    return grown


def _private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
