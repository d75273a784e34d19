"""The recipes in `configs/`: they load, their networks are the published ones, and they say what they are said to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, fork_ranks
from PIL import Image

from resnext_ignite import evaluate, train
from resnext_ignite.config.files import load_config
from resnext_ignite.config.schema import Config
from resnext_ignite.data.reading.cropping import square_crop
from resnext_ignite.models import create_model
from resnext_ignite.optim import lr_factor
from resnext_ignite.runs.checkpoint import load_checkpoint, load_model
from resnext_ignite.runs.folder import RunFolder

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
# Parameters for 1000 classes, as torchvision states them, and for 10, as the paper's table 7 does (in millions).
PUBLISHED = {
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "cifar_resnext29_8x64d": 34.4e6,
    "cifar_resnext29_16x64d": 68.1e6,
}
IMAGENET = ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]


def recipe(name: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml", [])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_name_is_its_networks(path: Path) -> None:
    config = load_config(path, [])
    assert path.read_text().startswith("# ")
    data, _, model = path.stem.partition("_")
    if data.startswith("cifar") and not model.endswith("small"):
        assert config.model.name == f"cifar_{model.removesuffix('_fast').removesuffix('_paper')}"
    elif data == "imagenet":
        assert config.model.name == model.removesuffix("_modern")
        assert config.data.name == "imagefolder"


def test_their_networks_have_the_published_counts() -> None:
    names = {load_config(path, []).model.name for path in RECIPES}
    # Two of them are nobody's but ours: those for small machines.
    assert names - set(PUBLISHED) == {recipe(own).model.name for own in ("quickstart", "cifar10_resnext11_small")}
    for name in names & set(PUBLISHED):
        with torch.device("meta"):
            network = create_model(name, 10 if name.startswith("cifar") else 1000)
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count == pytest.approx(PUBLISHED[name], abs=0.06e6 if name.startswith("cifar") else 0)


@pytest.mark.parametrize("name", IMAGENET)
def test_the_papers_recipe_is_fbs(name: str) -> None:
    """opts.lua and train.lua of fb.resnet.torch, as facebookresearch/ResNeXt calls them with -batchSize 256."""
    config = recipe(f"imagenet_{name}")
    assert (config.train.batch_size, config.optimizer.lr, config.optimizer.weight_decay) == (256, 0.1, 1e-4)
    assert (config.optimizer.momentum, config.optimizer.nesterov) == (0.9, True)
    assert (config.train.epochs, config.schedule.milestones, config.schedule.gamma) == (100, (30, 60, 90), 0.1)
    augment = config.augment
    assert (augment.random_resized_crop, augment.color, augment.lighting, augment.flip) == (True, 0.4, 0.1, "random")
    assert augment.trivial is False
    # The shorter side to 256, then the centre of 224.
    assert (config.data.image_size, config.data.eval_crop, config.evaluation.image_size) == (224, 224 / 256, None)
    assert recipe("imagenet_resnext50_32x4d").model_copy(update={"model": config.model}) == config


@pytest.mark.parametrize("name", IMAGENET)
def test_the_modern_recipe_is_torchvisions(name: str) -> None:
    """Its command of pull request 5935, but for the epochs and the repeated augmentation."""
    config = recipe(f"imagenet_{name}_modern")
    # Eight GPUs of 128 images, at a rate of 0.5.
    assert config.optimizer.lr / config.train.batch_size == 0.5 / (8 * 128)
    assert (config.optimizer.weight_decay, config.optimizer.decay_norm_and_bias) == (2e-5, False)
    assert (config.optimizer.momentum, config.optimizer.nesterov) == (0.9, False)
    assert (config.schedule.name, config.schedule.warmup_epochs, config.train.epochs) == ("cosine", 5, 100)
    assert config.train.label_smoothing == 0.1
    augment = config.augment
    assert (augment.trivial, augment.erasing, augment.mixup, augment.cutmix) == (True, 0.1, 0.2, 1.0)
    assert (augment.random_resized_crop, augment.color, augment.lighting) == (True, 0, 0)
    assert (config.data.image_size, config.evaluation.image_size) == (176, 224)
    # --val-resize-size 232: of a picture of 464 x 464, the 448 in the middle; of 0.9655 exactly 232 remain.
    assert (
        square_crop(224, config.data.eval_crop)(464, 464) == square_crop(224, 224 / 232)(464, 464) == (8, 8, 456, 456)
    )
    # --model-ema-decay 0.99998 of --model-ema-steps 32, adjusted by images a step and epochs as its train.py does.
    every_32 = 1 - (1 - 0.99998) * (1024 * 32 / 100)
    assert config.train.ema_decay == pytest.approx(every_32 ** (1 / 32), abs=5e-7)
    assert recipe("imagenet_resnext50_32x4d_modern").model_copy(update={"model": config.model}) == config


def test_the_rate_of_the_modern_recipe() -> None:
    """Of 1251 iterations an epoch: full after the fifth, half in the middle of the other 95, nothing at last."""
    factor = lr_factor(recipe("imagenet_resnext50_32x4d_modern"), 1251)
    assert factor(5 * 1251) == pytest.approx(1, abs=1e-3)
    assert factor(5 * 1251 // 2) == pytest.approx(0.5, abs=1e-3)
    assert factor(round(52.5 * 1251)) == pytest.approx(0.5, abs=1e-3)
    assert 0 <= factor(100 * 1251 - 1) < 1e-6


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 6 and 3 JPEG files of odd sizes, that differ in their colour."""
    root = tmp_path_factory.mktemp("jpegs")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("red", "blue")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 160, (45 + 3 * number, 61, 3))
                pixels[..., 2 * label] += 90
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.jpg", quality=90)
    return root


SMALL = [
    "model.name=cifar_resnext11_2x8d",
    "model.stem_channels=8",
    "data.image_size=32",
    "evaluation.image_size=40",
    "data.workers=0",
    "optimizer.lr=0.02",
    "schedule.warmup_epochs=0.5",
    "train.epochs=3",
    "train.batch_size=12",
    "train.ghost_batch=6",
    "train.precision=fp32",
    "train.ema_decay=0.5",
    "logging.tensorboard=false",
]


def arguments(folder: Path, jpegs: Path, *more: str) -> list[str]:
    path = str(ROOT / "configs/imagenet_resnext50_32x4d_modern.yaml")
    return ["--config", path, "--output-dir", str(folder), f"data.root={jpegs}", *SMALL, *more]


def test_the_modern_recipe_trains(jpegs: Path, tmp_path: Path, in_fork: Callable[[Callable[[], Any]], int]) -> None:
    """On one rank and, alike, on two: small, but with all of its ingredients."""

    def on_two_ranks() -> None:
        fork_ranks()
        assert train.main(arguments(tmp_path / "two", jpegs, "--nproc-per-node", "2", "--backend", "gloo")) == 0

    assert in_fork(on_two_ranks) == 0
    assert train.main(arguments(tmp_path / "one", jpegs)) == 0
    records = [RunFolder(tmp_path / name).read_metrics() for name in ("one", "two")]
    assert [record["epoch"] for record in records[0]] == [1, 2, 3]
    for one, two in zip(*records, strict=True):
        assert (one["images"], one["lr"], one["iteration"]) == (two["images"], two["lr"], two["iteration"])
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    assert load_model(tmp_path / "one")[1].image_size == 40
    state = load_checkpoint(tmp_path / "one/checkpoints/final.pt")
    assert not torch.equal(state["ema"]["fc.weight"], state["model"]["fc.weight"])
    metrics, _ = evaluate.evaluate(tmp_path / "one", "test", [])
    assert metrics["loss"] == records[0][-1]["loss"]
    assert evaluate.evaluate(tmp_path / "one", "test", ["evaluation.image_size=64"])[0]["images"] == 6


def test_the_readme_names_each_recipe() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| recipe in `configs/`") : readme.index("## Install")]
    for path in RECIPES:
        parts = path.stem.replace("cifar100_", "").split("_")
        assert f"`{path.stem}`" in table or all(part in table for part in parts), path.stem
