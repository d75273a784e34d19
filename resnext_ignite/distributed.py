"""Ranks: how they start, what they agree on, and every stop they make together.

All collectives of a run are called here: in the training loop only `StopAgreement.exchange`, one packed all-reduce.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

from resnext_ignite.errors import ConfigError, PreemptedError, RankError, ResnextError, as_resnext_error

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: its rank of all, and of those on its machine. The default is a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """This process's, as idist knows it."""
        return cls(idist.get_rank(), idist.get_world_size(), idist.get_local_rank(), idist.get_nproc_per_node())

    def first_on_node(self, prepare: Callable[[], None]) -> None:
        """Let one rank a machine prepare something the others then use; its failure fails all.

        idist.one_rank_first would leave the others waiting for a first one that failed.
        """
        error: ResnextError | None = None
        if self.local_rank == 0:
            try:
                prepare()
            except ResnextError as caught:
                error = caught
        # The all-reduce is the barrier too.
        failures = idist.all_reduce(int(error is not None)) if self.world_size > 1 else 0
        if error is not None:
            raise error
        if failures:
            raise RankError("another rank could not prepare the data; its line says why")

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; its failure fails all."""
        if self.world_size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except ResnextError as error:
                made[1] = error
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def gather(self, item: T) -> list[T]:
        """Every rank's item, in order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items


class StopReason(IntEnum):
    """Why a run ends before its last epoch. Where ranks differ, the largest is what happened."""

    NONE = 0
    PATIENCE = 1
    TARGET = 2
    TIME_LIMIT = 3
    SIGNAL = 4


class StopAgreement:
    """The one owner of every stop: each rank may wish for one, and all of them stop at the same iteration.

    Wishes (a signal, the time limit) are exchanged at log points, together with the training metrics. A verdict of
    an evaluation (patience, target) is the same on all ranks and holds at once. A number that is not finite comes
    with the metrics; the handler that reads them raises.

    Args:
        max_hours: wish for a stop after so many hours from now; None: never.
    """

    def __init__(self, ranks: Ranks, max_hours: float | None = None) -> None:
        self.ranks = ranks
        self.reason = StopReason.NONE
        self.signal_name = ""
        self._wish = StopReason.NONE
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours

    def wish(self, reason: StopReason) -> None:
        """Ask for a stop at the next log point; safe in a signal handler."""
        self._wish = max(self._wish, reason)

    def decide(self, reason: StopReason) -> None:
        """Stop for a reason that every rank has found by itself."""
        self.reason = max(self.reason, reason)

    def exchange(self, numbers: Tensor) -> Tensor:
        """One packed all-reduce: this rank's float64 (k,) -> all ranks' (world_size, k), and the wishes settled."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.wish(StopReason.TIME_LIMIT)
        packed = torch.zeros(self.ranks.world_size, len(numbers) + 1, dtype=torch.float64)
        packed[self.ranks.rank, :-1] = numbers
        packed[self.ranks.rank, -1] = self._wish
        if self.ranks.world_size > 1:
            # Each rank fills its own row of zeros, so that the sum is a gather, and holds minima and maxima too.
            shared = packed.to(idist.device())
            dist.all_reduce(shared)
            packed = shared.cpu()
        self.decide(StopReason(int(packed[:, -1].max())))
        return packed[:, :-1]


@contextlib.contextmanager
def stop_on_signals(stop: StopAgreement) -> Iterator[Callable[[], None]]:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C into a stop at the next log point, inside the block.

    Until the yielded function is called - before the first iteration - there is nothing to save, and a signal ends the
    start at once.

    Raises:
        PreemptedError: a signal came before anything could be saved.
    """
    running = False

    def started() -> None:
        nonlocal running
        running = True

    def on_signal(number: int, frame: object) -> None:
        stop.signal_name = signal.Signals(number).name
        stop.wish(StopReason.SIGNAL)
        if not running:
            raise PreemptedError(f"stopped by {stop.signal_name} before there was anything to save")

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield started
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wrap_for_ranks(
    model: nn.Module, device: torch.device, ranks: Ranks, *, sync_bn: bool, compiled: bool = False
) -> nn.Module:
    """The model as the training iteration calls it: itself on one rank, else in DistributedDataParallel.

    Raises:
        ConfigError: `sync_bn` on a CPU, for which torch has none.
    """
    if sync_bn:
        if device.type != "cuda":
            raise ConfigError("train.sync_bn: torch has a synchronised BatchNorm for GPUs only; set it to false")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if compiled:
        # In place: torch.compile(model) would put its own prefix before every saved key.
        model.compile()
    if ranks.world_size == 1:
        return model
    # Not idist.auto_model: one process that sees several GPUs would silently become DataParallel. Buffers stay a
    # rank's own and are averaged before they are used (`average_statistics`).
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


@torch.no_grad()
def average_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Average the running statistics of BatchNorm over all ranks, in place."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if ranks.world_size == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= ranks.world_size
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def launch(
    function: Callable[..., Any], *args: Any, nproc_per_node: int | None = None, backend: str | None = None
) -> Any:
    """Run `function(local_rank, *args)` on every rank: those a launcher (torchrun, srun) made, or spawned ones.

    Args:
        nproc_per_node: spawn so many processes here; None: this process is the only one, or one of a launcher's.
        backend: "nccl" or "gloo"; None: nccl where there is a GPU for each rank.

    Returns:
        What the function returned, or None where processes were spawned.

    Raises:
        ConfigError: processes are asked for under a launcher that makes its own.
        ResnextError: as the function's.
    """
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    if nproc_per_node is not None and world_size > 1:
        raise ConfigError(f"--nproc-per-node {nproc_per_node}: a launcher has made {world_size} processes already")
    count = nproc_per_node or world_size
    if count > 1 and backend is None:
        backend = "nccl" if torch.cuda.device_count() >= (nproc_per_node or 1) and torch.cuda.is_available() else "gloo"
    if nproc_per_node is None or nproc_per_node == 1:
        with idist.Parallel(backend=backend if world_size > 1 else None):
            return function(idist.get_local_rank(), *args)
    with idist.Parallel(backend=backend, nproc_per_node=nproc_per_node) as parallel:
        try:
            parallel.run(_in_spawned_process, function, *args)
        except mp.ProcessExitedException as error:
            # The rank has printed its line.
            sys.exit(error.exit_code if error.exit_code in (2, 3, 4, 5, 6, 7, 75) else RankError.exit_code)
    return None


def _in_spawned_process(local_rank: int, function: Callable[..., Any], *args: Any) -> None:
    try:
        function(local_rank, *args)
    except (Exception, KeyboardInterrupt) as error:
        known = as_resnext_error(error)
        if known is None or os.environ.get("RESNEXT_DEBUG") == "1":
            raise
        if not isinstance(known, RankError) and (local_rank == 0 or not isinstance(known, PreemptedError)):
            print(f"error: {known}", file=sys.stderr)
        sys.exit(known.exit_code)
