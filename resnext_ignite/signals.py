"""The signals that ask a run to stop, before there is a run that could save anything. Torch-free."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from resnext_ignite.errors import PreemptedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def end_start(number: int, frame: object) -> None:
    """The handler of a process that starts: end it.

    Raises:
        PreemptedError: always.
    """
    raise PreemptedError(f"stopped by {signal.Signals(number).name} before there was anything to save")


def end_start_on_signals() -> None:
    """From now on a stop signal ends this process with 75, until a run takes the signals over."""
    for number in STOP_SIGNALS:
        signal.signal(number, end_start)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Block the stop signals; processes that are started meanwhile begin with them blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        let_through()


def let_through() -> None:
    """Unblock the stop signals; what came meanwhile comes now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
