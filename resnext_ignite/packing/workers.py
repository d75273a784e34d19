"""Tasks for several processes, their results in order. What a task is, is for others to know."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from resnext_ignite.data.reading.workers import ignore_signals, watched
from resnext_ignite.runtime.errors import DataError, ResnextError, StorageError

Result = TypeVar("Result")
# Tasks of each worker that are done before they are asked for: who takes them now and then waits for the disk.
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
            # As a value: a loader would put a traceback into its words.
            return error


def in_workers(do: Callable[[int], Result], count: int, workers: int) -> Iterator[Result]:
    """`do(0)` to `do(count - 1)`, in order, a few ahead of who takes them.

    Args:
        workers: processes, forked from this one; 0: it is done here. They end with this process, however it ends.

    Raises:
        ResnextError, OSError: as `do`.
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
        for result in watched(loader):
            if isinstance(result, ResnextError | OSError):
                raise result
            yield result
    except DataError as error:
        # The words are those of a training's workers.
        raise DataError(str(error).replace("data.workers", "--workers")) from None


def _as_it_is(result: Result) -> Result:
    return result


def storage_error(error: OSError) -> OSError | StorageError:
    """What writing failed with, as a user of these commands can mend it; other errors as they are."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{error.filename}: {error.strerror}; free some space, or choose another --output")
    return error
