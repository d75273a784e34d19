"""Connects ranks to one another after torchrun has started or restarted them.

torchrun 2.11 uses one store for all its restarts, although its documentation says otherwise. Keys of dead ranks (gloo's
addresses, NCCL's key) stay in this store; restarted ranks read them and wait for ranks that no longer exist. The ranks
that run from one start or restart to the next are called a generation. They agree on a name for their generation, and
use this name as the prefix of all their keys. torchrun's restart count cannot be this name, because it may differ
between machines: each machine counts only the restarts after a failure of its own ranks, not the restarts after another
machine has joined or left.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch import distributed as dist

T = TypeVar("T")
_PAUSE_S = 0.02
_ANSWER_S = 3.0
_LAST_GENERATION = "resnext_ignite/last_generation"


def with_timeout(ask: Callable[[], T]) -> T:
    """Return the result of `ask`, a request to a store, or raise an error after `_ANSWER_S` seconds.

    A request may have no timeout of its own: `Store.check` of torch 2.11 waits for ever if the network link is broken.

    Raises:
        RuntimeError: no answer came in time, or the store is gone.
    """
    answers: list[T] = []
    errors: list[RuntimeError] = []

    def wait_for_it() -> None:
        try:
            answers.append(ask())
        except RuntimeError as error:
            errors.append(error)

    asking = threading.Thread(target=wait_for_it, name="asks the store", daemon=True)
    asking.start()
    asking.join(_ANSWER_S)
    if answers:
        return answers[0]
    raise errors[0] if errors else RuntimeError("the store that the ranks share does not answer")


def torchrun_keeps_store() -> bool:
    """Return whether torchrun started this process and uses one store for all its restarts."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agree_on_generation(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Return a name for the generation of these ranks. Call this on all ranks: all get the same name.

    Each rank except rank 0 writes a random word into the store. Rank 0 answers each word with the name, and returns
    when every other rank has confirmed the name. The word of a dead rank may still be in the store. Rank 0 answers this
    word too, but no rank confirms the answer. Rank 0 therefore polls again, until the restarted rank has replaced the
    word.

    Raises:
        RuntimeError: a rank did not confirm in time, or the store is gone.
    """
    deadline = time.monotonic() + timeout_s
    own = uuid.uuid4().hex
    if rank:
        store.set(f"word/{rank}", own)
        while (generation := _read(store, f"generation/{own}")) is None:
            _pause(deadline, {0})
        store.set(f"here/{generation}/{rank}", "")
        return generation
    missing = set(range(1, world_size))
    while missing:
        for other in missing:
            word = _read(store, f"word/{other}")
            if word is not None:
                store.set(f"generation/{word}", own)
        missing = {other for other in missing if not store.check([f"here/{own}/{other}"])}
        _pause(deadline, missing)
    return own


def connect_to_store(timeout_s: float) -> dist.Store:
    """Connect to torchrun's store.

    Raises:
        RuntimeError: torchrun is gone.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def last_generation(store: dist.Store) -> str | None:
    """Return the name of the last generation that `begin_generation` registered, or None if there is none."""
    return _read(store, _LAST_GENERATION)


def begin_generation(store: dist.Store, timeout_s: float) -> tuple[str, dist.Store]:
    """Return the name of this generation, and a store for its keys only (a PrefixStore); call this on all ranks.

    Raises:
        RuntimeError: not all ranks took part in time, or torchrun is gone.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    generation = agree_on_generation(dist.PrefixStore("resnext_ignite/generations", store), rank, world_size, timeout_s)
    store.set(_LAST_GENERATION, generation)
    return generation, dist.PrefixStore(f"resnext_ignite/generation/{generation}", store)


def _read(store: dist.Store, key: str) -> str | None:
    return with_timeout(lambda: store.get(key).decode() if store.check([key]) else None)


def _pause(deadline: float, missing: set[int]) -> None:
    # Poll: Python could not run a signal handler during a blocking read of the store.
    if missing and time.monotonic() > deadline:
        raise RuntimeError(f"rank {' and '.join(map(str, sorted(missing)))} did not connect in time")
    time.sleep(_PAUSE_S)
