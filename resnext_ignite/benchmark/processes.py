"""Contenders in processes of their own: each with the allocator, threads and caches that it would have alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor

import torch

Turn = Callable[[], float]
_turn: Turn | None = None


class Contender:
    """One of them, which waits for its turn; called, it takes it, and gives what the turn gave.

    Args:
        make: prepares a turn in the process; to be pickled.
    """

    def __init__(self, pool: ProcessPoolExecutor, make: Callable[[], Turn]) -> None:
        self._pool = pool
        pool.submit(_prepare, make).result()

    def __call__(self) -> float:
        return self._pool.submit(_take_turn).result()

    def peak_bytes(self) -> int:
        """The most memory that it had at once: the GPU's where there is one, else of its process."""
        return self._pool.submit(peak_bytes).result()


@contextlib.contextmanager
def in_processes(makers: Mapping[str, Callable[[], Turn]]) -> Iterator[dict[str, Contender]]:
    """A process for each contender, until the block ends; what is made for it and what it is called stay its own."""
    # Forked from a process that has torch loaded and has done nothing with it: a new one would need seconds to import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resnext_ignite.benchmark.setup", "resnext_ignite.benchmark.peers"])
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for name in makers}
        yield {name: Contender(pools[name], make) for name, make in makers.items()}


def _prepare(make: Callable[[], Turn]) -> None:
    global _turn
    _turn = make()


def _take_turn() -> float:
    assert _turn is not None
    return _turn()


def peak_bytes() -> int:
    """The most memory that this process had at once, on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
