"""Trained at one size and evaluated at another: whatever evaluates or predicts later does so at the second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import at_iteration, train_tiny
from ignite.engine import Engine
from PIL import Image

from resnext_ignite import evaluate, export, predict
from resnext_ignite.config.schema import Config, with_values
from resnext_ignite.data import build_train_loader, load_data
from resnext_ignite.data.augment.chain import normalize
from resnext_ignite.data.images import Images
from resnext_ignite.data.reading.image_files import ImageFiles
from resnext_ignite.data.sources.shapes import load_shapes
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runs.checkpoint import load_model
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import ConfigError, RunFolderError
from resnext_ignite.weights.loading import open_model


@pytest.fixture(scope="module")
def run(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on pictures of 16 pixels, evaluated at 32."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    sides = set()
    with pytest.MonkeyPatch.context() as patch:
        at_iteration(None, lambda engine: sides.add(sides_of(engine)), patch)
        assert train_tiny(folder, *keys(picture_folder), "evaluation.image_size=32") == 0
    assert sides == {(16, 16)}
    return folder


def keys(data: Path) -> list[str]:
    values = ["data.name=imagefolder", f"data.root={data}", "data.image_size=16", "data.eval_crop=0.8"]
    return [*values, "data.train_size=null", "data.test_size=null", "data.workers=0", "train.epochs=1"]


def sides_of(engine: Engine) -> tuple[int, ...]:
    return tuple(engine.state.batch.images.shape[2:])


def loss_at(run: Path, root: Path, split: str, size: int) -> float:
    """The loss on a split by PIL and the model alone: the shorter side to `size` / 0.8, its centre of `size`."""
    model, metadata = load_model(run)
    short = round(size / 0.8)
    losses = []
    for label, name in enumerate(metadata.classes):
        for file in sorted((root / split / name).iterdir()):
            with Image.open(file) as picture:
                width, height = (short * side // min(picture.size) for side in picture.size)
                whole = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
            top, left = round((height - size) / 2), round((width - size) / 2)
            pixels = torch.tensor(whole[None, top : top + size, left : left + size])
            with torch.no_grad():
                logits = model(normalize(pixels, metadata.mean, metadata.std).permute(0, 3, 1, 2))
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([label]))))
    return sum(losses) / len(losses)


def test_a_run_is_evaluated_at_its_size(run: Path, picture_folder: Path) -> None:
    record = RunFolder(run).read_metrics()[-1]
    # A level of a few pixels: PIL rounds between its two passes where it resizes before it crops.
    assert record["loss"] == pytest.approx(loss_at(run, picture_folder, "test", 32), abs=1e-4)
    assert abs(record["loss"] - loss_at(run, picture_folder, "test", 16)) > 1e-3
    assert load_model(run)[1].image_size == 32
    metrics, data = evaluate.evaluate(run, "test", [])
    assert metrics["loss"] == record["loss"]
    assert (data.image_size, data.evaluation_size) == (32, 32)


@pytest.mark.parametrize(("split", "size"), [("test", 48), ("train", 32)])
def test_any_split_at_any_size(run: Path, picture_folder: Path, split: str, size: int) -> None:
    overrides = [] if size == 32 else [f"evaluation.image_size={size}"]
    metrics, _ = evaluate.evaluate(run, split, overrides)
    assert metrics["loss"] == pytest.approx(loss_at(run, picture_folder, split, size), abs=1e-4)


def test_ten_crops_are_of_that_size(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = set()
    read = ImageFiles.read

    def seen(self: ImageFiles, *arguments: object) -> object:
        sizes.add((self.size, self.anchor))
        return read(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageFiles, "read", seen)
    metrics, _ = evaluate.evaluate(run, "test", ["evaluation.image_size=40"], views="ten-crop")
    assert metrics["images"] == 12
    assert {size for size, _ in sizes} == {40}
    assert len(sizes) == 5


def test_a_run_without_one_is_evaluated_as_it_was_trained(picture_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train_tiny(folder, *keys(picture_folder)) == 0
    assert load_model(folder)[1].image_size == 16
    record = RunFolder(folder).read_metrics()[-1]
    assert record["loss"] == pytest.approx(loss_at(folder, picture_folder, "test", 16), abs=1e-4)
    larger = [
        evaluate.evaluate(folder, "test", [f"{key}=32"])[0] for key in ("evaluation.image_size", "data.image_size")
    ]
    assert larger[0]["loss"] == larger[1]["loss"] != record["loss"]


def test_a_size_that_would_not_be_used_is_refused(run: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data.image_size: this run sets evaluation.image_size; override that key instead"
    ):
        evaluate.evaluate(run, "test", ["data.image_size=24"])


def test_it_predicts_as_it_is_evaluated(run: Path, picture_folder: Path) -> None:
    files = [str(file) for file in sorted((picture_folder / "test").rglob("*.png"))]
    predictor = predict.Predictor(run, workers=0)
    assert predictor.pictures(files[:3]).shape == (3, 32, 32, 3)
    right = sum(Path(p.file).parent.name == p.top[0].name for p in predictor(files, top_k=1))
    assert right == RunFolder(run).read_metrics()[-1]["correct"]


def test_what_leaves_says_so(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.safetensors"
    assert export.main(["--checkpoint", str(run), "--format", "safetensors", "--output", str(output)]) == 0
    metadata = open_model(output)[1]
    assert (metadata.image_size, metadata.config.data.image_size) == (32, 16)
    assert "Evaluated at 32x32" in next(tmp_path.glob("*.md")).read_text()


def test_a_resumed_run_keeps_its_size(run: Path, picture_folder: Path) -> None:
    with pytest.raises(RunFolderError, match=r"evaluation\.image_size"):
        train_tiny(run, *keys(picture_folder), "evaluation.image_size=24", resume=True)


def test_pictures_in_memory_are_resized_once() -> None:
    values = {"data.train_size": 6, "data.test_size": 5, "data.val_size": 2, "data.image_size": 16}
    data = load_data(with_values(Config(), {**values, "evaluation.image_size": 32}), Ranks())
    splits = {name: split for name, split in data.splits.items() if isinstance(split, Images)}
    assert {name: tuple(split.pixels.shape[:3]) for name, split in splits.items()} == {
        "train": (4, 16, 16),
        "val": (2, 32, 32),
        "test": (5, 32, 32),
    }
    # 32 pixels are what they have: not made larger again after they were made smaller.
    assert torch.equal(splits["test"].pixels, load_shapes("test", 5).pixels)


def test_held_out_files_are_evaluated(picture_folder: Path) -> None:
    named = {"data.name": "imagefolder", "data.root": str(picture_folder), "data.workers": 0, "train.batch_size": 4}
    values = {**named, "data.image_size": 16, "evaluation.image_size": 24, "data.val_size": 7}
    config = with_values(Config(), values)
    data = load_data(config, Ranks())
    sizes = {name: split.size for name, split in data.splits.items() if isinstance(split, ImageFiles)}
    assert sizes == {"train": 16, "val": 24, "test": 24}
    batch = next(iter(build_train_loader(config, data, torch.device("cpu"), Ranks())))
    assert batch.images.shape == (4, 3, 16, 16)
    # Decoded into memory, each at its own size; never larger from what was made smaller.
    whole = load_data(with_values(config, {"data.in_memory": True}), Ranks()).splits
    assert isinstance(whole["val"], Images)
    assert torch.equal(whole["val"].pixels, data.splits["val"].load(torch.arange(7)))
