"""Checkpoints of other systems: the same logits here, and back there.

torchvision's and timm's files are written by their own code. The others' networks are written here after their names
and shapes (ResNeXt.pytorch and pytorch-classification: models/model.py and models/cifar/resnext.py; pytorch-cifar100:
models/resnext.py), apart from what this project builds.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import Payload, command, train_tiny
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from resnext_ignite import convert, evaluate, predict
from resnext_ignite.benchmark.peers import has_timm
from resnext_ignite.config.schema import with_values
from resnext_ignite.data import build_eval_loader
from resnext_ignite.data.sources import cifar
from resnext_ignite.data.sources.cifar import CLASSES
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.models import create_model
from resnext_ignite.runs.checkpoint import load_checkpoint, load_model
from resnext_ignite.runtime.errors import CheckpointError, ConfigError
from resnext_ignite.weights.foreign.keys import RESNEXT_PYTORCH, TORCHVISION
from resnext_ignite.weights.foreign.reading import read_foreign
from resnext_ignite.weights.foreign.systems import SYSTEMS, TARGETS
from resnext_ignite.weights.loading import open_model
from resnext_ignite.weights.pretrained import load_pretrained


class SeedBlock(nn.Module):
    """ResNeXt.pytorch's block, by its names."""

    def __init__(self, before: int, after: int, width: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(before, width, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(width)
        self.conv_conv = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv_expand = nn.Conv2d(width, after, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after:
            self.shortcut.add_module("shortcut_conv", nn.Conv2d(before, after, 1, stride, bias=False))
            self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn_reduce(self.conv_reduce(x)))
        out = F.relu(self.bn(self.conv_conv(out)))
        return F.relu(self.shortcut(x) + self.bn_expand(self.conv_expand(out)))


class SeedNetwork(nn.Module):
    """ResNeXt.pytorch's network, by its names: a ResNeXt-20, 4x16d."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv_1_3x3 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        channels = 64
        for stage in (1, 2, 3):
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for number in range(2):
                after = 128 * 2**stage
                stride = 2 if stage > 1 and number == 0 else 1
                name = f"stage_{stage}_bottleneck_{number}"
                blocks[name] = SeedBlock(channels, after, 32 * 2**stage, 4, stride)
                channels = after
            self.add_module(f"stage_{stage}", nn.Sequential(blocks))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_1(self.conv_1_3x3(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"stage_{stage}")(x)
        return self.classifier(x.mean((2, 3)))


class SplitBlock(nn.Module):
    """pytorch-cifar100's block, by its names: its first convolution is grouped as well."""

    def __init__(self, before: int, planes: int, stride: int, groups: int = 32) -> None:
        super().__init__()
        width, after = groups * (4 * planes // 64), 4 * planes
        self.split_transforms = nn.Sequential(
            nn.Conv2d(before, width, 1, groups=groups, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.split_transforms(x) + self.shortcut(x))


class SplitNetwork(nn.Module):
    """pytorch-cifar100's ResNeXt-50, by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        channels = 64
        for stage, count in enumerate((3, 4, 6, 3)):
            blocks = []
            for number in range(count):
                blocks.append(SplitBlock(channels, 64 * 2**stage, 2 if stage and not number else 1))
                channels = 256 * 2**stage
            self.add_module(f"conv{stage + 2}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, 100)

    def forward(self, x: Tensor) -> Tensor:
        for stage in range(1, 6):
            x = self.get_submodule(f"conv{stage}")(x)
        return self.fc(x.mean((2, 3)))


def living(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and biases that are not those it began with."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.running_var):
                assert value is not None
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            for value in (module.bias.data, module.running_mean):
                assert value is not None
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return model.eval()


def assert_same_logits(model: nn.Module, file: Path, output: Path, size: int, source: str, name: str) -> None:
    """Convert a file, and compare what comes out with the network that wrote it."""
    assert convert.main(["--checkpoint", str(file), "--output", str(output)]) == 0
    ours, metadata = load_model(output)
    assert metadata.config.model.name == name
    assert load_checkpoint(output)["source"] == source
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    source_of = SYSTEMS[source]
    assert (metadata.mean, metadata.std) == (source_of.mean, source_of.std)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_resnext_pytorch(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    model = living(SeedNetwork(10))
    # As its files of 2017 were: without counters of batches.
    weights = {prefix + k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "model.pytorch")
    output = tmp_path / "ours.pt"
    assert_same_logits(model, tmp_path / "model.pytorch", output, 32, "resnext.pytorch", "cifar_resnext20_4x16d")
    _, metadata = load_model(output)
    assert (metadata.classes, metadata.image_size) == (CLASSES["cifar10"], 32)
    assert metadata.config.data.name == "cifar10"


def test_pytorch_classification(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = living(SeedNetwork(100))
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    content = {"epoch": 300, "state_dict": weights, "acc": 77.3, "best_acc": torch.tensor(77.5), "optimizer": {}}
    torch.save(content, tmp_path / "model_best.pth.tar")
    output = tmp_path / "ours.pt"
    name = "cifar_resnext20_4x16d"
    assert_same_logits(model, tmp_path / "model_best.pth.tar", output, 32, "pytorch-classification", name)
    assert load_model(output)[1].classes == CLASSES["cifar100"]


def test_pytorch_cifar100(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = living(SplitNetwork())
    torch.save(model.state_dict(), tmp_path / "resnext50-200-best.pth")
    output, name = tmp_path / "ours.pt", "cifar4_resnext50_32x4d"
    assert_same_logits(model, tmp_path / "resnext50-200-best.pth", output, 32, "pytorch-cifar100", name)


@pytest.mark.parametrize(
    "name",
    ["resnext50_32x4d", "resnext101_32x8d", pytest.param("resnext101_64x4d", marks=pytest.mark.slow)],
)
def test_torchvision(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = living(getattr(torchvision.models, name)(num_classes=1000))
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    output = tmp_path / "ours.pt"
    assert_same_logits(model, tmp_path / "theirs.pth", output, 64, "torchvision", name)
    _, metadata = load_model(output)
    assert (metadata.image_size, metadata.classes[0], len(metadata.classes)) == (224, "tench", 1000)
    assert metadata.config.data.eval_crop == 0.875


@pytest.mark.skipif(not has_timm(), reason="timm is not installed (the extra [bench])")
@pytest.mark.parametrize("name", ["resnext50_32x4d.tv_in1k", "resnext101_32x8d.fb_swsl_ig1b_ft_in1k"])
def test_timm(tmp_path: Path, name: str) -> None:
    import timm

    torch.manual_seed(0)
    model = living(timm.create_model(name, pretrained=False))
    # As its hub keeps them.
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    output = tmp_path / "ours.pt"
    assert_same_logits(model, tmp_path / "model.safetensors", output, 64, "torchvision", name.split(".")[0])
    # As its train.py does, which keeps a moving average beside the weights.
    other = create_model(name.split(".")[0], 1000).state_dict()
    torch.save({"state_dict": other, "state_dict_ema": model.state_dict(), "arch": name}, tmp_path / "last.pth.tar")
    ours = read_foreign(tmp_path / "last.pth.tar", "timm").weights
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("target", TARGETS)
def test_there_and_back(tmp_path: Path, target: str) -> None:
    torch.manual_seed(0)
    model = living(SeedNetwork(10))
    torch.save(model.state_dict(), tmp_path / "model.pytorch")
    ours, theirs = tmp_path / "ours.pt", tmp_path / "theirs.pth"
    assert convert.main(["--checkpoint", str(tmp_path / "model.pytorch"), "--output", str(ours)]) == 0
    assert convert.main(["--checkpoint", str(ours), "--output", str(theirs), "--to", target]) == 0
    written = torch.load(theirs, weights_only=True)
    if target == "resnext.pytorch":
        model.load_state_dict(written)
        assert all(torch.equal(written[key], value) for key, value in model.state_dict().items())
    # Behind a 3x3 stem pictures are of 32 pixels, whoever names the weights.
    metadata = open_model(theirs)[1]
    assert (metadata.image_size, metadata.mean, metadata.std) == (32, cifar.MEAN, cifar.STD)
    assert metadata.classes == (CLASSES["cifar10"] if target == "resnext.pytorch" else tuple("0123456789"))
    again = read_foreign(theirs).weights
    assert all(torch.equal(again[key], value) for key, value in load_model(ours)[0].state_dict().items())


def test_earlier_names_of_systems_are_still_accepted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = SeedNetwork(10).state_dict()
    torch.save(weights, tmp_path / "model.pytorch")
    read, written = tmp_path / "read.pt", tmp_path / "written.pth"
    arguments = [
        "--checkpoint",
        str(tmp_path / "model.pytorch"),
        "--output",
        str(read),
        "--from",
        "seed",
        "--to",
        "ours",
    ]
    assert convert.main(arguments) == 0
    assert convert.main(["--checkpoint", str(read), "--output", str(written), "--to", "seed"]) == 0
    back = torch.load(written, weights_only=True)
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_what_torchvision_gets_it_opens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = living(torchvision.models.resnext50_32x4d(num_classes=7))
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    ours, back = tmp_path / "ours.pt", tmp_path / "back.pth"
    assert convert.main(["--checkpoint", str(tmp_path / "theirs.pth"), "--output", str(ours)]) == 0
    assert load_model(ours)[1].classes == tuple("0123456")
    assert convert.main(["--checkpoint", str(ours), "--output", str(back), "--to", "torchvision"]) == 0
    fresh = torchvision.models.resnext50_32x4d(num_classes=7)
    fresh.load_state_dict(torch.load(back, weights_only=True))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images), model(images))


def test_names_that_another_system_has_not_are_refused(tmp_path: Path) -> None:
    torch.save(create_model("resnext50_32x4d", 10).state_dict(), tmp_path / "theirs.pth")
    ours = tmp_path / "ours.pt"
    assert convert.main(["--checkpoint", str(tmp_path / "theirs.pth"), "--output", str(ours)]) == 0
    with pytest.raises(CheckpointError, match=r"layer4\.0\.conv1\.weight: resnext\.pytorch has no such weight"):
        convert.main(["--checkpoint", str(ours), "--output", str(tmp_path / "x"), "--to", "resnext.pytorch"])
    assert not (tmp_path / "x").exists()


def test_another_systems_file_is_used_as_it_is(
    tmp_path: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluated, asked and trained from, without a conversion; in fp32, with the names that the folders give."""
    torch.manual_seed(0)
    model = living(torchvision.models.resnext50_32x4d(num_classes=2))
    file = tmp_path / "theirs.pth"
    torch.save(model.state_dict(), file)
    data = [f"data.root={picture_folder}", "data.image_size=64"]
    metrics, found = evaluate.evaluate(file, "test", data)
    assert found.classes == ("dark", "light")
    loader = build_eval_loader(
        with_values(open_model(file)[1].config, {"data.root": str(picture_folder), "data.image_size": 64}),
        found,
        "test",
        torch.device("cpu"),
        Ranks(),
    )
    with torch.no_grad():
        right = sum(int((model(batch.images).argmax(1) == batch.labels).sum()) for batch in loader)
    assert (metrics["images"], metrics["correct"]) == (12, right)
    with pytest.raises(CheckpointError, match="has the classes 0, 1, but the data has disk, ring"):
        evaluate.evaluate(file, "test", ["data.name=shapes"])

    assert predict.main(["--checkpoint", str(file), str(picture_folder / "test/dark/00.png")]) == 0
    assert capsys.readouterr().out.count(" % ") == 2

    start = create_model("cifar_resnext20_4x16d", 10)
    torch.save(living(SeedNetwork(10)).state_dict(), tmp_path / "model.pytorch")
    load_pretrained(start, "cifar_resnext20_4x16d", str(tmp_path / "model.pytorch"))
    assert torch.equal(start.fc.weight, torch.load(tmp_path / "model.pytorch")["classifier.weight"])


def seed_weights() -> dict[str, Any]:
    torch.manual_seed(0)
    return SeedNetwork(10).state_dict()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda w: {"w": torch.zeros(1)}, "w: no known system gives this name to a weight of a ResNeXt; set --from"),
        (
            lambda w: {**w, "extra.weight": torch.zeros(1)},
            "extra.weight: resnext.pytorch has no such weight in a ResNeXt",
        ),
        (
            lambda w: {**w, "stage_2.stage_2_bottleneck_0.bn.weight": torch.zeros(3)},
            r"layer2.0.bn2.weight: shape (3,), where cifar_resnext20_4x16d has (128,)",
        ),
        (
            lambda w: {k: v for k, v in w.items() if k != "bn_1.bias"},
            "bn1.bias is missing: cifar_resnext20_4x16d has it",
        ),
        (lambda w: {k: v for k, v in w.items() if k != "classifier.weight"}, "fc.weight is missing: not the weights"),
        (lambda w: {**w, "classifier.weight": torch.zeros(1, 1024)}, "fc.weight: 1 classes; a model here has 2 to"),
        (lambda w: {k: v for k, v in w.items() if "_3_bottleneck_1" not in k}, "stages of 2, 2, 1 blocks are no depth"),
        (lambda w: {**w, "conv_1_3x3.weight": torch.zeros(64, 3, 5, 5)}, "conv1.weight: a stem of 5x5"),
        (lambda w: {**w, "conv_1_3x3.weight": torch.zeros(0)}, "conv1.weight: shape (0,) is none of a ResNeXt's"),
        (lambda w: {"state_dict": 3}, "state_dict: is int, not a weight"),
        (lambda w: {}, "holds no weights, but dict"),
        (lambda w: [1, 2], "holds no weights, but list"),
    ],
)
def test_the_first_weight_that_does_not_fit_is_named(tmp_path: Path, change: Any, line: str) -> None:
    file, output = tmp_path / "model.pytorch", tmp_path / "ours.pt"
    torch.save(change(seed_weights()), file)
    with pytest.raises(CheckpointError) as caught:
        convert.main(["--checkpoint", str(file), "--output", str(output)])
    assert str(caught.value).startswith(f"{file}: {line}")
    assert not output.exists()


def test_hostile_and_damaged_files_are_refused(tmp_path: Path) -> None:
    sentinel, file = tmp_path / "payload ran", tmp_path / "model.pytorch"
    torch.save({"conv_1_3x3.weight": Payload(sentinel)}, file)
    for content in (None, b"", b"nonsense", file.read_bytes()[:1000]):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"no file of weights"):
            read_foreign(file)
    assert not sentinel.exists()
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"no file of weights"):
        read_foreign(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: No such file"):
        read_foreign(tmp_path / "missing")


def test_a_wrong_command_line_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(ConfigError, match="exists already; choose another name"):
        convert.main(["--checkpoint", "x", "--output", str(tmp_path / "there")])
    with pytest.raises(ConfigError, match=r"--from resnext\.pytorch: with --to timm a checkpoint of this"):
        convert.main(["--checkpoint", "x", "--output", "y", "--from", "resnext.pytorch", "--to", "timm"])
    result = command("convert", "--checkpoint", str(tmp_path / "x"), "--output", str(tmp_path / "y"))
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr == f"error: {tmp_path / 'x'}: No such file or directory\n"


def test_the_choices_of_the_command_are_those_of_the_reader() -> None:
    assert ("auto", *SYSTEMS) == convert._SYSTEMS
    assert set(convert._TARGETS) == {"resnext_ignite", *TARGETS}
    names = create_model("cifar_resnext20_4x16d", 10).state_dict()
    for naming in (RESNEXT_PYTORCH, TORCHVISION):
        assert [naming.to_project(naming.from_project(name) or "") for name in names] == list(names)
    assert {len(names) for names in CLASSES.values()} == {10, 100}


def test_a_converted_model_starts_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = create_model("cifar_resnext11_2x8d", 10, stem_channels=8)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    ours = tmp_path / "ours.pt"
    assert convert.main(["--checkpoint", str(tmp_path / "theirs.pth"), "--output", str(ours)]) == 0
    assert train_tiny(tmp_path / "run", f"model.pretrained={ours}", "train.epochs=1", "optimizer.lr=1e-9") == 0
    trained = load_checkpoint(tmp_path / "run/checkpoints/final.pt")["model"]
    torch.testing.assert_close(trained["fc.weight"], model.fc.weight.detach(), rtol=0, atol=1e-6)
