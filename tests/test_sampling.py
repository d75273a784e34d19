"""Keyed randomness: against the published mixer, and independent of ranks and of where a run is cut."""

from __future__ import annotations

import pytest
import torch

from resnext_ignite.data.sampling import (
    Purpose,
    TrainOrder,
    integers,
    keyed_hash,
    permutation,
    rank_slice,
    uniform,
)

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The published generator's next value, in plain integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_mixer_is_splitmix64() -> None:
    # First outputs of the reference implementation for seed 1234567.
    assert splitmix64(1234567) == 6457827717110365317
    key = splitmix64(splitmix64(splitmix64(7) ^ 3) ^ 5)
    for index in (0, 1, 2**40, -1):
        # The tensor version adds index * gamma to the key, where splitmix64 itself adds one gamma more.
        state = (key + (index - 1) * 0x9E3779B97F4A7C15) & MASK
        assert int(keyed_hash(7, 3, torch.tensor([index]), 5).item()) & MASK == splitmix64(state)


def test_numbers_are_uniform_and_differ_by_key() -> None:
    indices = torch.arange(100_000)
    draws = uniform(1, 2, indices, Purpose.FLIP)
    assert draws.min().item() >= 0
    assert draws.max().item() < 1
    counts = torch.histc(draws, 100, 0, 1)
    # Chi-square with 99 degrees of freedom: above 160 in fewer than 1 of 10,000 draws.
    assert ((counts - 1000) ** 2 / 1000).sum().item() < 160
    for other in (
        uniform(2, 2, indices, Purpose.FLIP),
        uniform(1, 3, indices, Purpose.FLIP),
        uniform(1, 2, indices, 7),
    ):
        assert abs(torch.corrcoef(torch.stack([draws, other]))[0, 1].item()) < 0.02


def test_integers_cover_their_range_evenly() -> None:
    counts = torch.bincount(integers(1, 1, torch.arange(90_000), Purpose.CROP_X, 9), minlength=9)
    assert len(counts) == 9
    assert counts.min().item() > 9_600


def test_an_order_holds_each_image_once_and_changes_with_the_epoch() -> None:
    first, second = permutation(1, 1, 1000, Purpose.ORDER), permutation(1, 2, 1000, Purpose.ORDER)
    assert first.sort().values.tolist() == list(range(1000))
    assert (first == second).sum().item() < 10


@pytest.mark.parametrize("count", [0, 1, 7, 257])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_every_image_exactly_once(count: int, ranks: int) -> None:
    shares = [rank_slice(count, rank, ranks) for rank in range(ranks)]
    assert [index for share in shares for index in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def batches(order: TrainOrder, start: int, end: int) -> list[tuple[int, list[int]]]:
    source = order.batches(start)
    return [(epoch, positions.tolist()) for epoch, positions in (next(source) for _ in range(end - start))]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_iteration_sees_the_same_images_on_any_number_of_ranks(ranks: int) -> None:
    alone = batches(TrainOrder(seed=3, count=50, batch_size=8), 0, 15)
    shared = [
        batches(TrainOrder(seed=3, count=50, batch_size=8, rank=rank, world_size=ranks), 0, 15) for rank in range(ranks)
    ]
    for iteration, (epoch, images) in enumerate(alone):
        assert {parts[iteration][0] for parts in shared} == {epoch}
        # In order: a rank's share is a contiguous run.
        assert [image for parts in shared for image in parts[iteration][1]] == images


def test_a_cut_run_goes_on_with_the_same_images() -> None:
    order = TrainOrder(seed=3, count=50, batch_size=8)
    whole = batches(order, 0, 20)
    for cut in range(20):
        assert batches(order, cut, 20) == whole[cut:]


def test_an_epoch_drops_its_incomplete_batch_only() -> None:
    order = TrainOrder(seed=3, count=50, batch_size=8)
    assert order.iterations_per_epoch == 6
    seen = [image for _, images in batches(order, 0, 6) for image in images]
    assert len(set(seen)) == 48


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide evenly over 3 ranks"):
        TrainOrder(seed=1, count=50, batch_size=8, world_size=3)
    with pytest.raises(ValueError, match="fewer than a batch of 8"):
        TrainOrder(seed=1, count=7, batch_size=8)
