"""Keyed randomness: the order of an epoch from (seed, epoch), a number of a sample from (seed, epoch, index, purpose).

A counter-based hash in place of generators: no hidden state, so that neither workers nor ranks nor a cut run can
change what is drawn. All of it is int64 arithmetic, exact and equal on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 2**64 - 1
# The mixing constants and shifts of splitmix64 (Steele, Lea and Flood, 'Fast splittable pseudorandom number
# generators', OOPSLA 2014; finalizer variant 13 of D. Stafford).
_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


class Purpose(IntEnum):
    """What a number is drawn for. Values are part of a run's identity: add at the end, never renumber."""

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
    LIGHTING = 13  # and 14, 15, 16: pairs for two normal variates each
    RESIZED_CROP = 20  # to 59: ten attempts of four numbers
    MIX_KIND = 60
    MIX_SHARE = 61
    MIX_Y = 62
    MIX_X = 63
    ERASE = 64  # to 68: whether, area, aspect, top, left
    TRIVIAL = 70  # to 72: operation, strength, sign
    PACKED = 75
    SHARDS = 76
    SHAPES = 100  # to 199


def _signed(value: int) -> int:
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def _mix_int(value: int) -> int:
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK
    return value ^ (value >> 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    # int64 shifts keep the sign; a hash wants zeros.
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def keyed_hash(seed: int, epoch: int, indices: Tensor, purpose: int) -> Tensor:
    """64 uniform bits for each index: int64 (N,) -> int64 (N,), on the indices' device."""
    key = _mix_int(_mix_int(_mix_int(seed) ^ epoch) ^ purpose)
    values = indices * _signed(_GAMMA) + _signed(key)
    values = (values ^ _shift_right(values, 30)) * _signed(_MIX1)
    values = (values ^ _shift_right(values, 27)) * _signed(_MIX2)
    return values ^ _shift_right(values, 31)


def uniform(seed: int, epoch: int, indices: Tensor, purpose: int) -> Tensor:
    """A number in [0, 1) for each index, in steps of 2**-24: int64 (N,) -> float32 (N,)."""
    return _shift_right(keyed_hash(seed, epoch, indices, purpose), 40).to(torch.float32) * 2.0**-24


def integers(seed: int, epoch: int, indices: Tensor, purpose: int, below: int) -> Tensor:
    """A whole number in [0, below) for each index: int64 (N,) -> int64 (N,)."""
    # 40 bits: for `below` under 2**16 no value is favoured by more than 2**-24.
    return _shift_right(keyed_hash(seed, epoch, indices, purpose), 24) % below


def permutation(seed: int, epoch: int, count: int, purpose: int, device: torch.device | str = "cpu") -> Tensor:
    """A keyed order of 0 .. count-1: int64 (count,)."""
    keys = keyed_hash(seed, epoch, torch.arange(count, device=device), purpose)
    return keys.argsort(stable=True)


def rank_slice(count: int, rank: int, world_size: int) -> range:
    """The contiguous run of 0 .. count-1 that a rank takes: all runs together hold each number once."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


class TrainOrder:
    """Which images each iteration sees on this rank, without end: position k is a function of (seed, k) alone.

    Args:
        seed: key of the order.
        count: training images; an epoch drops the incomplete last batch.
        batch_size: images an iteration, over all ranks.
        rank, world_size: this rank takes a contiguous run of each micro-batch.
        accumulate: micro-batches, contiguous runs of a global batch.
        device: where the orders are computed.
        groups: int64 (count,), the group (from 0) of each image, one that is read at once: groups come in a keyed
            order, `window` of them at a time, whose images are shuffled together; None: all images are.
        window: groups.

    Raises:
        ValueError: an epoch would hold no batch, or the ranks cannot share one evenly.
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
                f"a batch of {batch_size} images cannot be shared evenly by {world_size} ranks of {accumulate} "
                "micro-batches"
            )
        if count < batch_size:
            raise ValueError(f"{count} training images hold no batch of {batch_size}")
        self.seed, self.count, self.batch_size, self.device = seed, count, batch_size, device
        self.accumulate, self.share = accumulate, rank_slice(batch_size // accumulate, rank, world_size)
        self.iterations_per_epoch = count // batch_size
        self.groups, self.window = None if groups is None else groups.to(device), window

    def batches(self, start_iteration: int) -> Iterator[tuple[int, Tensor]]:
        """(epoch from 1, positions int64 (n,)) of every iteration after the first `start_iteration`."""
        epoch, first = divmod(start_iteration, self.iterations_per_epoch)
        while True:
            epoch += 1
            order = self.epoch_order(epoch)
            for index in range(first, self.iterations_per_epoch):
                batch = order[index * self.batch_size : (index + 1) * self.batch_size]
                # (accumulate * m,) -> (accumulate, m), and a run of each: the same BatchNorm on any number of ranks.
                yield epoch, batch.view(self.accumulate, -1)[:, self.share.start : self.share.stop].flatten()
            first = 0

    def epoch_order(self, epoch: int) -> Tensor:
        """The images of an epoch (from 1), those that its incomplete last batch would hold included: int64 (count,)."""
        order = permutation(self.seed, epoch, self.count, Purpose.ORDER, self.device)
        if self.groups is None:
            return order
        windows = self._group_order(epoch).argsort() // self.window
        # A stable sort leaves the images of a window in their keyed order.
        return order[windows[self.groups[order]].argsort(stable=True)]

    def _group_order(self, epoch: int) -> Tensor:
        groups = 0 if self.groups is None else int(self.groups.max()) + 1
        return permutation(self.seed, epoch, groups, Purpose.SHARDS, self.device)

    def announcements(self, start_iteration: int) -> Iterator[list[int]]:
        """Beside each of `batches`: groups that will be needed soon, a window or so ahead, each once an epoch.

        A few at a time, so that no process that is told of them is kept from its batch for long. They are told as if
        all groups were alike: a hint, no promise.
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
