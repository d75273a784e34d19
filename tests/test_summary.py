"""What a model is said to be: published counts, fields and bytes counted by hand, and the field that gradients see."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command
from torch import nn

from resnext_ignite import summary
from resnext_ignite.models import create_model
from resnext_ignite.models.layers import receptive_fields
from resnext_ignite.models.resnext import Bottleneck, ResNeXt
from resnext_ignite.runtime.errors import CheckpointError, ConfigError

TABLE = """\
| `model.name` | depth | cardinality | base width | parameters | multiply-adds | receptive field | image size |
|---|---|---|---|---|---|---|---|
| `cifar_resnext29_8x64d` | 29 | 8 | 64 | 34.4 M | 5.39 G | 39 | 32 |
| `cifar_resnext29_16x64d` | 29 | 16 | 64 | 68.2 M | 10.69 G | 39 | 32 |
| `resnext50_32x4d` | 50 | 32 | 4 | 25.0 M | 4.23 G | 427 | 224 |
| `resnext101_32x4d` | 101 | 32 | 4 | 44.2 M | 7.97 G | 971 | 224 |
| `resnext101_64x4d` | 101 | 64 | 4 | 83.5 M | 15.46 G | 971 | 224 |"""
NAMES = [line.split("`")[1] for line in TABLE.splitlines()[2:]]


described = functools.cache(summary.summarize)


@pytest.mark.parametrize(
    ("name", "millions", "giga"),
    # The paper's tables 1 and 7, facebookresearch/ResNeXt's README (CIFAR), torchvision's pages of its weights.
    [
        ("resnext50_32x4d", 25.03, 4.23),
        ("resnext101_32x8d", 88.79, 16.41),
        ("resnext101_64x4d", 83.46, 15.46),
        ("cifar_resnext29_8x64d", 34.4, None),
        ("cifar_resnext29_16x64d", 68.2, None),
    ],
)
def test_published_counts(name: str, millions: float, giga: float | None) -> None:
    found = described(name)
    cost = found.layers.cost
    assert cost.parameters / 1e6 == pytest.approx(millions, abs=0.005 if giga else 0.05)
    assert giga is None or cost.multiply_adds / 1e9 == pytest.approx(giga, abs=0.005)
    assert sum(row.cost.parameters for row in found.layers.rows) == cost.parameters
    assert sum(row.cost.multiply_adds for row in found.layers.rows) == cost.multiply_adds


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        # A 3x3 adds twice the pixels between its inputs' neighbours: stem 3; three blocks of 2; then 2 and two of 4;
        # then 4 and two of 8.
        ("cifar_resnext29_8x64d", [3, 5, 7, 9, 11, 15, 19, 23, 31, 39]),
        # Stem 7, pooling + 2*2; three of 8 at 4 pixels; 8 and three of 16; 16 and five of 32; 32 and two of 64.
        ("resnext50_32x4d", [7, 11, 19, 27, 35, 43, 59, 75, 91, 107, 139, 171, 203, 235, 267, 299, 363, 427]),
    ],
)
def test_receptive_fields_by_hand(name: str, fields: list[int]) -> None:
    rows = described(name).layers.rows
    assert [row.receptive_field for row in rows] == [*fields, fields[-1]]


def seen_by_gradients(model: ResNeXt, size: int) -> tuple[int, int]:
    """Height and width of the pixels that move the middle output of the last block."""
    # Positive weights: no path is cut by a ReLU, and none cancels another.
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    if isinstance(model.maxpool, nn.MaxPool2d):
        # Of its window a max pooling lets a single pixel through; the mean of the same window lets all.
        model.maxpool = nn.AvgPool2d(3, 2, 1)  # type: ignore[assignment]
    images = torch.ones(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    x = model.maxpool(model.bn1(model.conv1(images)).relu())
    for stage in model.stages:
        x = model.get_submodule(stage)(x)
    x[0, 0, x.shape[2] // 2, x.shape[3] // 2].backward()
    assert images.grad is not None
    seen = images.grad[0].abs().sum(0) > 0
    return int(seen.any(1).sum()), int(seen.any(0).sum())


@pytest.mark.parametrize(("name", "size", "side"), [("cifar_resnext29_1x16d", 64, 39), ("resnext50_1x16d", 576, 427)])
def test_gradients_see_the_receptive_field(name: str, size: int, side: int) -> None:
    model = create_model(name, 10, stem_channels=4).double().eval()
    names = ["conv1", "maxpool", *_blocks(model)]
    assert receptive_fields(model, names)[names[-1]] == side
    assert seen_by_gradients(model, size) == (side, side)


def _blocks(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Bottleneck)]


def test_a_stride_on_the_1x1_would_see_483_pixels() -> None:
    """ResNet-50's known figure, of the layout whose first 1x1 has the stride: the same windows, strided one earlier."""
    model = create_model("resnext50_1x16d", 10, stem_channels=4)
    for name in _blocks(model):
        block = model.get_submodule(name)
        assert isinstance(block, Bottleneck)
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    names = ["conv1", "maxpool", *_blocks(model)]
    assert receptive_fields(model, names)[names[-1]] == 483


def test_memory_by_hand() -> None:
    layers = summary.summarize("cifar_resnext11_2x8d", stem_channels=8).layers
    # In planes of 32x32 numbers. Stem: the picture's 3, the convolution's 8 for its BatchNorm, the ReLU's 8.
    # Block, of width 2 (BatchNorm and ReLU in one place): 2 + 2, 2 + 2, 32 and the shortcut's 32, and the sum's 32.
    assert [row.kept / (4 * 32 * 32) for row in layers.rows[:2]] == [3 + 8 + 8, 2 + 2 + 2 + 2 + 32 + 32 + 32]
    # The classifier: the 128 pooled numbers.
    assert layers.rows[-1].kept == 4 * 128
    assert layers.kept == {"fp32": sum(row.kept for row in layers.rows), "bf16": layers.kept["fp32"] // 2}
    # The first block's sum: the picture's 3, the block's input 8, its 3x3's 2, conv3's 32 until bn3's 32 is there, and
    # the shortcut's 32.
    peak = 3 + 8 + 2 + 32 + 32 + 32
    assert layers.inference_peak == {"fp32": 4 * peak * 32 * 32, "bf16": 2 * peak * 32 * 32}


def test_the_pooling_keeps_its_indices() -> None:
    rows = described("resnext50_32x4d").layers.rows
    # int64, in whatever precision; what it puts out is kept by the block after it.
    assert (rows[1].name, rows[1].kept) == ("max pooling", 8 * 64 * 56 * 56)


def test_a_batch_takes_as_much_as_its_pictures() -> None:
    """Against the bytes that a real backward pass has to hold: tensors with numbers, on the CPU."""
    model = create_model("cifar_resnext11_2x8d", 10, stem_channels=8)
    weights = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            held[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(torch.randn(5, 3, 32, 32))
    # BatchNorm's statistics have as many numbers as it has channels, never five.
    of_pictures = sum(tensor.untyped_storage().nbytes() for tensor in held.values() if tensor.shape[0] == 5)
    assert logits.shape == (5, 10)
    assert of_pictures == 5 * summary.summarize("cifar_resnext11_2x8d", stem_channels=8).layers.kept["fp32"]


def test_the_table_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.configuration_table([described(name) for name in NAMES]) == TABLE
    assert summary.main(["--markdown", *NAMES[:1]]) == 0
    assert capsys.readouterr().out.splitlines() == TABLE.splitlines()[:3]
    assert TABLE in (ROOT / "docs/training.md").read_text()


def test_a_checkpoint_is_what_its_model_is(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert summary.main([str(finished_run), "--json"]) == 0
    assert summary.main(["cifar_resnext11_2x8d", "--stem-channels", "8", "--json"]) == 0
    ours, named = map(json.loads, capsys.readouterr().out.splitlines())
    assert ours == named
    assert (named["models"][0]["parameters"], named["models"][0]["layers"][0]["output"]) == (15_348, [8, 32, 32])
    # Another system's file as well.
    torch.save(create_model("resnext50_32x4d", 7).state_dict(), tmp_path / "theirs.pth")
    found = summary.summarize(str(tmp_path / "theirs.pth"), image_size=64)
    assert (found.name, found.num_classes, found.image_size) == ("resnext50_32x4d", 7, 64)
    (tmp_path / "nonsense").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="no file of weights"):
        summary.summarize(str(tmp_path / "nonsense"))


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.main(["cifar_resnext11_2x8d", "--stem-channels", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "layer",
        "output",
        "kernels",
        "parameters",
        "multiply-adds",
        "kept,",
        "fp32",
        "receptive",
        "field",
    ]
    row = ["layer2.0", "64", "x", "16", "x", "16", "1x1,", "3x3", "/", "2", "in", "2", "groups,", "1x1", "2,776"]
    assert lines[3].split() == [*row, "0.74", "M", "0.24", "MB", "7"]
    assert lines[6:9] == [
        "cifar_resnext11_2x8d, 8 channels after the stem: an image of 32x32, 10 classes",
        "parameters 15,348",
        "multiply-adds 2.06 M",
    ]
    assert lines[-1] == "receptive field 11 pixels"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("resnet50",), "'resnet50' is not a model name: write cifar_resnext<9n+2>_<C>x<W>d"),
        (("resnext50_32x4d", "--stem-channels", "0"), "command line: model.stem_channels: input should be greater"),
        (("resnext50_32x4d", "--image-size", "9999"), "command line: data.image_size: input should be less than"),
        (("resnext50_32x4d", "--stem-channels", "8"), "command line: model.stem_channels: 8 leaves the groups"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        summary.main(list(arguments))
    assert str(caught.value).startswith(line)


def test_a_checkpoint_keeps_its_own_classes(finished_run: Path) -> None:
    with pytest.raises(ConfigError, match="a checkpoint has its own classes and stem"):
        summary.summarize(str(finished_run), classes=5)


def test_a_wrong_name_ends_before_torch() -> None:
    result = command("summary", "resnet50", flags=("-X", "importtime"))
    assert (result.returncode, result.stdout) == (2, "")
    assert " torch\n" not in result.stderr
    assert "and no file has that name" in result.stderr.splitlines()[-1]
