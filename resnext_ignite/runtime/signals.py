"""The signals that ask a run to stop, before there is a run that could save anything. Torch-free."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator

from resnext_ignite.runtime.console import write_from_signal_handler
from resnext_ignite.runtime.errors import PreemptedError

_PR_SET_PDEATHSIG = 1
STOP_SIGNALS = tuple(
    number
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    # `nohup` makes a command ignore SIGHUP.
    if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
)
# The system sends this to a rank when the process that started it dies. It is a signal of its own, because the rank
# cannot look for its parent instead: the signal comes when the parent's first thread has ended, and the parent exists
# until its last thread has.
PARENT_GONE = signal.SIGRTMIN if sys.platform == "linux" else signal.SIGUSR2
ENDING_SIGNALS = (*STOP_SIGNALS, PARENT_GONE)


def describe_signal(number: int) -> str:
    """What a signal stands for, in messages that begin with 'stopped by'."""
    return "the end of what started it" if number == PARENT_GONE else signal.Signals(number).name


def exit_during_start(number: int, frame: object) -> None:
    """The handler of a process that starts: end it.

    Raises:
        KeyboardInterrupt: always, whichever signal: what takes a damaged file's every Exception for damage must not
            take this for it.
    """
    raise KeyboardInterrupt(f"stopped by {describe_signal(number)} before there was anything to save")


def exit_on_signal(number: int, frame: object) -> None:
    """The handler of a command that only imports yet: an exception could be lost in what catches them on import."""
    write_from_signal_handler(f"error: stopped by {describe_signal(number)} before there was anything to save")
    os._exit(PreemptedError.exit_code)


def install_exit_on_signals() -> None:
    """From now on a stop signal ends this process with 75, until a run takes the signals over."""
    for number in ENDING_SIGNALS:
        signal.signal(number, exit_on_signal)


def install_exit_during_start() -> None:
    """From now on a stop signal raises KeyboardInterrupt, until a run takes the signals over."""
    for number in ENDING_SIGNALS:
        signal.signal(number, exit_during_start)


@contextlib.contextmanager
def note_stop_signals() -> Iterator[Callable[[], str | None]]:
    """Note every stop signal that comes inside the block, whoever answers it; the yielded function names the last one.

    A run answers signals in its own way, and one that comes to it in its last moments changes nothing: whoever makes
    several runs asks between them. After the block signals are answered as before it.
    """
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    os.set_blocking(writes, False)
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)

    def noted() -> str | None:
        numbers = b""
        with contextlib.suppress(BlockingIOError):
            numbers = os.read(reads, 65536)
        return next((signal.Signals(number).name for number in reversed(numbers) if number in STOP_SIGNALS), None)

    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(reads)
        os.close(writes)


def die_with_parent(parent: int, number: int) -> None:
    """Have the system send this process a signal when its parent dies; at once, where that has happened already."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the stop signals; processes that are started meanwhile begin with them blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signals_unblocked()


def signals_unblocked() -> None:
    """Unblock the stop signals; what came meanwhile comes now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
