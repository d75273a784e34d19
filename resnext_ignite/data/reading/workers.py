"""Supervises DataLoader workers.

Raises a one-line error if a worker dies, or if shared memory or file descriptors run out.
"""

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

from resnext_ignite.runtime.errors import DataError, data_error, raise_as_data_error
from resnext_ignite.runtime.signals import STOP_SIGNALS, die_with_parent, signals_blocked

_SHM_FULL = "/dev/shm is full: enlarge it (docker run --shm-size=8g) or set data.workers=0"
# torch raises a plain RuntimeError with one of these texts if the process has no file descriptor left for a batch.
_NO_DESCRIPTOR = re.compile(r"Too many open files|items of ancdata")
_TOO_MANY_FILES = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
_ADVICE = {
    signal.SIGKILL: "probably out of memory; lower data.workers or give the machine more memory",
    signal.SIGBUS: "probably because /dev/shm is full; enlarge it (docker run --shm-size=8g) or set data.workers=0",
}


def ignore_signals(worker: int) -> None:
    """Make a worker ignore the stop signals, and let the system kill the worker when the main process dies.

    A signal to the process group also reaches the workers. They must ignore it: the main process saves a checkpoint
    first, and ends the workers afterwards.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # torch's watchdog in the worker checks whether the parent's pid has changed since the watchdog started. It does not
    # notice a parent that died before the watchdog started.
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        die_with_parent(parent.pid, signal.SIGKILL)


def allocate_batch(*shape: int) -> Tensor:
    """Allocate a uint8 tensor for a batch; in a worker, allocate it in memory shared with the main process.

    Raises:
        DataError: /dev/shm is full, or the process has no file descriptor left.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    try:
        # Decoding directly into shared memory saves a copy. It also lets the worker report a failed allocation. If the
        # queue's feeder thread allocated the memory, it would only print the error and lose the batch, and the main
        # process would wait for ever.
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
    except (RuntimeError, OSError) as error:
        if _NO_DESCRIPTOR.search(str(error)):
            raise data_error("data workers", _TOO_MANY_FILES) from None
        raise DataError(f"{_SHM_FULL} ({' '.join(str(error).split())})") from None
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def supervised(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the items of a loader and check its workers; kill the workers at the end, also after an error.

    Raises:
        DataError: an item is a DataError, a worker could not be started or is dead, or /dev/shm or the file descriptors
            are exhausted.
    """
    others = set(multiprocessing.active_children())
    workers: list[BaseProcess] = []
    items: Iterator[Any] = iter(())
    # A traceback can keep this generator alive until the process exits. In that case, kill the workers at exit: they
    # ignore SIGTERM, so multiprocessing would wait for them for ever.
    end = Finalize(None, _end, (workers,), exitpriority=0)
    try:
        try:
            items = _start(loader)
        finally:
            # Even if one worker fails to start, the workers that started before it are running: `_end` must kill them.
            workers += [child for child in multiprocessing.active_children() if child not in others]
            # torch's own exit handlers wait for each worker. Register this handler after them, so that it runs before
            # them: atexit calls the handlers in reverse order.
            atexit.register(end)
        while True:
            _check(workers)
            try:
                item = next(items)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # The connection to a dying worker can break shortly before the worker's exit is visible: wait up to a
                # second for the exit.
                _check(workers, patience=1.0)
                if _NO_DESCRIPTOR.search(str(error)):
                    raise data_error("data workers", _TOO_MANY_FILES) from None
                with raise_as_data_error("data workers"):
                    raise
            if isinstance(item, DataError):
                raise item
            yield item
    finally:
        # Let torch shut the workers down before they are killed: torch uses queues for this, and a killed worker could
        # hold the lock of a queue for ever.
        del items
        end()
        atexit.unregister(end)


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        # Start the workers with the stop signals blocked, so that no signal reaches them before `ignore_signals` runs.
        with signals_blocked():
            if loader.num_workers:
                # Fail here if no semaphore is available: a failure inside torch would also print a traceback.
                multiprocessing.Lock()
            return iter(loader)
    except OSError as error:
        reason = _SHM_FULL if error.errno == errno.ENOSPC else f"{error.strerror}; lower data.workers, or set it to 0"
        raise DataError(f"data workers cannot be started: {reason}") from None
    finally:
        if signal.getsignal(signal.SIGCHLD) is not handler:
            # When a worker dies, torch's handler raises an exception in the main process immediately, even during a
            # save. Restore the old handler; `supervised` checks the workers before each batch instead.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _check(workers: list[BaseProcess], patience: float = 0.0) -> None:
    ended = wait([worker.sentinel for worker in workers], patience) if workers else []
    if not ended:
        return
    dead = next(worker for worker in workers if worker.sentinel in ended)
    dead.join()
    code = dead.exitcode or 0
    if code >= 0:
        raise DataError(f"a data worker (pid {dead.pid}) exited with code {code}; try data.workers=0") from None
    killer = signal.Signals(-code)
    advice = _ADVICE.get(killer, "try data.workers=0")
    raise DataError(f"a data worker (pid {dead.pid}) was killed by {killer.name}, {advice}") from None


def _end(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
