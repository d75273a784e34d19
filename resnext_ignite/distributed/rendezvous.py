"""How ranks that torchrun started find one another, also after a restart.

torchrun 2.11 keeps one store over all its restarts, although it says that it does not. Keys of dead ranks (gloo's
addresses, NCCL's key) stay in it; restarted ranks read them and wait for ranks that no longer exist. torchrun's restart
count does not separate one generation of ranks from the next either: it does not count machines that it stopped without
restarting them. The ranks therefore agree on a name for each generation, and put everything under that name.
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


def answer_in_time(ask: Callable[[], T]) -> T:
    """What a store answers. torch 2.11's client, asked whether a key is there, waits without end where a link is cut.

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


def keeps_its_store() -> bool:
    """Whether a torchrun that keeps its store started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agree_on_generation(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name that all ranks which were started together have in common, and no others; to be called on all of them.

    Each rank but the first puts a word of its own into the store, which rank 0 answers with the name; it goes on once
    each has said that it has it. The word of a dead rank is answered too, until a living one replaces it.

    Raises:
        RuntimeError: some did not come in time, or the store is gone.
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
    """torchrun's store.

    Raises:
        RuntimeError: torchrun is gone.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def last_generation(store: dist.Store) -> str | None:
    """The name of the ranks' generation that `begin_generation` gave last."""
    return _read(store, _LAST_GENERATION)


def begin_generation(store: dist.Store, timeout_s: float) -> tuple[str, dist.Store]:
    """A name for these ranks' generation, and the part of the store that is their own; to be called on all of them.

    Raises:
        RuntimeError: not all ranks came, or torchrun is gone.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    generation = agree_on_generation(dist.PrefixStore("resnext_ignite/generations", store), rank, world_size, timeout_s)
    store.set(_LAST_GENERATION, generation)
    return generation, dist.PrefixStore(f"resnext_ignite/generation/{generation}", store)


def _read(store: dist.Store, key: str) -> str | None:
    return answer_in_time(lambda: store.get(key).decode() if store.check([key]) else None)


def _pause(deadline: float, missing: set[int]) -> None:
    # Not a blocking read of the store, in which no signal would be heard.
    if missing and time.monotonic() > deadline:
        raise RuntimeError(f"rank {' and '.join(map(str, sorted(missing)))} did not come in time")
    time.sleep(_PAUSE_S)
