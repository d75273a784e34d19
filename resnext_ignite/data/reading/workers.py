"""Processes that decode: what a DataLoader does not say, or says in a traceback, when they or their memory fail."""

from __future__ import annotations

import atexit
import errno
import math
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from resnext_ignite.runtime.errors import DataError, errors_of_data
from resnext_ignite.runtime.signals import STOP_SIGNALS, die_with_parent, signals_blocked

_SHM_FULL = "/dev/shm is full: enlarge it (docker run --shm-size=8g) or set data.workers=0"
# What torch says where a batch cannot be handed over for want of a file descriptor, by plain RuntimeErrors.
_NO_DESCRIPTOR = re.compile(r"Too many open files|items of ancdata")
_ADVICE = {
    signal.SIGKILL: "as when memory runs out; lower data.workers or give the machine more memory",
    signal.SIGBUS: "as when /dev/shm is full; enlarge it (docker run --shm-size=8g) or set data.workers=0",
}


def ignore_signals(worker: int) -> None:
    """Leave a signal to the process group to the main process: it saves, then ends its workers; end with it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # torch's worker asks whether its parent has changed: never, where that died before it asked first.
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        die_with_parent(parent.pid, signal.SIGKILL)


def shared_room(*shape: int) -> Tensor:
    """Room for a batch, uint8 of a shape; in a worker, in the memory that the main process reads.

    Raises:
        DataError: there is none left.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    try:
        # Decoded into, it is not copied there afterwards; and left to the queue's own thread, a failure is printed,
        # the batch lost, and waited for without end.
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{_SHM_FULL} ({' '.join(str(error).split())})") from None
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def watched(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader gives; a DataError among it is raised. Its workers end with this, however it ends.

    Raises:
        DataError: a worker gave one, could not be started or is dead, or /dev/shm is full.
    """
    others = set(multiprocessing.active_children())
    workers: list[BaseProcess] = []
    items: Iterator[Any] = iter(())
    # Deaf to SIGTERM, workers that a traceback keeps until the process exits would keep it from exiting.
    end = Finalize(None, _end, (workers,), exitpriority=0)
    try:
        try:
            items = _start(loader)
        finally:
            # Some may run where starting the next one failed.
            workers += [child for child in multiprocessing.active_children() if child not in others]
            # After torch's own, which would wait for each: the last that is registered is the first that is called.
            atexit.register(end)
        while True:
            _check(workers)
            try:
                item = next(items)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # A broken connection may be seen a moment before the death that broke it.
                _check(workers, patience=1.0)
                with errors_of_data("data workers"):
                    if _NO_DESCRIPTOR.search(str(error)):
                        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from None
                    raise
            if isinstance(item, DataError):
                raise item
            yield item
    finally:
        # torch's own end first: it asks them, through queues whose locks a killed one would keep.
        del items
        end()
        atexit.unregister(end)


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        # A worker begins with them blocked, and ignores them before it could hear one.
        with signals_blocked():
            if loader.num_workers:
                # Asked for before torch does, which leaves a traceback behind.
                multiprocessing.Lock()
            return iter(loader)
    except OSError as error:
        reason = _SHM_FULL if error.errno == errno.ENOSPC else f"{error.strerror}; lower data.workers, or set it to 0"
        raise DataError(f"data workers cannot be started: {reason}") from None
    finally:
        if signal.getsignal(signal.SIGCHLD) is not handler:
            # torch's raises in the middle of whatever runs when a worker dies, a save too; here each batch asks.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _check(workers: list[BaseProcess], patience: float = 0.0) -> None:
    ended = wait([worker.sentinel for worker in workers], patience) if workers else []
    if not ended:
        return
    dead = next(worker for worker in workers if worker.sentinel in ended)
    dead.join()
    code = dead.exitcode or 0
    if code >= 0:
        raise DataError(f"a data worker (pid {dead.pid}) left with exit code {code}; try data.workers=0") from None
    killer = signal.Signals(-code)
    advice = _ADVICE.get(killer, "try data.workers=0")
    raise DataError(f"a data worker (pid {dead.pid}) was killed by {killer.name}, {advice}") from None


def _end(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
