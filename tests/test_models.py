"""The network against the paper's counts, torchvision's logits, and BatchNorm's definition."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnext_ignite.models import create_model
from resnext_ignite.models.resnext import GhostBatchNorm2d, ResNeXt


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, size: int) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    # The counter counts a multiply-add as two operations.
    return counter.get_total_flops() // 2


def on_meta(name: str, num_classes: int) -> ResNeXt:
    with torch.device("meta"):
        return create_model(name, num_classes).eval()


@pytest.mark.parametrize(
    ("name", "classes", "size", "exact", "giga"),
    [
        ("cifar_resnext29_8x64d", 10, 32, 34_426_698, 5.39),
        ("cifar_resnext29_16x64d", 10, 32, 68_155_210, 10.69),
        ("resnext50_32x4d", 1000, 224, 25_028_904, 4.23),
        ("resnext101_32x8d", 1000, 224, 88_791_336, 16.41),
        ("resnext101_64x4d", 1000, 224, 83_455_272, 15.46),
    ],
)
def test_published_counts(name: str, classes: int, size: int, exact: int, giga: float) -> None:
    model = on_meta(name, classes)
    assert parameters(model) == exact
    assert multiply_adds(model, size) / 1e9 == pytest.approx(giga, abs=0.006)


@pytest.mark.parametrize(
    ("name", "millions", "giga"),
    # Table 1 of the paper's complexity study: preserved complexity at rising cardinality.
    [
        ("resnext50_1x64d", 25.56, 4.09),
        ("resnext50_2x40d", 25.43, 4.12),
        ("resnext50_4x24d", 25.29, 4.16),
        ("resnext50_8x14d", 25.60, 4.27),
        ("resnext50_32x4d", 25.03, 4.23),
        ("resnext101_1x64d", 44.55, 7.80),
        ("resnext101_2x40d", 44.46, 7.84),
        ("resnext101_4x24d", 44.36, 7.89),
        ("resnext101_8x14d", 45.10, 8.08),
        ("resnext101_32x4d", 44.18, 7.97),
    ],
)
def test_complexity_table(name: str, millions: float, giga: float) -> None:
    model = on_meta(name, 1000)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.006)
    assert multiply_adds(model, 224) / 1e9 == pytest.approx(giga, abs=0.006)


def test_imagenet_layout_has_torchvisions_logits() -> None:
    theirs = torchvision.models.resnext50_32x4d(num_classes=7).eval()
    ours = create_model("resnext50_32x4d", 7).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cifar_resnext11_2x32d", "resnext50_2x16d"])
@pytest.mark.parametrize("size", [8, 33, 512])
def test_any_input_size(name: str, size: int) -> None:
    model = create_model(name, 5, stem_channels=8).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, size, size)).shape == (1, 5)


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    model = create_model("cifar_resnext29_8x64d", 10)
    conv = model.get_submodule("layer3.0.conv2")
    assert isinstance(conv, nn.Conv2d)
    # N(0, 2 / (3*3*2048)): all 2048 output channels count, though a group has 256.
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 2048)) ** 0.5, rel=0.01)
    assert conv.weight.mean().item() == pytest.approx(0, abs=1e-4)
    assert model.fc.bias.abs().max().item() == 0
    # torch's default for the classifier: uniform within 1 / sqrt(1024).
    assert 0.95 / 32 < model.fc.weight.abs().max().item() <= 1 / 32


def test_zero_init_residual_makes_blocks_the_identity() -> None:
    model = create_model("cifar_resnext20_2x32d", 3, stem_channels=8, zero_init_residual=True).eval()
    block = model.get_submodule("layer1.1")
    x = torch.rand(2, 32, 8, 8)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("way", ["_one_call_per_group", "_one_call"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_ghost_batch_norm_is_batch_norm_of_each_run_of_images(
    memory_format: torch.memory_format, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other way is a GPU's.
    monkeypatch.setattr(GhostBatchNorm2d, "_one_call_per_group", getattr(GhostBatchNorm2d, way))
    ghost = GhostBatchNorm2d(5, 4)
    nn.init.uniform_(ghost.weight)
    images = torch.randn(12, 5, 3, 3).contiguous(memory_format=memory_format).requires_grad_()
    out = ghost(images)
    plain = [nn.BatchNorm2d(5) for _ in range(3)]
    for norm in plain:
        norm.load_state_dict({"weight": ghost.weight, "bias": ghost.bias}, strict=False)
    parts = [norm(part) for norm, part in zip(plain, images.split(4), strict=True)]
    torch.testing.assert_close(out, torch.cat(parts))
    for name in ("running_mean", "running_var"):
        expected = torch.stack([getattr(norm, name) for norm in plain]).mean(0)
        torch.testing.assert_close(getattr(ghost, name), expected)
    assert out.is_contiguous(memory_format=memory_format)
    (ours,) = torch.autograd.grad(out.square().sum() + out[0].sum(), images)
    (theirs,) = torch.autograd.grad(torch.cat(parts).square().sum() + parts[0][0].sum(), images)
    torch.testing.assert_close(ours, theirs)


def test_ghost_batch_norm_refuses_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="10 images"):
        GhostBatchNorm2d(2, 4)(torch.randn(10, 2, 3, 3))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("resnext29_8x64d", "50, 101 or 152"),
        ("cifar_resnext28_8x64d", "9n\\+2"),
        ("cifar_resnext2_8x64d", "9n\\+2"),
        ("cifar_resnext29_0x64d", "from 1 to 9999"),
        ("resnet50", "not a model name"),
        ("resnext50_32x4d ", "not a model name"),
    ],
)
def test_a_wrong_name_is_explained(name: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        create_model(name, 10)
