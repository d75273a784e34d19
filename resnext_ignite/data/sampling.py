"""Computes random numbers, and the order of the training images in each epoch.

A random number depends only on (seed, epoch, index, purpose). It comes from a counter-based hash, not from a random
generator. The hash has no state, so the numbers are the same with any number of workers and ranks, and in a resumed
run. It uses only int64 arithmetic, which gives the same result on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 2**64 - 1
# Constants and shifts of splitmix64 (Steele, Lea and Flood, 'Fast splittable pseudorandom number
# generators', OOPSLA 2014; finalizer variant 13 of D. Stafford).
_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


class Purpose(IntEnum):
    """The purpose of a random number. Each value selects a separate stream of random numbers.

    Add new values, but never change an existing value: the results of a run would change.
    """

    ORDER = 1
    HELD_OUT = 2
    SUBSET = 3
    CROP_Y = 4
    CROP_X = 5
    FLIP = 6
    CUTOUT_Y = 7
    CUTOUT_X = 8
    BRIGHTNESS = 9
    CONTRAST = 10
    SATURATION = 11
    COLOR_ORDER = 12
    LIGHTING = 13  # 13 to 16: two pairs of uniform numbers; each pair gives two normal numbers
    RESIZED_CROP = 20  # 20 to 59: ten attempts, four numbers each
    MIX_KIND = 60
    MIX_LAMBDA = 61
    MIX_Y = 62
    MIX_X = 63
    ERASE = 64  # 64 to 68: decision, area, aspect ratio, top, left
    TRIVIAL = 70  # 70 to 72: operation, strength, sign
    PACKED = 75
    SHARDS = 76
    SHAPES = 100  # 100 to 199


def _signed(value: int) -> int:
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def _mix_int(value: int) -> int:
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK
    return value ^ (value >> 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    # A right shift of int64 fills the upper bits with the sign bit; the hash needs zeros there.
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def keyed_hash(seed: int, epoch: int, indices: Tensor, purpose: int) -> Tensor:
    """Return 64 random bits for each index: int64 (N,) -> int64 (N,), on the device of `indices`."""
    key = _mix_int(_mix_int(_mix_int(seed) ^ epoch) ^ purpose)
    values = indices * _signed(_GAMMA) + _signed(key)
    values = (values ^ _shift_right(values, 30)) * _signed(_MIX1)
    values = (values ^ _shift_right(values, 27)) * _signed(_MIX2)
    return values ^ _shift_right(values, 31)


def uniform(seed: int, epoch: int, indices: Tensor, purpose: int) -> Tensor:
    """Return a uniform number in [0, 1) for each index, a multiple of 2**-24: int64 (N,) -> float32 (N,)."""
    return _shift_right(keyed_hash(seed, epoch, indices, purpose), 40).to(torch.float32) * 2.0**-24


def integers(seed: int, epoch: int, indices: Tensor, purpose: int, below: int) -> Tensor:
    """Return a uniform integer in [0, below) for each index: int64 (N,) -> int64 (N,)."""
    # Use 40 bits: if `below` is under 2**16, the probabilities of the integers differ by a factor below 1 + 2**-24.
    return _shift_right(keyed_hash(seed, epoch, indices, purpose), 24) % below


def permutation(seed: int, epoch: int, count: int, purpose: int, device: torch.device | str = "cpu") -> Tensor:
    """Return a random order of 0 .. count-1 that depends only on the arguments: int64 (count,)."""
    keys = keyed_hash(seed, epoch, torch.arange(count, device=device), purpose)
    return keys.argsort(stable=True)


def rank_slice(count: int, rank: int, world_size: int) -> range:
    """Return a rank's contiguous slice of 0 .. count-1. Each number is in the slice of exactly one rank."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


class TrainOrder:
    """Selects the images of each iteration on this rank, in an endless sequence of epochs.

    The images of iteration k depend only on k and the arguments below, so a run can resume at any iteration.

    Args:
        seed: random seed of the order.
        count: number of training images; an epoch drops the incomplete last batch.
        batch_size: images per iteration, over all ranks.
        rank, world_size: this rank takes a contiguous slice of each micro-batch.
        accumulate: micro-batches per iteration, each a contiguous slice of the global batch.
        device: the device on which the random order of the images is computed.
        groups: int64 (count,), the group (from 0) of each image, for example its shard; None: shuffle all images
            together. In each epoch, the groups come in a new random order. This order is divided into windows of
            consecutive groups, and the images in each window are shuffled together.
        window: number of groups per window.

    Raises:
        ValueError: an epoch would hold no batch, or a batch does not divide evenly over ranks and micro-batches.
    """

    def __init__(
        self,
        *,
        seed: int,
        count: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        device: torch.device | str = "cpu",
        groups: Tensor | None = None,
        window: int = 1,
    ) -> None:
        if batch_size % (world_size * accumulate):
            raise ValueError(
                f"a batch of {batch_size} images does not divide evenly over {world_size} ranks with {accumulate} "
                "micro-batches"
            )
        if count < batch_size:
            raise ValueError(f"{count} training images are fewer than a batch of {batch_size}")
        self.seed, self.count, self.batch_size, self.device = seed, count, batch_size, device
        self.accumulate, self.share = accumulate, rank_slice(batch_size // accumulate, rank, world_size)
        self.iterations_per_epoch = count // batch_size
        self.groups, self.window = None if groups is None else groups.to(device), window

    def batches(self, start_iteration: int) -> Iterator[tuple[int, Tensor]]:
        """Skip the first `start_iteration` iterations; yield (epoch, positions) for each later iteration.

        The epoch counts from 1. `positions`, int64 (n,), are the positions of this rank's images in the split.
        """
        epoch, first = divmod(start_iteration, self.iterations_per_epoch)
        while True:
            epoch += 1
            order = self.epoch_order(epoch)
            for index in range(first, self.iterations_per_epoch):
                batch = order[index * self.batch_size : (index + 1) * self.batch_size]
                # (accumulate * m,) -> (accumulate, m): each row is a micro-batch. Take this rank's slice of each row:
                # this way, each micro-batch and ghost batch consists of the same images on any number of ranks.
                yield epoch, batch.view(self.accumulate, -1)[:, self.share.start : self.share.stop].flatten()
            first = 0

    def epoch_order(self, epoch: int) -> Tensor:
        """Return the order of all images in an epoch (from 1): int64 (count,).

        The last images of the order, which do not fill a batch, are included; `batches` drops them.
        """
        order = permutation(self.seed, epoch, self.count, Purpose.ORDER, self.device)
        if self.groups is None:
            return order
        windows = self._group_order(epoch).argsort() // self.window
        # The sort is stable: inside a window, the images keep their random order.
        return order[windows[self.groups[order]].argsort(stable=True)]

    def _group_order(self, epoch: int) -> Tensor:
        groups = 0 if self.groups is None else int(self.groups.max()) + 1
        return permutation(self.seed, epoch, groups, Purpose.SHARDS, self.device)

    def groups_ahead(self, start_iteration: int) -> Iterator[list[int]]:
        """For each item of `batches`, yield a list of the groups to read ahead.

        Each group is listed once per epoch, about `window` groups before its images are needed. Each list is short, so
        that reading ahead does not delay a worker's batch for long. The lists are only a hint: they assume that all
        groups hold the same number of images.
        """
        epoch, first = divmod(start_iteration, self.iterations_per_epoch)
        while True:
            epoch += 1
            order = self._group_order(epoch).tolist()
            at_once = 1 + -(-len(order) // self.iterations_per_epoch)
            told = first * len(order) // self.iterations_per_epoch // self.window * self.window
            for index in range(first, self.iterations_per_epoch):
                needed = (index + 1) * len(order) // self.iterations_per_epoch + self.window
                upto = min(needed, told + at_once, len(order))
                yield order[told:upto]
                told = upto
            first = 0
