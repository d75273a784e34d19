"""Handles stop signals during the start, when there is nothing to save yet; this module does not import torch.

`distributed/stopping.py` handles stop signals during a run.
"""

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
    # `nohup` makes a command ignore SIGHUP; leave it ignored.
    if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
)
# The kernel sends this signal to a rank when the rank's parent dies. It must differ from the stop signals, so that the
# rank can tell the two cases apart. To look for the parent is not enough: the kernel sends the signal when the thread
# that started the rank ends, and at that moment the parent may still exist, because its other threads have not ended.
PARENT_GONE = signal.SIGRTMIN if sys.platform == "linux" else signal.SIGUSR2
ENDING_SIGNALS = (*STOP_SIGNALS, PARENT_GONE)


def describe_signal(number: int) -> str:
    """Return the text that completes 'stopped by ...': the name of the signal, or a phrase for PARENT_GONE."""
    return "the end of its parent process" if number == PARENT_GONE else signal.Signals(number).name


def exit_during_start(number: int, frame: object) -> None:
    """End the process during its start. This is a signal handler.

    Raises:
        KeyboardInterrupt: always, for every signal. Some code catches every Exception and reports a damaged file; it
            does not catch a KeyboardInterrupt, which is not a subclass of Exception.
    """
    raise KeyboardInterrupt(f"stopped by {describe_signal(number)} before there was anything to save")


def exit_on_signal(number: int, frame: object) -> None:
    """Exit with code 75. This is a signal handler for use during the imports.

    It does not raise an exception, because an imported module may catch it.
    """
    write_from_signal_handler(f"error: stopped by {describe_signal(number)} before there was anything to save")
    os._exit(PreemptedError.exit_code)


def install_exit_on_signals() -> None:
    """Let a stop signal end this process with exit code 75, until a run installs its own handlers."""
    for number in ENDING_SIGNALS:
        signal.signal(number, exit_on_signal)


def install_exit_during_start() -> None:
    """Let a stop signal raise KeyboardInterrupt, until a run installs its own handlers."""
    for number in ENDING_SIGNALS:
        signal.signal(number, exit_during_start)


@contextlib.contextmanager
def note_stop_signals() -> Iterator[Callable[[], str | None]]:
    """Record every stop signal that arrives inside the `with` block, even if its handler ignores it.

    The yielded function returns the name of the last stop signal since the previous call, or None if there was none.
    After the block, the previous handlers are restored.

    A command that makes several runs needs this: the handlers of a run ignore a signal that arrives while the run ends.
    The command therefore calls the yielded function after each run.
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
    """Let the system send a signal to this process when its parent dies; send it now if the parent is dead already."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the stop signals until the end of the `with` block.

    A process that is started in the `with` block inherits the blocked signals; it must call `signals_unblocked` itself.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signals_unblocked()


def signals_unblocked() -> None:
    """Unblock the stop signals; pending ones are delivered now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
