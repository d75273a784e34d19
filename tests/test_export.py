"""Models that leave: opened by what they are for, they have the model's logits; their cards say what is true."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_ITERATIONS, command, train_tiny
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resnext_ignite import convert, export
from resnext_ignite.benchmark import __main__ as benchmark
from resnext_ignite.benchmark import exporting as export_suite
from resnext_ignite.models import create_model
from resnext_ignite.runs.checkpoint import ModelMetadata, load_checkpoint, load_model
from resnext_ignite.runtime.errors import CheckpointError, ConfigError
from resnext_ignite.weights.export import networks
from resnext_ignite.weights.export.formats import Options
from resnext_ignite.weights.export.model_card import ExportedModel, model_card
from resnext_ignite.weights.foreign.reading import read_foreign
from resnext_ignite.weights.loading import open_model

onnx = pytest.importorskip("onnx", reason="the extra [export] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
# Of batches, heights and widths, small, odd and apart from each other.
SHAPES = [(1, 32, 32), (5, 45, 27), (2, 8, 9), (3, 64, 97)]


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that keeps an average of its weights, and knows a place that is no one's concern."""
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    assert train_tiny(folder, "train.ema_decay=0.5", "data.root=/home/somebody/secret") == 0
    return folder


@pytest.fixture(scope="module")
def foreign_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ResNeXt-50 as torchvision would save it: a stem with a max pooling."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("theirs") / "theirs.pth"
    torch.save(create_model("resnext50_2x16d", 7, stem_channels=8).state_dict(), path)
    return path


def run_export(checkpoint: Path, format: str, output: Path, *options: str) -> None:
    output.parent.mkdir(exist_ok=True)
    arguments = ["--checkpoint", str(checkpoint), "--format", format, "--output", str(output), *options]
    assert export.main(arguments) == 0


def normalized(pictures: Tensor, metadata: ModelMetadata) -> Tensor:
    """uint8 (N, 3, H, W) as the model takes it, by the definition."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (metadata.mean, metadata.std))
    return (pictures / 255 - mean) / std


def assert_same_logits(logits: Any, model: nn.Module, metadata: ModelMetadata, *, uint8: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    for batch, height, width in SHAPES:
        pictures = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
        images = normalized(pictures, metadata)
        with torch.no_grad():
            expected = model(images)
        found = logits(pictures if uint8 else images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def onnx_logits(path: Path) -> Any:
    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def test_onnx(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.onnx"
    run_export(finished_run, "onnx", file)
    out = capsys.readouterr().out
    told = r": opset 18, largest logit difference \d\.\de-\d\d, relative to max\(1, largest logit\); model card: "
    assert re.fullmatch(re.escape(str(file)) + told + re.escape(str(tmp_path / "README.md")) + "\n", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "model.onnx"]
    model, metadata = load_model(finished_run)
    assert_same_logits(onnx_logits(file), model, metadata, uint8=False)
    proto = onnx.load(file)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    (images,), (logits,) = proto.graph.input, proto.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == ["batch", 3, "height", "width"]
    facts = {prop.key: prop.value for prop in proto.metadata_props}
    assert json.loads(facts["classes"]) == list(metadata.classes)
    assert (json.loads(facts["mean"]), json.loads(facts["std"])) == (list(metadata.mean), list(metadata.std))
    assert (facts["model_name"], facts["image_size"]) == ("cifar_resnext11_2x8d", "32")
    # Neither a second file of weights nor where it was traced.
    assert str(Path(torch.__file__).parent).encode() not in file.read_bytes()
    assert {node.op_type for node in proto.graph.node} >= {"Conv", "Relu"}
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}


def test_onnx_of_pictures_as_they_are(foreign_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.onnx"
    run_export(foreign_file, "onnx", file, "--uint8", "--no-fold")
    assert (
        "the checkpoint states no size, normalisation or classes; those of torchvision are used"
        in capsys.readouterr().out
    )
    assert_same_logits(onnx_logits(file), *open_model(foreign_file), uint8=True)
    graph = onnx.load(file).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert sum(node.op_type == "BatchNormalization" for node in graph.node) == 53


@pytest.mark.parametrize("options", [(), ("--uint8", "--no-fold")])
def test_torch_export(foreign_file: Path, finished_run: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    # With a max pooling and without.
    checkpoint, file = foreign_file if options else finished_run, tmp_path / "model.pt2"
    run_export(checkpoint, "torch-export", file, *options)
    extra = {"metadata.json": ""}
    program = torch.export.load(file, extra_files=extra)
    model, metadata = open_model(checkpoint)
    assert_same_logits(program.module(), model, metadata, uint8=bool(options))
    assert json.loads(json.loads(extra["metadata.json"])["classes"]) == list(metadata.classes)
    norms = [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert len(norms) == (53 if options else 0)
    assert str(Path(networks.__file__).parent).encode() not in file.read_bytes()


def test_the_way_of_training_does_not_leave() -> None:
    torch.manual_seed(0)
    merged = create_model("cifar_resnext11_4x16d", 5, stem_channels=16, grouped_conv=("merged2",), ghost_batch=4).eval()
    network = networks.prepare_for_export(merged, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), uint8=False, fold=False)
    assert all(module.way == "grouped" for module in network.modules() if isinstance(module, networks.GroupedConv2d))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(network(images), merged(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 8), (16, 5)])
def test_the_even_pooling_is_the_stems(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width).relu()
    torch.testing.assert_close(networks.EvenMaxPool2d()(x), nn.MaxPool2d(3, 2, 1)(x), rtol=0, atol=0)


def test_safetensors_come_back_whole(averaged_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, back = tmp_path / "out" / "model.safetensors", tmp_path / "back.pt"
    run_export(averaged_run, "safetensors", file)
    assert f"{file}: read back equal; model card: " in capsys.readouterr().out
    averaged = load_checkpoint(averaged_run / "checkpoints/final.pt")["ema"]
    weights = load_file(file)
    assert weights.keys() == averaged.keys()
    assert all(torch.equal(weights[name], averaged[name]) for name in weights)
    with safe_open(file, "pt") as content:
        strings = content.metadata()
    assert (strings["format"], strings["model_name"]) == ("pt", "cifar_resnext11_2x8d")
    assert "somebody" not in json.dumps(strings)
    model, metadata = load_model(averaged_run)
    # By itself, and as a checkpoint of this project again.
    assert convert.main(["--checkpoint", str(file), "--output", str(back)]) == 0
    for path in (file, back):
        again, found = open_model(path)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
        root = metadata.config.data.model_copy(update={"root": "data"})
        assert found == dataclasses.replace(metadata, config=metadata.config.model_copy(update={"data": root}))
    assert found.errors["last"]["images"] == 37
    # As any other file of such names, where that is asked for.
    assert read_foreign(file, "torchvision").stated is None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"resnext_ignite": "2"}, "its metadata are of version '2', not '1'"),
        ({"classes": '["one", "two"]'}, "names 2 classes, and its network has 10"),
        ({"classes": "nonsense"}, "its metadata: classes: Invalid JSON"),
        ({"image_size": "100000"}, "its metadata: image_size: Input should be less than or equal to 1024"),
        ({"mean": "[1]"}, "its metadata: mean: Field required"),
        ({"config": '{"model": {"nam": 1}}'}, "its config is not one of this version"),
    ],
)
def test_metadata_that_cannot_be_are_refused(
    averaged_run: Path, tmp_path: Path, change: dict[str, str], line: str
) -> None:
    file = tmp_path / "model.safetensors"
    run_export(averaged_run, "safetensors", file)
    with safe_open(file, "pt") as content:
        strings = content.metadata()
    save_file(load_file(file), file, {**strings, **change})
    with pytest.raises(CheckpointError, match=re.escape(line)):
        open_model(file)


@pytest.mark.parametrize("format", ["onnx", "torch-export", "safetensors"])
def test_the_cards_own_lines_work(
    averaged_run: Path,
    tmp_path: Path,
    format: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_export(averaged_run, format, tmp_path / f"model{export._SUFFIXES[format]}")
    card = (tmp_path / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(lines.splitlines()) == 5
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    (tmp_path / "use.py").write_text(lines)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    runpy.run_path("use.py")
    model, metadata = load_model(averaged_run)
    images = normalized(torch.from_numpy(pixels).permute(2, 0, 1)[None], metadata)
    with torch.no_grad():
        assert capsys.readouterr().out == f"{int(model(images).argmax())}\n"


def test_the_card_says_what_the_checkpoint_does(averaged_run: Path, tmp_path: Path) -> None:
    run_export(averaged_run, "safetensors", tmp_path / "model.safetensors")
    card = (tmp_path / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"pipeline_tag": "image-classification", "tags": ["resnext", "safetensors"]}
    assert "# license: missing; choose one" in head
    # Counted by hand in test_summary.py.
    assert "10 classes, 15,348 parameters, 2,063,616 multiply-adds for an image of 32x32" in text
    last = load_model(averaged_run)[1].errors["last"]
    wrong = last["images"] - last["correct"]
    assert f"test split: {100 * wrong / 37:.2f} % ({wrong} wrong of 37 images)" in text
    assert "the last of 3 epochs; they were not chosen by their error" in text
    assert "moving average" in text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    changed = yaml.safe_load(recipe)
    assert changed["train"]["ema_decay"] == 0.5
    assert changed["schedule"] == {"name": "triangular", "warmup_epochs": 1.2}
    assert "optimizer" not in changed
    assert "somebody" not in card
    (classes,) = re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)
    assert json.loads(classes) == list(load_model(averaged_run)[1].classes)


@pytest.mark.parametrize(
    ("last", "best", "selection", "words"),
    [
        (3, 3, "test", "of the last of 3 epochs; they were not chosen"),
        (2, 1, "test", "of epoch 2 of 3 planned; they were not chosen"),
        (2, 2, "test", "of epoch 2 of 3 planned, which had the lowest error up to then on the test split itself, so"),
        (
            2,
            2,
            "val",
            "of epoch 2 of 3 planned, which had the lowest error up to then on held-out training images",
        ),
        (None, None, "test", "of iteration 12, were not evaluated"),
    ],
)
def test_the_card_says_which_epoch_it_is(
    averaged_run: Path, last: int | None, best: int | None, selection: str, words: str
) -> None:
    _, metadata = load_model(averaged_run)

    def record(epoch: int | None) -> dict[str, Any] | None:
        # These weights are those of the last record, whatever its epoch.
        iteration = TINY_ITERATIONS if epoch == last else 1
        same = {**metadata.errors["last"], "split": selection}
        return None if epoch is None else {**same, "epoch": epoch, "iteration": iteration}

    errors = {"last": record(last), "best": record(best)}
    leaving = ExportedModel("model.onnx", "onnx", Options(), 1e-7, {"torch": torch.__version__})
    card = model_card(dataclasses.replace(metadata, errors=errors, selection=selection), leaving)
    assert words in card


def test_the_card_of_another_systems_model_claims_nothing(foreign_file: Path, tmp_path: Path) -> None:
    run_export(foreign_file, "safetensors", tmp_path / "model.safetensors")
    card = (tmp_path / "README.md").read_text()
    assert "Converted from a checkpoint of torchvision." in card
    assert "## Errors\n\nNot known." in card
    assert "## Recipe\n\nNot known." in card
    assert "datasets" not in card
    # Nor does it when it has left and come back.
    assert open_model(tmp_path / "model.safetensors")[1].source == "torchvision"


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_what_is_not_the_model_is_not_left(
    finished_run: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = networks.fold_batch_norm

    def fold_wrongly(model: nn.Module) -> nn.Module:
        folded = fold(model)
        with torch.no_grad():
            folded.get_parameter("fc.bias").add_(0.01)
        return folded

    monkeypatch.setattr(networks, "fold_batch_norm", fold_wrongly)
    with pytest.raises(CheckpointError, match=r"its logits differ by 1\.0e-02 from the model's.*nothing is written"):
        run_export(finished_run, format, tmp_path / f"model{export._SUFFIXES[format]}")
    assert list(tmp_path.iterdir()) == []


def test_without_its_card_no_model_is_left(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.replace

    def no_card(self: Path, target: Path) -> Path:
        if target.name == "README.md":
            raise OSError(28, os.strerror(28), str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", no_card)
    with pytest.raises(OSError, match="No space left"):
        run_export(finished_run, "safetensors", tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("onnx", "model.pt"), "--output {folder}/model.pt: a file of onnx ends in .onnx"),
        (("onnx", "there.onnx"), "--output {folder}/there.onnx: exists already; choose another name"),
        (
            ("onnx", "none/m.onnx"),
            "--output {folder}/none/m.onnx: the folder {folder}/none does not exist; create it first",
        ),
        (
            ("torch-export", "card/m.pt2"),
            "--output {folder}/card/m.pt2: the model card {folder}/card/README.md exists already",
        ),
        (("safetensors", "m.safetensors", "--uint8"), "--uint8, --no-fold: a safetensors file holds no network"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path: Path, arguments: tuple[str, ...], line: str) -> None:
    (tmp_path / "there.onnx").touch()
    (tmp_path / "card").mkdir()
    (tmp_path / "card/README.md").write_text("mine")
    format, output, *options = arguments
    with pytest.raises(ConfigError) as caught:
        export.main(["--checkpoint", "x", "--format", format, "--output", str(tmp_path / output), *options])
    assert str(caught.value).startswith(line.format(folder=tmp_path))
    assert (tmp_path / "card/README.md").read_text() == "mine"


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    line = r"--format onnx: onnxruntime is missing; pip install 'resnext-ignite\[export\]'"
    with pytest.raises(ConfigError, match=line):
        export.main(["--checkpoint", "x", "--format", "onnx", "--output", str(tmp_path / "m.onnx")])
    with pytest.raises(ConfigError, match="--suite export: onnxruntime is missing"):
        benchmark.main(["--suite", "export"])


def test_a_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    result = command("export", "--checkpoint", "none.pt", "--format", "safetensors", "--output", str(output))
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr == "error: none.pt: No such file or directory\n"


@pytest.mark.slow
def test_the_suite_measures_what_left() -> None:
    found = export_suite.measure_export("cifar_resnext11_2x8d", batch_size=2, rounds=2)
    assert list(found["samples"]) == ["eager", "eager, folded", "onnxruntime"]
    assert found["failed"] == {}
    assert all(0 < value < 1e-5 for value in found["differences"].values())
    eager, _, file = (sorted(values) for values in found["samples"].values())
    assert found["ratios"]["onnx_vs_eager"] == sum(file) / sum(eager)
