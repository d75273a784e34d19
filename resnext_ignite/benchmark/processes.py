"""Contenders in separate processes: each has its own allocator, threads and caches, as if it ran alone."""

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
    """A contender in its own process, warmed up by one turn; a call takes the next turn and returns its result.

    Args:
        pool: the process.
        make: is pickled, and prepares the turn in the process.
    """

    def __init__(self, pool: ProcessPoolExecutor, make: Callable[[], Turn]) -> None:
        self._pool = pool
        pool.submit(_prepare, make).result()

    def __call__(self) -> float:
        return self._pool.submit(_take_turn).result()

    def peak_bytes(self) -> int:
        """Return the peak memory of the contender's process in bytes, on the GPU if there is one."""
        return self._pool.submit(peak_bytes).result()


class Contenders(dict[str, Contender]):
    """Contenders by name; `failed` holds the reason for each one that cannot take part."""

    failed: dict[str, str]


@contextlib.contextmanager
def in_processes(makers: Mapping[str, Callable[[], Turn]]) -> Iterator[Contenders]:
    """Start a process for each contender; the processes end with the block.

    A contender that fails while it is prepared or at its first turn (a compiler is missing, the memory is full) takes
    no part.

    Args:
        makers: for each name, a function that prepares the contender's turn in its process.

    Raises:
        RuntimeError: all contenders failed.
    """
    # Fork from a process that has imported torch and not used it yet: a new process would need seconds to import it.
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
                log.warning(f"{name} is left out: {contenders.failed[name]}")
        if not contenders:
            raise RuntimeError(f"all contenders failed: {contenders.failed}")
        yield contenders


def _prepare(make: Callable[[], Turn]) -> None:
    global _turn
    _turn = make()
    _turn()


def _take_turn() -> float:
    assert _turn is not None
    return _turn()


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes: memory allocated on the GPU if there is one, else RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not from getrusage: the peak of a spawned process starts there at its parent's value.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
