"""Muon: each group's matrix orthogonalised by itself, by hand and against torch's own, and in real runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import digest, train_tiny
from test_train import killed_at
from torch import Tensor, nn

from resnext_ignite.config.schema import Config, with_values
from resnext_ignite.models import build_model, create_model
from resnext_ignite.optim import build_lr_scheduler, build_optimizer
from resnext_ignite.optim.muon import Muon, orthogonalised
from resnext_ignite.runs.checkpoint import load_checkpoint
from resnext_ignite.runs.folder import RunFolder

# What the quintic leaves of singular values of 1, after five iterations of 3.4445 s - 4.7750 s^3 + 2.0315 s^5:
# 1, 0.7010, 1.1136, 0.7207, 1.0900, 0.6964. From 0.002 on, whatever it is, it ends within the band.
OF_ONE = 0.6964
BAND = (0.68, 1.21)


def convolution(groups: int, shape: tuple[int, ...] = (32, 16, 3, 3)) -> nn.Parameter:
    """A weight of a grouped convolution with random numbers and a random gradient."""
    torch.manual_seed(groups)
    weight = nn.Parameter(torch.randn(shape[0], shape[1] // groups, *shape[2:]))
    weight.grad = torch.randn_like(weight)
    return weight


def step_of(weight: nn.Parameter, conv_groups: int, **options: Any) -> Tensor:
    """What one update with learning rate 1 takes away from a weight."""
    before = weight.detach().clone()
    group = {"params": [weight], "conv_groups": conv_groups, **options}
    Muon([group], lr=1.0, momentum=0.9, nesterov=True).step()
    return before - weight.detach()


def test_a_single_number_by_hand() -> None:
    # All that is left of a 1x1 matrix is its sign; none is left of nothing.
    numbers = torch.tensor([250.0, -0.003, 0.0]).view(3, 1, 1)
    assert orthogonalised(numbers).flatten().tolist() == pytest.approx([OF_ONE, -OF_ONE, 0.0], abs=1e-4)


def test_small_singular_values_come_up() -> None:
    # Diagonal: each entry, over the root of their squares' sum, goes its own way through the quintic.
    values = torch.logspace(-2, 0, 40).double()
    left = orthogonalised(torch.diag(values)[None])[0]
    torch.testing.assert_close(left, torch.diag(left.diagonal()))
    assert BAND[0] < left.diagonal().min() < left.diagonal().max() < BAND[1]
    values /= values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(left.diagonal(), values)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_each_group_takes_an_orthogonal_step(groups: int) -> None:
    step = step_of(convolution(groups), groups)
    # (32, 16 / g, 3, 3): g matrices of 32 / g rows and 144 / g columns, wide all of them, so the factor is 1.
    singular = torch.linalg.svdvals(step.view(groups, 32 // groups, 144 // groups))
    assert singular.shape == (groups, 32 // groups)
    assert BAND[0] < singular.min() <= singular.max() < BAND[1]


def test_a_tall_matrix_takes_a_longer_step() -> None:
    # 1x1, 64 outputs of 4 inputs in 2 groups: 32 rows, 2 columns: a factor of 4.
    step = step_of(convolution(2, (64, 4, 1, 1)), 2)
    singular = torch.linalg.svdvals(step.view(2, 32, 2)) / 4
    assert BAND[0] < singular.min() <= singular.max() < BAND[1]


def test_a_grouped_weight_is_not_one_matrix() -> None:
    # Taken for one, its 32 rows share 9 columns and cannot all be orthogonal: of a group's two rows little is left.
    grouped, flattened = step_of(convolution(16), 16), step_of(convolution(16), 1)
    sizes = [torch.linalg.svdvals(step.view(16, 2, 9)).mean().item() for step in (grouped, flattened)]
    assert sizes[0] > BAND[0]
    # The factor is sqrt(32 / 9) now, and the 32 rows hold what nine orthogonal ones do.
    assert sizes[1] / math.sqrt(32 / 9) < 0.6


@pytest.mark.parametrize("groups", [1, 4])
def test_a_batch_of_groups_and_layers_is_as_each_by_itself(groups: int) -> None:
    weights = [convolution(groups), convolution(groups, (16, 16, 1, 1)), convolution(groups)]
    weights[2].grad = torch.randn_like(weights[2])
    before = [weight.detach().clone() for weight in weights]
    Muon([{"params": weights, "conv_groups": groups}], lr=0.5, momentum=0.9, nesterov=True).step()
    for old, weight in zip(before, weights, strict=True):
        assert weight.grad is not None
        for ours, theirs, gradient in zip(*(w.chunk(groups) for w in (weight, old, weight.grad)), strict=True):
            step = orthogonalised(gradient.reshape(1, len(gradient), -1)).view_as(gradient)
            torch.testing.assert_close(ours, theirs - 0.5 * step)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (64, 4, 1, 1)])
def test_it_is_torchs_muon_of_each_group(shape: tuple[int, ...], nesterov: bool) -> None:
    weight = convolution(2, shape)
    start = weight.detach().clone()
    matrices = [nn.Parameter(part.detach().reshape(len(part), -1).clone()) for part in weight.chunk(2)]
    options: dict[str, Any] = {"momentum": 0.6, "weight_decay": 0.1}
    ours = Muon([{"params": [weight], "conv_groups": 2, **options}], lr=0.1, momentum=0.0, nesterov=nesterov)
    theirs = torch.optim.Muon(matrices, lr=0.1, nesterov=nesterov, **options)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        for matrix, gradient in zip(matrices, weight.grad.chunk(2), strict=True):
            matrix.grad = gradient.reshape(matrix.shape)
        ours.step()
        theirs.step()
    expected = torch.cat([matrix.detach() for matrix in matrices]).view_as(weight)
    # Theirs multiplies in bf16, of 8 bits.
    assert (weight - expected).norm() < 0.02 * (weight - start).norm()


def test_the_memory_format_changes_nothing() -> None:
    plain, last = convolution(4), convolution(4)
    last.data = last.data.contiguous(memory_format=torch.channels_last)
    last.grad = plain.grad
    assert torch.equal(step_of(plain, 4), step_of(last, 4))


def tiny_model(**values: Any) -> tuple[Config, nn.Module]:
    named = {"optimizer.name": "muon", "model.num_classes": 10, "model.stem_channels": 8}
    config = with_values(Config(), {**named, "model.name": "cifar_resnext11_2x8d", **values})
    return config, build_model(config)


def test_what_is_muons_and_what_is_sgds() -> None:
    values = {"optimizer.lr": 0.2, "optimizer.muon_lr": 0.05, "optimizer.backbone_lr_factor": 0.5}
    more = {"optimizer.muon_momentum": 0.6, "optimizer.muon_weight_decay": 0.01, "schedule.name": "cosine"}
    config, model = tiny_model(**values, **more)
    optimizer = build_optimizer(config, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scheduler = build_lr_scheduler(with_values(config, {"train.epochs": 2}), optimizer, 2)
    for factor in (1.0, 0.8535534, 0.5):
        scheduler(None)
        seen = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                seen[name] = group["conv_groups"]
                rate = 0.05 * 0.5 if group["conv_groups"] else 0.2 if name.startswith("fc.") else 0.2 * 0.5
                assert group["lr"] == pytest.approx(rate * factor)
                of_kind = (0.6, 0.01) if group["conv_groups"] else (0.9, 5e-4)
                assert (group["momentum"], group["weight_decay"]) == of_kind
    # The grouped 3x3 is each block's second convolution; stem, norms and classifier are SGD's.
    assert seen.keys() == set(names.values())
    hidden = {name: groups for name, groups in seen.items() if groups}
    expected = {name for name, parameter in model.named_parameters() if parameter.ndim == 4} - {"conv1.weight"}
    assert hidden.keys() == expected
    assert all(groups == (2 if ".conv2." in name else 1) for name, groups in hidden.items())


def test_the_rest_takes_the_steps_of_sgd() -> None:
    # No convolution but the stem is left: the same numbers as torch's SGD gives.
    weights = []
    for name in ("muon", "sgd"):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        config = with_values(Config(), {"optimizer.name": name})
        optimizer = build_optimizer(config, model)
        for _ in range(3):
            model(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_a_frozen_backbone_leaves_nothing_to_muon() -> None:
    config, model = tiny_model(**{"train.freeze": "backbone", "model.pretrained": "x"})
    (group,) = build_optimizer(config, model).param_groups
    assert group["conv_groups"] == 0
    assert [tuple(parameter.shape) for parameter in group["params"]] == [(10, 128), (10,)]


def test_a_saved_state_goes_on_as_it_was() -> None:
    gradients = [torch.randn(32, 4, 3, 3) for _ in range(3)]

    def train(weight: nn.Parameter, optimizer: Muon, several: list[Tensor]) -> None:
        for gradient in several:
            weight.grad = gradient.clone()
            optimizer.step()

    weight = convolution(4)
    groups = [{"params": [weight], "conv_groups": 4}]
    first = Muon(groups, lr=0.1, momentum=0.9, nesterov=True)
    train(weight, first, gradients[:2])
    again = nn.Parameter(weight.detach().clone())
    second = Muon([{"params": [again], "conv_groups": 4}], lr=9.0, momentum=0.0, nesterov=True)
    # As read from a file: torch takes the tensors themselves over.
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(weight, first, gradients[2:])
    train(again, second, gradients[2:])
    assert torch.equal(weight, again)


def test_an_infinite_gradient_in_fp16_is_skipped() -> None:
    weight = convolution(4)
    before = weight.detach().clone()
    optimizer = Muon([{"params": [weight], "conv_groups": 4}], lr=0.1, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler("cpu")
    for gradient in (torch.inf, 1.0):
        assert torch.equal(weight, before)
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert not torch.equal(weight, before)


MUON = ["optimizer.name=muon", "checkpoint.every_iterations=1"]


@pytest.mark.parametrize("values", [[], ["train.accumulate=2"], ["train.precision=fp16"]])
def test_a_run_learns_with_it(tmp_path: Path, values: list[str]) -> None:
    assert train_tiny(tmp_path / "run", *MUON, "train.epochs=6", *values) == 0
    records = RunFolder(tmp_path / "run").read_metrics()
    # Ten classes: chance is ln 10. An epoch is four updates.
    losses = [record["train_loss"] for record in records[1:]]
    assert losses[-1] < losses[0] - 0.3
    assert losses[-1] < math.log(10)


def test_a_run_that_is_killed_ends_the_same(tmp_path: Path, in_fork: Callable[[Callable[[], Any]], int]) -> None:
    values = [*MUON, "optimizer.muon_weight_decay=0.1"]
    assert train_tiny(tmp_path / "whole", *values) == 0
    killed_at(tmp_path / "cut", 7, in_fork, *values)
    assert train_tiny(tmp_path / "cut", *values, resume=True) == 0
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    groups = load_checkpoint(tmp_path / "cut/checkpoints/final.pt")["optimizer"]["param_groups"]
    assert [group["conv_groups"] for group in groups] == [0, 1, 2]


def test_a_pretrained_run_takes_it(finished_run: Path, tmp_path: Path) -> None:
    keys = [f"model.pretrained={finished_run}", "train.freeze=stem", "optimizer.backbone_lr_factor=0.5", *MUON]
    assert train_tiny(tmp_path / "run", *keys, "train.epochs=1") == 0
    before, after = (
        load_checkpoint(path / "checkpoints/final.pt")["model"] for path in (finished_run, tmp_path / "run")
    )
    kept = {name for name, weight in after.items() if torch.equal(weight, before[name])}
    assert {name for name in kept if "num_batches" not in name} == {
        name for name in after if name.split(".")[0] in ("conv1", "bn1")
    } - {"bn1.num_batches_tracked"}


def test_groups_are_found_in_any_network() -> None:
    model = create_model("resnext50_32x4d", 10)
    groups = build_optimizer(with_values(Config(), {"optimizer.name": "muon"}), model).param_groups
    # 16 blocks of three convolutions and four shortcuts; the 16 grouped ones have 32.
    assert [(group["conv_groups"], len(group["params"])) for group in groups[1:]] == [(1, 36), (32, 16)]
