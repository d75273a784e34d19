"""The order of an epoch whose images lie in groups: a pure function, a few groups at a time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from resnext_ignite.data.sampling import Purpose, TrainOrder, permutation

GROUPS = torch.arange(6).repeat_interleave(torch.tensor([4, 3, 5, 4, 2, 6]))


def order_of(window: int, groups: Tensor = GROUPS, **values: Any) -> TrainOrder:
    return TrainOrder(
        **{"seed": 3, "count": len(groups), "batch_size": 4, "groups": groups, "window": window, **values}
    )


def test_an_order_by_hand() -> None:
    # Three groups of two images. Their order and that of the images, sorted by the keyed hash, are taken as given.
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    by_group = permutation(3, 1, 3, Purpose.SHARDS).tolist()
    by_image = permutation(3, 1, 6, Purpose.ORDER).tolist()
    expected = []
    for window in ([by_group[0], by_group[1]], [by_group[2]]):
        expected += [image for image in by_image if image // 2 in window]
    assert order_of(2, groups).epoch_order(1).tolist() == expected


@pytest.mark.parametrize("window", [1, 2, 4, 5])
def test_an_epoch_holds_each_image_once_and_a_window_only_its_groups(window: int) -> None:
    order = order_of(window)
    seen = []
    for epoch in (1, 2, 3):
        images = order.epoch_order(epoch)
        assert sorted(images.tolist()) == list(range(24))
        by_group = permutation(3, epoch, 6, Purpose.SHARDS)
        start = 0
        for chosen in by_group.split(window):
            size = int(sum((group == GROUPS).sum() for group in chosen))
            assert set(GROUPS[images[start : start + size]].tolist()) == set(chosen.tolist())
            start += size
        seen.append(images.tolist())
    assert len({tuple(images) for images in seen}) == 3


@pytest.mark.parametrize("window", [6, 7, 1000])
def test_a_window_of_all_groups_shuffles_as_without_groups(window: int) -> None:
    assert torch.equal(order_of(window).epoch_order(2), permutation(3, 2, 24, Purpose.ORDER))


def test_images_in_a_window_are_shuffled_across_its_groups() -> None:
    groups = torch.arange(4).repeat_interleave(500)
    first = groups[order_of(2, groups).epoch_order(1)[:1000]]
    # Of 1000 places, half change the group if both are evenly mixed; 16 is the standard deviation, 1 in a sorted list.
    assert abs(int((first[1:] != first[:-1]).sum()) - 500) < 80


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_each_batch_and_a_cut_order_goes_on(ranks: int) -> None:
    def taken(start: int, **values: Any) -> list[list[int]]:
        return [
            positions.tolist() for _, positions in itertools.islice(order_of(2, **values).batches(start), 20 - start)
        ]

    whole = taken(0)
    parts = [taken(0, rank=rank, world_size=ranks) for rank in range(ranks)]
    for iteration, images in enumerate(whole):
        assert [image for part in parts for image in part[iteration]] == images
    for cut in range(20):
        assert taken(cut) == whole[cut:]


def test_groups_without_an_image_change_nothing_but_their_window() -> None:
    # As where a held-out split takes all of a shard: group 1 is empty, and its place in a window with it.
    groups = torch.tensor([0, 0, 2, 2, 2])
    assert sorted(order_of(1, groups).epoch_order(1).tolist()) == [0, 1, 2, 3, 4]


def test_groups_are_announced_once_an_epoch_before_they_are_needed() -> None:
    groups = torch.arange(40).repeat_interleave(10)
    order = order_of(4, groups, batch_size=5)
    announced = list(itertools.islice(order.groups_ahead(0), 160))
    needed = [set(groups[positions].tolist()) for _, positions in itertools.islice(order.batches(0), 160)]
    assert max(map(len, announced)) <= 2
    for epoch in (announced[:80], announced[80:]):
        assert sorted(group for part in epoch for group in part) == list(range(40))
    late = 0
    told: set[int] = set()
    for soon, now in zip(announced[:80], needed[:80], strict=True):
        late += len(now - told)
        told |= set(soon)
        # No more than two windows ahead of what is being read.
        assert len(told) <= 4 * (1 + len(set().union(*needed[: needed.index(now) + 1]))) + 4
    # Only in the first batches of an epoch, which nothing comes before.
    assert late <= 8
    # Cut in the middle of an epoch, the window that is being read is announced again.
    again = list(itertools.islice(order.groups_ahead(40), 40))
    assert set(order._group_order(1)[20:].tolist()) <= {group for part in again for group in part}
