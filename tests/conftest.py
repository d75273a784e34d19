"""What tests share: tiny real runs, in this process, on one thread."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnext_ignite import train
from resnext_ignite.checkpoint import load_checkpoint
from resnext_ignite.run_folder import RunFolder

# One thread: no OpenMP pool exists, so that a test may fork a run and kill it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent
TINY = [
    "model.name=cifar_resnext11_2x8d",
    "model.stem_channels=8",
    "data.train_size=70",
    "data.test_size=37",
    "train.epochs=3",
    "train.batch_size=16",
    "train.precision=fp32",
    "logging.tensorboard=false",
    "logging.every_iterations=2",
]
TINY_ITERATIONS = 12


def train_tiny(folder: Path, *overrides: str, resume: bool = False) -> int:
    """The train command on a tiny model and data set: 3 epochs of 4 iterations, in well under a second each."""
    arguments = ["--config", str(ROOT / "configs/quickstart.yaml"), "--output-dir", str(folder), *TINY, *overrides]
    return train.main([*arguments, "--resume"] if resume else arguments)


def digest(folder: Path) -> dict[str, Any]:
    """All of a finished run's state that must not depend on where it was cut: tensors as bytes, and the records."""
    state = load_checkpoint(folder / "checkpoints/final.pt")

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return value

    names = ("model", "ema", "optimizer", "lr_scheduler", "scaler", "trainer", "generators")
    timeless = [without_times(record) for record in RunFolder(folder).read_metrics()]
    return {**{name: plain(state[name]) for name in names}, "metrics": timeless}


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl without what a clock says."""
    return {key: value for key, value in record.items() if key not in ("images_per_s", "wall_s")}


class Payload:
    """Unpickled, it makes the folder that it names: the sentinel of a test that nothing is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny run with TensorBoard and pictures."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train_tiny(folder, "logging.tensorboard=true", "logging.images=8", "logging.histograms=true") == 0
    return folder


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of two classes that differ in brightness: 40 and 12 PNGs, 36x32 pixels."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(128 * label, 128 * label + 128, (32, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number:02}.png")
    return root


@pytest.fixture
def in_fork() -> Callable[[Callable[[], Any]], int]:
    """Run a function in a forked child; its wait status, as os.waitpid gives it."""

    def run(function: Callable[[], Any]) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                function()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return os.waitpid(child, 0)[1]

    return run
