"""Stops a run early: all ranks agree on the iteration at which they stop.

`StopAgreement.exchange` is a single all-reduce. The only other collectives of a training iteration without a save or an
evaluation are those of DDP and SyncBatchNorm.
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

_EXCHANGE_INTERVAL_S = 5.0


class StopReason(IntEnum):
    """The reason why a run ends before its last epoch. If ranks have different reasons, the largest value counts."""

    NONE = 0
    PATIENCE = 1
    ABANDONED = 2
    TARGET = 3
    TIME_LIMIT = 4
    SIGNAL = 5
    ORPHANED = 6
    """The process that started a rank is gone: nothing forwards signals to this rank or restarts it any more."""


class StopAgreement:
    """Makes all ranks stop at the same iteration; each rank may request a stop.

    `exchange` sends the requests (a signal, the time limit) to all ranks; in training, it sends the metrics in the same
    all-reduce. Two kinds of stops need no request. The result of an evaluation is the same on all ranks; if it ends the
    run (patience, target, abandon), all ranks stop immediately. If a loss or gradient is not finite, all ranks find
    this in the exchanged metrics, and the log point of each rank raises the error.

    Args:
        max_hours: request a stop this many hours from now; None: never.
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
        """Return whether this rank has requested a stop."""
        return self._requested is not StopReason.NONE

    def request_stop(self, reason: StopReason, signal_number: int = 0) -> None:
        """Request a stop at the next exchange; safe in a signal handler."""
        self._requested, self._signal = max(self._requested, reason), signal_number or self._signal

    def decide(self, reason: StopReason) -> None:
        """Set the reason to stop; every rank must call this at the same iteration."""
        self.reason = max(self.reason, reason)

    def exchange(self, numbers: Tensor) -> Tensor:
        """Combine the stop requests of all ranks, and gather `numbers` in the same all-reduce.

        Args:
            numbers: float64 (k,).

        Returns:
            The numbers of all ranks, float64 (world_size, k), on every rank.
        """
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.request_stop(StopReason.TIME_LIMIT)
        packed = torch.zeros(self.ranks.world_size, len(numbers) + 2, dtype=torch.float64)
        packed[self.ranks.rank, :-2] = numbers
        packed[self.ranks.rank, -2], packed[self.ranks.rank, -1] = self._requested, self._signal
        if self.ranks.world_size > 1:
            # Each rank fills only its own row; the all-reduce adds zeros to it. The caller can take a sum, a minimum or
            # a maximum over the rows.
            shared = packed.to(idist.device())
            dist.all_reduce(shared)
            packed = shared.cpu()
        self.decide(StopReason(int(packed[:, -2].max())))
        number = int(packed[:, -1].max())
        self.signal_name = signal.Signals(number).name if number else ""
        return packed[:, :-2]


class SyncSchedule:
    """Schedules the exchanges, about one every five seconds.

    A position is the number of an iteration in training, or of a batch in an evaluation. The first exchange comes one
    position after the start, to measure the speed. Each exchange gathers the elapsed time of all ranks, and computes
    the position of the next exchange from the longest one. Therefore, all ranks compute the same position.
    """

    def __init__(self, stop: StopAgreement) -> None:
        self.stop = stop
        self._stride = 1
        self.start(0)

    def start(self, position: int) -> None:
        """Start the clock at a position.

        Call this again after other work, such as an evaluation, so that the clock does not include this work.
        """
        self._last, self._next, self._since = position, position + self._stride, time.monotonic()

    def due(self, position: int) -> bool:
        """Return whether an exchange is due at this position. With a single rank, a stop request also makes it due."""
        return position >= self._next or (self.stop.ranks.world_size == 1 and self.stop.stop_requested)

    def exchange(self, position: int, numbers: Tensor) -> Tensor:
        """Exchange `numbers` and the seconds since the last exchange (StopAgreement.exchange); schedule the next one.

        Args:
            numbers: float64 (k,).

        Returns:
            The numbers of all ranks, float64 (world_size, k + 1), on every rank; the last column holds the seconds.
        """
        elapsed = torch.tensor([time.monotonic() - self._since], dtype=torch.float64)
        gathered = self.stop.exchange(torch.cat([numbers, elapsed]))
        slowest = max(gathered[:, -1].max().item(), 1e-9)
        self._stride = max(1, int(_EXCHANGE_INTERVAL_S / slowest * max(1, position - self._last)))
        self.start(position)
        return gathered


@contextlib.contextmanager
def stop_on_signals(stop: StopAgreement) -> Iterator[Callable[[], None]]:
    """Inside the `with` block, turn SIGTERM, SIGUSR1, SIGHUP and Ctrl-C into a request to stop at the next exchange.

    The caller must call the yielded function before the first iteration. Before this call there is nothing to save, and
    a signal ends the process immediately. After the first stop signal, further stop signals have no effect. The death
    of the parent process (`signals.PARENT_GONE`) also stops and saves the run, but it counts as a failure of the ranks,
    not as a request by the user.

    Raises:
        KeyboardInterrupt: a signal came before there was anything to save (`errors.as_resnext_error` turns this error
            into a PreemptedError, exit code 75).
    """
    running, signal_received = False, False

    def started() -> None:
        nonlocal running
        running = True

    def on_signal(number: int, frame: object) -> None:
        nonlocal signal_received
        if number == PARENT_GONE:
            stop.request_stop(StopReason.ORPHANED)
        if signal_received:
            return
        signal_received = True
        stop.request_stop(StopReason.SIGNAL, number)
        if not running:
            exit_during_start(number, frame)
        if stop.ranks.rank == 0:
            write_from_signal_handler(f"stopped by {describe_signal(number)}: saving, then exiting")

    before = {number: signal.signal(number, on_signal) for number in ENDING_SIGNALS}
    try:
        yield started
    finally:
        signal_received = True
        for number, handler in before.items():
            # If the previous handler belongs to the start of a command, keep `on_signal`, which now ignores stop
            # signals: the process is about to exit, and a late signal must not change its exit code.
            if handler not in (exit_during_start, exit_on_signal):
                signal.signal(number, handler)
