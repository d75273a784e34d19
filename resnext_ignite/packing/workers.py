"""Runs tasks in several processes and yields their results in order."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from resnext_ignite.data.reading.workers import ignore_signals, supervised
from resnext_ignite.runtime.errors import DataError, ResnextError, StorageError

Result = TypeVar("Result")
# Number of results that each worker prepares in advance, because the consumer sometimes waits for the disk.
_AHEAD = 8


class _Tasks(Dataset[Any], Generic[Result]):
    def __init__(self, do: Callable[[int], Result], count: int) -> None:
        self.do, self.count = do, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Result | ResnextError | OSError:
        try:
            return self.do(number)
        except (ResnextError, OSError) as error:
            # Return the error, do not raise it: a DataLoader would add a traceback to its message.
            return error


def in_workers(do: Callable[[int], Result], count: int, workers: int) -> Iterator[Result]:
    """Yield `do(0)` to `do(count - 1)` in order. The workers compute a few results in advance.

    Args:
        do: runs the task with the given number, and returns its result.
        count: number of tasks.
        workers: number of worker processes, forked from this process. Workers end when this process ends, even if this
            process is killed. 0: this process runs the tasks.

    Raises:
        ResnextError, OSError: `do` raised it.
        DataError: a worker died.
    """
    processes = min(workers, count)
    loader = DataLoader(
        _Tasks(do, count),
        batch_size=None,
        num_workers=processes,
        prefetch_factor=_AHEAD if processes else None,
        collate_fn=_as_it_is,
        worker_init_fn=ignore_signals,
        multiprocessing_context="fork" if processes else None,
    )
    try:
        for result in supervised(loader):
            if isinstance(result, ResnextError | OSError):
                raise result
            yield result
    except DataError as error:
        # The error message from `supervised` names the config key `data.workers`. The commands that prepare data have
        # the option `--workers` instead.
        raise DataError(str(error).replace("data.workers", "--workers")) from None


def _as_it_is(result: Result) -> Result:
    return result


def storage_error(error: OSError) -> OSError | StorageError:
    """Return a StorageError that names `--output` if `error` reports a full disk; return any other error unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{error.filename}: {error.strerror}; free some space, or choose another --output")
    return error
