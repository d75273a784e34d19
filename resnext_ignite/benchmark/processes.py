"""Runs each contender in its own process, with its own allocator, threads and caches, as if it ran alone."""

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
    """A contender in its own process; each call runs one measurement there and returns its value.

    The constructor runs a first measurement, to warm up.

    Args:
        pool: an executor with a single process, in which the contender runs.
        make: a function that prepares the contender and returns the function that measures it. `make` is pickled, and
            runs in the process of the contender.
    """

    def __init__(self, pool: ProcessPoolExecutor, make: Callable[[], Turn]) -> None:
        self._pool = pool
        pool.submit(_prepare, make).result()

    def __call__(self) -> float:
        return self._pool.submit(_take_turn).result()

    def peak_bytes(self) -> int:
        """Return the peak memory of the contender's process in bytes: GPU memory if there is a GPU, else RAM."""
        return self._pool.submit(peak_bytes).result()


class Contenders(dict[str, Contender]):
    """A dict: name -> contender. `failed` is a dict for the contenders that are left out: name -> reason."""

    failed: dict[str, str]


@contextlib.contextmanager
def in_processes(makers: Mapping[str, Callable[[], Turn]]) -> Iterator[Contenders]:
    """Start a process for each contender; the processes end when the `with` block ends.

    A contender that fails during its preparation or its first measurement is left out, for example if a compiler is
    missing or the memory is full.

    Args:
        makers: name of the contender -> argument `make` of `Contender`.

    Raises:
        RuntimeError: all contenders failed.
    """
    # Fork each process from a server that has already imported torch. In a fresh process, this import takes seconds.
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
    """Return the peak memory of this process in bytes: memory allocated on the GPU if there is a GPU, else RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Do not use getrusage: for a spawned process, it reports at least the peak of the parent process.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
