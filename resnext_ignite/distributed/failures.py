"""Reports failures between ranks: after a rank fails, all ranks exit soon, and one error message names the cause.

A rank that fails posts its failure in the TCPStore that all ranks share. A rank that lost contact with another rank
reads the cause there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import ClassVar

from torch import distributed as dist

from resnext_ignite.distributed.environment import refuse_restart_after
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.distributed.rendezvous import with_timeout
from resnext_ignite.runtime.errors import PreemptedError, RankError, ResnextError, as_resnext_error

# A rank that lost contact with another rank waits this long for a posted failure.
_WAIT_FOR_FAILURE_S = 3.0
# A failed rank waits this long for rank 0, which may report the same error.
_WAIT_FOR_RANK_0_S = 0.5
# Each rank checks at this interval whether another rank has failed.
_POLL_S = 1.0
# A rank that still runs this long after the failure of another rank counts as hung.
_HANG_AFTER_S = 5.0
# gloo raises plain RuntimeErrors; their messages contain a source location in gloo, or begin with "Gloo ... failed".
_GLOO_ERROR = re.compile(r"\[\S*/gloo/\S*:\d+\]|^Gloo \w+ failed")


@dataclass(frozen=True)
class Failure:
    """A rank's failure: the exit code and a one-line message.

    `reported_by` is the rank that posted the failure, or -1 for the process that spawned the ranks.
    """

    rank: int
    code: int
    text: str
    reported_by: int


class FailureBoard:
    """A board in the store that the ranks share; ranks post failures on it, and only the first posted failure counts.

    Args:
        store: the store that the ranks share.
        generation: name of this generation of ranks (see `rendezvous`); failures from before a restart have another
            generation, and do not count.
    """

    current_generation: ClassVar[str] = ""

    def __init__(self, store: dist.Store, generation: str = "") -> None:
        self._store = dist.PrefixStore(f"resnext_ignite/failure/{generation}", store)

    @classmethod
    @functools.cache
    def connect(cls) -> FailureBoard:
        """Return the board that this rank shares with the other ranks; the first call connects to the store.

        Make the first call before any failure: a connection after a failure may take too long.

        Raises:
            RuntimeError: the process that holds the store is gone.
        """
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return cls(dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5)), cls.current_generation)

    def post(self, failure: Failure) -> Failure:
        """Post a failure; return the failure that was posted first, which may come from another rank."""
        text = json.dumps(asdict(failure))
        return Failure(**json.loads(with_timeout(lambda: self._store.compare_set("first", "", text))))

    def first(self) -> Failure | None:
        """Return the failure that was posted first, or None if there is none yet."""
        text = with_timeout(lambda: self._store.get("first") if self._store.check(["first"]) else None)
        return None if text is None else Failure(**json.loads(text))

    def wait_for_first(self, seconds: float) -> Failure | None:
        """Wait until a failure is posted, and return it; return None if none is posted within `seconds`."""
        deadline = time.monotonic() + seconds
        while (found := self.first()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def answer(self, rank: int) -> None:
        """Record that a rank is alive, although it lost contact with other ranks."""
        with_timeout(lambda: self._store.set(f"alive/{rank}", ""))

    def silent(self, world_size: int) -> list[int]:
        """Return the ranks that have not called `answer`."""
        keys = {rank: f"alive/{rank}" for rank in range(world_size)}
        return with_timeout(lambda: [rank for rank, key in keys.items() if not self._store.check([key])])


def refuse_restart_of(generation: str, store: dist.Store) -> None:
    """Refuse to start if the previous generation of ranks failed with an error that a restart cannot fix.

    Args:
        generation: name of the previous generation.

    Raises:
        ResnextError: the failure that a rank on any machine posted first in that generation, if it is final
            (a restart cannot fix it).
    """
    first = FailureBoard(store, generation).first()
    # When a machine joins or leaves, torchrun stops the ranks of the other machines with SIGTERM in order to restart
    # them. This stop must not prevent the restart.
    launched_by_torchrun = first is not None and first.text.startswith("stopped by SIGTERM")
    if first is not None and not launched_by_torchrun:
        refuse_restart_after(first.code, first.text)


@contextlib.contextmanager
def report_failures(ranks: Ranks) -> Iterator[None]:
    """Turn any error raised in the `with` block into the error that this rank reports.

    Only the failure that was posted first is printed, by the rank that posted it.

    Raises:
        ResnextError: this rank's own error or, if this rank lost contact with another rank, the failure that was posted
            first.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if ranks.world_size == 1 or (isinstance(error, ResnextError) and error.quiet is not None):
            raise
        raise _error_to_report(error, ranks) from (
            None if as_resnext_error(error) or _is_lost_contact(error) else error
        )


def _is_lost_contact(error: BaseException) -> bool:
    """Return whether an error means that a collective failed because of another rank."""
    return isinstance(error, RankError | dist.DistError) or (
        isinstance(error, RuntimeError) and _GLOO_ERROR.search(str(error)) is not None
    )


def _error_to_report(error: BaseException, ranks: Ranks) -> ResnextError:
    lost_contact, known = _is_lost_contact(error), as_resnext_error(error)
    if known is None:
        first_line = (str(error).strip().splitlines() or [""])[0]
        known = RankError(f"rank {ranks.rank} failed: {type(error).__name__}: {first_line}")
    try:
        board = FailureBoard.connect()
        if lost_contact:
            return _lost_contact_error(error, board, ranks)
        # If all ranks find the same error, rank 0 reports it.
        if ranks.rank and board.wait_for_first(_WAIT_FOR_RANK_0_S):
            known.quiet = True
            return known
        if ranks.rank and not isinstance(known, RankError | PreemptedError):
            known.args = (f"rank {ranks.rank}: {known}",)
        own = Failure(ranks.rank, known.exit_code, str(known), ranks.rank)
        known.quiet = board.post(own) != own
        return known
    except RuntimeError:
        # The process that held the store is gone: rank 0, or the launcher.
        if lost_contact:
            known = RankError(
                "lost contact with the other ranks: rank 0, its launcher or "
                "the link to it is gone; continue with --resume"
            )
        known.quiet = False
        return known


def _lost_contact_error(error: BaseException, board: FailureBoard, ranks: Ranks) -> ResnextError:
    board.answer(ranks.rank)
    first = board.wait_for_first(_WAIT_FOR_FAILURE_S)
    if first is None:
        silent = board.silent(ranks.world_size)
        who = "rank " + " and ".join(map(str, silent)) if silent else "no rank"
        hangs = "timed out" in str(error).lower()
        what = "hangs (no answer within distributed.timeout_s)" if hangs else "is gone: killed, or its machine failed"
        text = f"{who} {what}; continue with --resume" if silent else "the ranks lost contact with one another"
        own = Failure(silent[0] if silent else ranks.rank, RankError.exit_code, text, ranks.rank)
        first = board.post(own)
    known = PreemptedError(first.text) if first.code == PreemptedError.exit_code else RankError(first.text)
    known.quiet = first.reported_by != ranks.rank
    return known


@contextlib.contextmanager
def watch_other_ranks(ranks: Ranks) -> Iterator[None]:
    """End this process soon after a rank has failed, even if the `with` block hangs in a collective.

    After this process finds the failure, the `with` block has `_HANG_AFTER_S` seconds to end. If it does not end, the
    process prints the stacks of its threads and exits. If another rank has reported this rank as hung or gone, the
    process does so immediately.
    """
    if ranks.world_size == 1:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(ranks, over), name="rank failures", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        # Join the thread: if it is still in torch's C++ code when the interpreter ends, it aborts the process (SIGABRT,
        # "terminate called without an active exception").
        over.set()
        watcher.join(_HANG_AFTER_S)


def _watch(ranks: Ranks, over: threading.Event) -> None:
    try:
        board = FailureBoard.connect()
        while (first := board.first()) is None or first.code == PreemptedError.exit_code:
            if over.wait(_POLL_S):
                return
    except RuntimeError:
        # The process that held the store is gone. The next collective fails, or the signal for the parent's death ends
        # this process.
        return
    declared = first.rank == ranks.rank != first.reported_by
    if declared or not over.wait(_HANG_AFTER_S):
        faulthandler.dump_traceback(all_threads=True)
        os._exit(RankError.exit_code)
