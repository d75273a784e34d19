"""Mixup and CutMix: their lambdas, their pairs, and the loss of what they make."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, digest, train_tiny
from torch import nn
from torch.nn import functional as F

from resnext_ignite.config.batches import check_batch_size
from resnext_ignite.config.files import load_config
from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.augment.mixing import Mixing, beta, beta_quantiles, neighbours
from resnext_ignite.data.images import UNREADABLE, Images
from resnext_ignite.data.loaders import Batch, TrainLoader
from resnext_ignite.data.sampling import Purpose, TrainOrder, uniform
from resnext_ignite.runtime.errors import ConfigError
from resnext_ignite.training.engines import create_trainer

CPU = torch.device("cpu")
HALVES = torch.linspace(0, 1, 4097, dtype=torch.float64)


def test_quantiles_are_those_of_known_distributions() -> None:
    # Beta(1, 1) is uniform; Beta(1/2, 1/2) the arcsine law; Beta(2, 2) has the distribution 3 x^2 - 2 x^3.
    torch.testing.assert_close(beta_quantiles(1.0), HALVES, rtol=0, atol=1e-9)
    torch.testing.assert_close(beta_quantiles(0.5), torch.sin(math.pi / 2 * HALVES) ** 2, rtol=0, atol=1e-6)
    x = beta_quantiles(2.0)
    torch.testing.assert_close(3 * x**2 - 2 * x**3, HALVES, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 1.0, 3.0])
def test_numbers_have_the_variance_of_their_distribution(alpha: float) -> None:
    numbers = beta(alpha, uniform(0, 1, torch.arange(200_000), Purpose.MIX_LAMBDA)).double()
    assert numbers.min() >= 0
    assert numbers.max() <= 1
    assert float(numbers.mean()) == pytest.approx(0.5, abs=0.004)
    assert float(numbers.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.01)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


ALONE = torch.zeros(6, dtype=torch.bool)


def test_mixup_by_hand() -> None:
    whole, indices = images(6), torch.tensor([5, 0, 9, 2, 7, 1])
    mixed, lambdas = Mixing(3, mixup=1.0)(whole, 2, indices, ALONE)
    own = uniform(3, 2, indices, Purpose.MIX_LAMBDA).float()
    torch.testing.assert_close(lambdas, own)
    for number, other in enumerate([1, 0, 3, 2, 5, 4]):
        torch.testing.assert_close(mixed[number], own[number] * whole[number] + (1 - own[number]) * whole[other])


def test_cutmix_by_hand() -> None:
    # Even images are 0, odd ones 1: the mean of an image is how much of it is the odd one's.
    whole = torch.arange(400).remainder(2).float()[:, None, None, None].expand(400, 3, 16, 12)
    indices = torch.arange(400)
    mixed, lambdas = Mixing(1, cutmix=1.0)(whole, 1, indices, torch.zeros(400, dtype=torch.bool))
    odd = mixed.mean((1, 2, 3))
    torch.testing.assert_close(torch.where(indices % 2 == 1, odd, 1 - odd), lambdas)
    # One box: its rows and columns are runs.
    foreign = (mixed[:, 0] != whole[:, 0]).float()
    rows, columns = foreign.amax(2), foreign.amax(1)
    assert torch.equal(foreign.sum((1, 2)), rows.sum(1) * columns.sum(1))
    for edges in (rows, columns):
        assert int((edges.diff(dim=1) == 1).sum(1).max()) <= 1
    # 1 - sqrt: what is cut off at the edges makes more of an image its own than the half that is drawn.
    assert 0.5 < float(lambdas.mean()) < 0.75


def test_both_are_one_of_both() -> None:
    whole, indices = images(1000), torch.arange(1000)
    alone = torch.zeros(1000, dtype=torch.bool)
    mixed, lambdas = Mixing(1, mixup=0.8, cutmix=1.0)(whole, 1, indices, alone)
    by_mixup, mixup_shares = Mixing(1, mixup=0.8)(whole, 1, indices, alone)
    by_cutmix, cutmix_shares = Mixing(1, cutmix=1.0)(whole, 1, indices, alone)
    is_mixup, is_cutmix = ((mixed == made).all(3).all(2).all(1) for made in (by_mixup, by_cutmix))
    assert bool((is_mixup | is_cutmix).all())
    assert 400 < int(is_mixup.sum()) < 600
    assert torch.equal(lambdas, torch.where(is_mixup, mixup_shares, cutmix_shares))


def test_what_is_alone_is_left_as_it_is() -> None:
    alone = torch.tensor([True, True, False, False, True, True])
    mixed, lambdas = Mixing(1, mixup=1.0, cutmix=1.0)(images(6), 1, torch.arange(6), alone)
    assert torch.equal(mixed[alone], images(6)[alone])
    assert lambdas[alone].tolist() == [1.0] * 4
    assert float(lambdas[~alone].max()) < 1


def loader(rank: int = 0, world_size: int = 1, labels: torch.Tensor | None = None) -> TrainLoader:
    pictures = torch.randint(0, 256, (64, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Images(pictures, torch.arange(64) % 10 if labels is None else labels, torch.arange(64))
    order = TrainOrder(seed=1, count=64, batch_size=16, rank=rank, world_size=world_size)
    augment = Augment(1, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), crop_padding=1, flip="random")
    return TrainLoader(split, order, augment, CPU, mixing=Mixing(1, mixup=0.4, cutmix=1.0))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_any_number_of_ranks_mixes_the_same(ranks: int) -> None:
    alone = next(iter(loader()))
    lambdas = [next(iter(loader(rank, ranks))) for rank in range(ranks)]
    for field in ("images", "labels", "lambdas"):
        assert torch.equal(torch.cat([getattr(batch, field) for batch in lambdas]), getattr(alone, field))


def test_unreadable_images_are_mixed_with_nothing() -> None:
    labels = torch.arange(64) % 10
    labels[:20] = UNREADABLE
    batch = next(iter(loader(labels=labels)))
    bad = batch.labels == UNREADABLE
    assert batch.lambdas is not None
    assert bool(bad.any())
    assert batch.lambdas[bad | neighbours(bad)].unique().tolist() == [1.0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_is_shared_by_hand(accumulate: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(192, 10)
    model = nn.Sequential(nn.Flatten(), linear)
    whole, labels = images(8), torch.tensor([1, 7, 3, 3, 0, 9, 5, 2])
    lambdas = torch.tensor([0.1, 0.9, 0.5, 0.25, 1.0, 0.0, 0.3, 0.6])
    logits = model(whole)
    soft = lambdas[:, None] * F.one_hot(labels, 10) + (1 - lambdas)[:, None] * F.one_hot(neighbours(labels), 10)
    expected = F.cross_entropy(logits, soft, label_smoothing=0.1)
    gradient = torch.autograd.grad(expected, linear.weight)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = create_trainer(model, optimizer, CPU, accumulate=accumulate, label_smoothing=0.1)
    before = linear.weight.detach().clone()
    trainer.run([Batch(whole, labels, torch.arange(8), lambdas)])
    torch.testing.assert_close(before - linear.weight, gradient)
    assert float(trainer.state.sums.read_and_reset()[0]) == pytest.approx(8 * float(expected), rel=1e-5)


def test_a_mixed_run_that_is_cut_ends_the_same(tmp_path: Path) -> None:
    keys = ["augment.mixup=0.2", "augment.cutmix=1.0", "schedule.name=constant", "schedule.warmup_epochs=0"]
    assert train_tiny(tmp_path / "whole", *keys, "train.epochs=2") == 0
    assert train_tiny(tmp_path / "cut", *keys, "train.epochs=1") == 0
    assert train_tiny(tmp_path / "cut", *keys, "train.epochs=2", resume=True) == 0
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")


def test_ranks_that_part_neighbours_are_refused() -> None:
    config = load_config(ROOT / "configs/quickstart.yaml", [*TINY, "augment.mixup=0.2", "train.batch_size=12"])
    check_batch_size(config, 2)
    with pytest.raises(ConfigError, match=r"train.batch_size: 12 cannot be shared by 4 ranks of .* pairs.*; 8 or 16"):
        check_batch_size(config, 4)


@pytest.mark.parametrize(("accumulate", "ranks", "fits"), [(1, 2, 4), (2, 1, 4), (2, 2, 8), (3, 1, 6), (3, 2, 12)])
def test_neighbours_share_a_micro_batch(accumulate: int, ranks: int, fits: int) -> None:
    """The least batch that is not refused, and its pairs: those of a single rank without accumulation."""
    keys = [*TINY, "augment.cutmix=1.0", f"train.accumulate={accumulate}"]
    for size in range(accumulate * ranks, fits, accumulate * ranks):
        config = load_config(ROOT / "configs/quickstart.yaml", [*keys, f"train.batch_size={size}"])
        with pytest.raises(ConfigError, match="pairs that are mixed"):
            check_batch_size(config, ranks)
    check_batch_size(load_config(ROOT / "configs/quickstart.yaml", [*keys, f"train.batch_size={fits}"]), ranks)

    def pairs(accumulate: int, ranks: int) -> set[frozenset[int]]:
        found = set()
        for rank in range(ranks):
            order = TrainOrder(seed=1, count=48, batch_size=fits, rank=rank, world_size=ranks, accumulate=accumulate)
            _, positions = next(order.batches(0))
            found |= {frozenset(pair) for pair in zip(positions.tolist(), neighbours(positions).tolist(), strict=True)}
        return found

    assert pairs(accumulate, ranks) == pairs(1, 1)


def test_an_alpha_that_mixes_all_or_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0 for none, or at least 0\.001"):
        load_config(ROOT / "configs/quickstart.yaml", ["augment.mixup=1e-6"])
