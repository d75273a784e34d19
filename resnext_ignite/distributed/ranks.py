"""Defines `Ranks`: the rank of this process, and the collectives for start-up, evaluation and saving."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ignite.distributed as idist
from torch import distributed as dist

from resnext_ignite.distributed.environment import launched_by_srun
from resnext_ignite.runtime.errors import RankError, ResnextError, as_resnext_error

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The position of this process among all ranks and among the ranks of its machine. The defaults mean one rank."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Return the `Ranks` of this process, as `ignite.distributed` reports them."""
        return cls(idist.get_rank(), idist.get_world_size(), idist.get_local_rank(), idist.get_nproc_per_node())

    def cores(self) -> int:
        """Return how many cores this rank may use.

        If Slurm has bound the rank to some of the machine's cores, it may use all of these cores. Otherwise, the ranks
        of a machine divide its available cores equally.
        """
        own = len(os.sched_getaffinity(0))
        bound = launched_by_srun() and own < (os.cpu_count() or own)
        return own if bound else max(1, own // self.local_world_size)

    def placement(self) -> str:
        """Return a phrase for the log with the number of ranks, their hosts and the backend; call this on all ranks."""
        if self.world_size == 1:
            return "1 rank"
        hosts = Counter(self.gather(socket.gethostname()))
        places = ", ".join(f"{host}: {count}" for host, count in hosts.items())
        return f"{self.world_size} ranks ({places}; {dist.get_backend()})"

    def first_on_node(self, prepare: Callable[[], None]) -> None:
        """Call `prepare` on one rank per machine; the other ranks wait. If one call fails, all ranks raise an error.

        idist.one_rank_first is not used: if the first rank failed, the other ranks would wait for ever.

        Raises:
            ResnextError: on the rank that failed, its own error; on the other ranks, RankError.
        """
        error = _result_or_error(prepare)[1] if self.local_rank == 0 else None
        # The all-reduce is also the barrier.
        failures = idist.all_reduce(int(error is not None)) if self.world_size > 1 else 0
        if error is not None:
            raise error
        if failures:
            raise RankError("another rank could not prepare the data; its error says why")

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0, and return its result on every rank.

        Raises:
            ResnextError: `make` failed; every rank raises the same error.
        """
        if self.world_size == 1:
            return make()
        made: list[Any] = [*_result_or_error(make)] if self.rank == 0 else [None, None]
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def gather(self, item: T) -> list[T]:
        """Return the items of all ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def gather_on_rank_zero(self, item: T) -> list[T]:
        """Return the items of all ranks, in rank order, on rank 0; return an empty list on the other ranks."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(item, items if self.rank == 0 else None)
        return items


def _result_or_error(make: Callable[[], T]) -> tuple[T | None, ResnextError | None]:
    """Call `make`; return (result, None), or (None, error) if the call fails. An error that is a bug is raised."""
    try:
        return make(), None
    except Exception as caught:
        error = as_resnext_error(caught)
        if error is None:
            raise
        return None, error
