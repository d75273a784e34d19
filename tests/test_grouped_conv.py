"""The ways to compute the grouped 3x3 give the same numbers, and a network takes the way that each shape is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import train_tiny

from resnext_ignite.benchmark.kernels import check
from resnext_ignite.config.schema import config_of, with_values
from resnext_ignite.models import build_model, create_model
from resnext_ignite.models.grouped_conv import (
    GroupedConv2d,
    grouped_shapes,
    implementations_for,
    in_each_implementation,
)
from resnext_ignite.runtime.errors import ConfigError
from resnext_ignite.runtime.model_names import parse_model_name
from resnext_ignite.training.tuning import ComputeSettings


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("way", ["split", "merged2", "merged4"])
def test_all_ways_are_one_convolution(way: str, bias: bool, stride: int) -> None:
    torch.manual_seed(0)
    plain = GroupedConv2d(12, 4, stride).double()
    other = GroupedConv2d(12, 4, stride, way).double()
    if bias:
        # As folding BatchNorm gives it one.
        for module in (plain, other):
            module.bias = torch.nn.Parameter(torch.arange(12.0, dtype=torch.float64))
    other.load_state_dict(plain.state_dict())
    images = torch.randn(2, 12, 7, 7, dtype=torch.float64, requires_grad=True)
    out = plain(images)
    assert out.shape == (2, 12, -(-7 // stride), -(-7 // stride))
    gradient = torch.randn_like(out)
    expected = torch.autograd.grad(out, [images, plain.weight], gradient)
    torch.testing.assert_close(other(images), out, rtol=1e-12, atol=1e-12)
    for mine, its in zip(torch.autograd.grad(other(images), [images, other.weight], gradient), expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def test_the_ways_worth_measuring() -> None:
    assert implementations_for(8, 64) == ["grouped", "split", "merged2", "merged4", "merged8"]
    # A dense convolution of 32 groups of 4 has 128 channels; 32 small ones are hopeless.
    assert implementations_for(32, 4) == ["grouped", "merged2", "merged4", "merged8", "merged16", "merged32"]
    assert implementations_for(8, 256) == ["grouped", "split", "merged2"]
    assert implementations_for(1, 64) == ["grouped"]
    with pytest.raises(ValueError, match="'merged3': 3 does not divide 4 groups"):
        GroupedConv2d(12, 4, 1, "merged3")
    module = GroupedConv2d(16, 8, 2)
    assert {way: other.stride for way, other in in_each_implementation(module).items()}["merged2"] == (2, 2)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("cifar_resnext29_8x64d", 32, [(512, 32, 1), (1024, 32, 2), (1024, 16, 1), (2048, 16, 2), (2048, 8, 1)]),
        # One block a stage: none without the stride but the first.
        ("cifar_resnext11_8x64d", 32, [(512, 32, 1), (1024, 32, 2), (2048, 16, 2)]),
        (
            "resnext50_32x4d",
            64,
            [(128, 16, 1), (256, 16, 2), (256, 8, 1), (512, 8, 2), (512, 4, 1), (1024, 4, 2), (1024, 2, 1)],
        ),
    ],
)
def test_a_network_has_these_shapes(name: str, size: int, expected: list[tuple[int, int, int]]) -> None:
    model = create_model(name, 10)
    shapes = grouped_shapes(model, size)
    assert [(s.module.in_channels, s.size, s.module.stride[0]) for s in shapes] == expected
    assert parse_model_name(name).grouped_shapes == len(expected)
    assert model.training
    assert model.get_submodule(shapes[-1].name) is shapes[-1].module


def test_each_shape_of_a_network_is_computed_as_it_is_told() -> None:
    ways = ("split", "merged2", "grouped", "merged4", "split")
    torch.manual_seed(0)
    told = create_model("cifar_resnext20_4x16d", 10, stem_channels=16, grouped_conv=ways)
    torch.manual_seed(0)
    plain = create_model("cifar_resnext20_4x16d", 10, stem_channels=16)
    found = [module.way for module in told.modules() if isinstance(module, GroupedConv2d)]
    assert found == ["split", "split", "merged2", "grouped", "merged4", "split"]
    assert told.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(told.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"argument 2 is shorter"):
        create_model("cifar_resnext20_4x16d", 10, grouped_conv=("split",) * 2)
    every = create_model("cifar_resnext20_4x16d", 10, grouped_conv=("split",))
    assert {module.way for module in every.modules() if isinstance(module, GroupedConv2d)} == {"split"}


@pytest.mark.parametrize(
    ("ways", "line"),
    [
        (["split"] * 2, "train.grouped_conv: split split; auto, one choice for all, or one for each of the 3 shapes"),
        (["split", "auto", "split"], "train.grouped_conv: split auto split; auto, one choice for all, or one for each"),
        ([], "train.grouped_conv: empty; auto, one choice"),
        ("merged3", "train.grouped_conv: 'merged3': 3 does not divide the 2 groups"),
        (["split", "split", "merged4"], "train.grouped_conv: 'merged4': 4 does not divide the 2 groups"),
        (["split", "split", "winograd"], "train.grouped_conv.2: string should match pattern"),
    ],
)
def test_ways_that_do_not_fit_the_network_are_refused(tmp_path: Path, ways: object, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train_tiny(tmp_path / "run", f"train.grouped_conv={ways}")
    assert line in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_model_is_not_built_before_its_ways_are_chosen() -> None:
    config = with_values(config_of({}), {"model.num_classes": 10, "train.grouped_conv": "auto"})
    with pytest.raises(ValueError, match=r"grouped_conv: not resolved"):
        build_model(config)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["cifar_resnext29_8x64d", "cifar_resnext29_16x64d", "resnext50_32x4d"])
def test_all_ways_agree_with_float64_on_the_gpu(name: str) -> None:
    arithmetic = ComputeSettings(torch.device("cuda"), torch.bfloat16, channels_last=True)
    for shape in grouped_shapes(create_model(name, 10), 32 if name.startswith("cifar") else 224):
        assert max(check(shape, arithmetic).values()) < 0.01
