"""Contenders in processes of their own: each with the allocator, threads and caches that it would have alone."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

log = logging.getLogger(__name__)
Turn = Callable[[], float]
_turn: Turn | None = None


class Contender:
    """One of them, warm, which waits for its turn; called, it takes it, and gives what the turn gave.

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


class Contenders(dict[str, Contender]):
    """By name; `failed` says of those that cannot take part why."""

    failed: dict[str, str]


@contextlib.contextmanager
def in_processes(makers: Mapping[str, Callable[[], Turn]]) -> Iterator[Contenders]:
    """A process for each contender, until the block ends; what is made for it and what it is called stay its own.

    One that fails at its first turn - a compiler is missing, the memory is full - takes no part.

    Raises:
        RuntimeError: none is left.
    """
    # Forked from a process that has torch loaded and has done nothing with it: a new one would need seconds to import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resnext_ignite.benchmark.setup", "resnext_ignite.benchmark.peers"])
    contenders = Contenders()
    contenders.failed = {}
    with contextlib.ExitStack() as stack:
        for name, make in makers.items():
            pool = ProcessPoolExecutor(1, mp_context=context)
            try:
                contenders[name] = Contender(pool, make)
                stack.callback(pool.shutdown)
            except Exception as error:
                pool.shutdown()
                contenders.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                log.warning(f"{name} takes no part: {contenders.failed[name]}")
        if not contenders:
            raise RuntimeError(f"no contender can take part: {contenders.failed}")
        yield contenders


def _prepare(make: Callable[[], Turn]) -> None:
    global _turn
    _turn = make()
    _turn()


def _take_turn() -> float:
    assert _turn is not None
    return _turn()


def peak_bytes() -> int:
    """The most memory that this process had at once, on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's, which for a spawned process begins with what its parent had.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
