"""Random erasing: torchvision's boxes in distribution, zero where they lie, by the picture's key alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomErasing

from resnext_ignite.data.augment import erasing
from resnext_ignite.data.augment.chain import Augment, cut_out
from resnext_ignite.data.augment.erasing import random_boxes

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def boxes(count: int, height: int = 32, width: int = 32, probability: float = 1.0, epoch: int = 1) -> Tensor:
    """Top, left, height, width: int64 (count, 4)."""
    return torch.stack(random_boxes(0, epoch, torch.arange(count), height, width, probability), dim=1)


def largest_gap(ours: Tensor, theirs: Tensor) -> float:
    """The Kolmogorov-Smirnov statistic: the largest gap between two samples' distribution functions."""
    places = torch.cat([ours, theirs]).unique()
    shares = [
        torch.searchsorted(sample.sort().values, places, right=True).double() / len(sample) for sample in (ours, theirs)
    ]
    return float((shares[0] - shares[1]).abs().max())


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 56)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    count = 4000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blank = torch.zeros(3, height, width)
        drawn = [RandomErasing.get_params(blank, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(count)]
    theirs, ours = torch.tensor(drawn), boxes(count, height, width)
    for column in range(4):
        # A gap of 1.95 * sqrt(2 / n) is met once in a thousand times where they are the same.
        assert largest_gap(ours[:, column], theirs[:, column]) < 1.95 * (2 / count) ** 0.5
    areas = [sample[:, 2] * sample[:, 3] for sample in (ours, theirs)]
    assert largest_gap(*areas) < 1.95 * (2 / count) ** 0.5


def test_a_box_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 x 100 pixels: the first attempt is too tall, the second is taken.

    sqrt(0.33 * 1e4 * 3.3) = 104 pixels do not fit. With the draws 0, 0.5 the area is 0.02 and the aspect the geometric
    mean of 0.3 and 3.3, 0.995: sqrt(200 * 0.995) = 14.1 by sqrt(200 / 0.995) = 14.2 pixels. At 0.25 and 0.75 of the 87
    places down and across they begin at 21 and 65.
    """
    draws = {0: [0.0], 1: [1 - 2.0**-24, 0.0], 2: [1 - 2.0**-24, 0.5], 3: [0.0, 0.25], 4: [0.0, 0.75]}

    def scripted(seed: int, epoch: int, keys: Tensor, purpose: int) -> Tensor:
        values = draws[purpose - 64]
        return torch.tensor(values + values[-1:] * (keys.numel() - len(values))).reshape(keys.shape)

    monkeypatch.setattr(erasing, "uniform", scripted)
    assert boxes(1, 100, 100).tolist() == [[21, 65, 14, 14]]


def test_what_never_fits_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(seed: int, epoch: int, keys: Tensor, purpose: int) -> Tensor:
        return torch.full(keys.shape, 0.0 if purpose == 64 else 1 - 2.0**-24)

    monkeypatch.setattr(erasing, "uniform", largest)
    assert boxes(2, 100, 100).tolist() == [[0, 0, 0, 0]] * 2


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_as_often_as_it_is_asked_for(probability: float) -> None:
    erased = boxes(20_000, probability=probability)[:, 2] > 0
    # Four standard deviations of a binomial share.
    assert abs(float(erased.double().mean()) - probability) <= 4 * (probability * (1 - probability) / 20_000) ** 0.5
    assert bool(erased.all()) == (probability == 1)


def test_a_box_depends_on_its_key_alone() -> None:
    whole = boxes(100, probability=0.5)
    part = torch.arange(100).flip(0)[::3]
    again = torch.stack(random_boxes(0, 1, part, 32, 32, 0.5), dim=1)
    assert torch.equal(again, whole[part])
    assert not torch.equal(boxes(100, probability=0.5, epoch=2), whole)


def test_cut_out_takes_a_box_for_each_image() -> None:
    top, left, height, width = torch.tensor([[1, 0, 2, 3], [0, 0, 0, 0]]).unbind(1)
    out = cut_out(torch.ones(2, 4, 4, 3), top, left, height, width)
    expected = torch.ones(4, 4)
    expected[1:3, 0:3] = 0
    assert torch.equal(out[0], expected[..., None].expand(4, 4, 3))
    assert bool((out[1] == 1).all())


def test_it_erases_what_was_normalised() -> None:
    pictures = torch.randint(1, 256, (50, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    indices = torch.arange(50) * 7
    plain = Augment(seed=2, mean=MEAN, std=STD)(pictures, torch.arange(50), 4, indices)
    erased = Augment(seed=2, mean=MEAN, std=STD, erasing=0.5)(pictures, torch.arange(50), 4, indices)
    for number, (top, left, height, width) in enumerate(zip(*random_boxes(2, 4, indices, 16, 16, 0.5), strict=True)):
        expected = plain[number].clone()
        expected[:, top : top + height, left : left + width] = 0
        assert torch.equal(erased[number], expected)
    assert 0 < int((erased != plain).any(1).flatten(1).any(1).sum()) < 50
