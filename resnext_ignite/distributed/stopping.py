"""Every stop of a run: one owner, and an agreement of all ranks on the iteration at which it happens.

`StopAgreement.exchange`, one packed all-reduce, is the only collective of the training loop.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from enum import IntEnum

import ignite.distributed as idist
import torch
from torch import Tensor
from torch import distributed as dist

from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runtime.console import write_from_signal_handler
from resnext_ignite.runtime.signals import (
    ENDING_SIGNALS,
    PARENT_GONE,
    describe_signal,
    exit_during_start,
    exit_on_signal,
)

_LONGEST_SILENCE_S = 5.0


class StopReason(IntEnum):
    """Why a run ends before its last epoch. Where ranks differ, the largest is what happened."""

    NONE = 0
    PATIENCE = 1
    ABANDONED = 2
    TARGET = 3
    TIME_LIMIT = 4
    SIGNAL = 5
    ORPHANED = 6
    """What started a rank, and would forward signals and start it again, is gone."""


class StopAgreement:
    """The one owner of every stop: each rank may wish for one, and all of them stop at the same iteration.

    Wishes (a signal, the time limit) are exchanged at log points, together with the training metrics. A verdict of
    an evaluation (patience, target, abandon) is the same on all ranks and holds at once. A number that is not finite
    comes with the metrics; the handler that reads them raises.

    Args:
        max_hours: wish for a stop after so many hours from now; None: never.
    """

    def __init__(self, ranks: Ranks, max_hours: float | None = None) -> None:
        self.ranks = ranks
        self.reason = StopReason.NONE
        self.signal_name = ""
        self._requested = StopReason.NONE
        self._signal = 0
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours

    @property
    def stop_requested(self) -> bool:
        """Whether this rank has asked for a stop."""
        return self._requested is not StopReason.NONE

    def request_stop(self, reason: StopReason, signal_number: int = 0) -> None:
        """Ask for a stop at the next exchange; safe in a signal handler."""
        self._requested, self._signal = max(self._requested, reason), signal_number or self._signal

    def decide(self, reason: StopReason) -> None:
        """Stop for a reason that every rank has found by itself."""
        self.reason = max(self.reason, reason)

    def exchange(self, numbers: Tensor) -> Tensor:
        """One packed all-reduce: this rank's float64 (k,) -> all ranks' (world_size, k), and the wishes settled."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.request_stop(StopReason.TIME_LIMIT)
        packed = torch.zeros(self.ranks.world_size, len(numbers) + 2, dtype=torch.float64)
        packed[self.ranks.rank, :-2] = numbers
        packed[self.ranks.rank, -2], packed[self.ranks.rank, -1] = self._requested, self._signal
        if self.ranks.world_size > 1:
            # Each rank fills its own row of zeros, so that the sum is a gather, and holds minima and maxima too.
            shared = packed.to(idist.device())
            dist.all_reduce(shared)
            packed = shared.cpu()
        self.decide(StopReason(int(packed[:, -2].max())))
        number = int(packed[:, -1].max())
        self.signal_name = signal.Signals(number).name if number else ""
        return packed[:, :-2]


class SyncSchedule:
    """When the ranks meet next: right after the start, whose speed nobody knows yet, then about every five seconds.

    Each exchange fixes the next, from the slowest rank's clock, so that all ranks come to it at the same position: an
    iteration of training, or a batch of an evaluation.
    """

    def __init__(self, stop: StopAgreement) -> None:
        self.stop = stop
        self._stride = 1
        self.start(0)

    def start(self, position: int) -> None:
        """Begin, or go on after something else than what is paced took its time."""
        self._last, self._next, self._since = position, position + self._stride, time.monotonic()

    def due(self, position: int) -> bool:
        """Whether the ranks meet at this position at the latest; a single rank heeds its own wish at once."""
        return position >= self._next or (self.stop.ranks.world_size == 1 and self.stop.stop_requested)

    def exchange(self, position: int, numbers: Tensor) -> Tensor:
        """As StopAgreement.exchange: float64 (k,) -> (world_size, k + 1), the seconds since the last exchange last."""
        elapsed = torch.tensor([time.monotonic() - self._since], dtype=torch.float64)
        gathered = self.stop.exchange(torch.cat([numbers, elapsed]))
        slowest = max(gathered[:, -1].max().item(), 1e-9)
        self._stride = max(1, int(_LONGEST_SILENCE_S / slowest * max(1, position - self._last)))
        self.start(position)
        return gathered


@contextlib.contextmanager
def stop_on_signals(stop: StopAgreement) -> Iterator[Callable[[], None]]:
    """Turn SIGTERM, SIGUSR1, SIGHUP and Ctrl-C into a stop at the next exchange, inside the block.

    Until the yielded function is called - before the first iteration - there is nothing to save, and a signal ends the
    start at once. Any further signal changes nothing. The signal by which a rank hears of its parent's death
    (`signals.PARENT_GONE`) is no wish of the user's: it saves too, but the ranks have failed.

    Raises:
        KeyboardInterrupt: a signal came before anything could be saved (`errors.as_resnext_error` makes exit 75 of it).
    """
    running, heard = False, False

    def started() -> None:
        nonlocal running
        running = True

    def on_signal(number: int, frame: object) -> None:
        nonlocal heard
        if number == PARENT_GONE:
            stop.request_stop(StopReason.ORPHANED)
        if heard:
            return
        heard = True
        stop.request_stop(StopReason.SIGNAL, number)
        if not running:
            exit_during_start(number, frame)
        if stop.ranks.rank == 0:
            write_from_signal_handler(f"stopped by {describe_signal(number)}: saving, then leaving")

    before = {number: signal.signal(number, on_signal) for number in ENDING_SIGNALS}
    try:
        yield started
    finally:
        heard = True
        for number, handler in before.items():
            # A process that is a run and nothing else is on its way out: a late signal must not change its exit code.
            if handler not in (exit_during_start, exit_on_signal):
                signal.signal(number, handler)
