"""Standard output and standard error, either of which may be closed, full or hung up at any moment. Torch-free."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import threading
from typing import Any, TextIO

_STANDARD = {"stdout": 1, "stderr": 2}


class _LossyFile(io.FileIO):
    """A file whose bytes are lost where they cannot be written: a run must not end because nobody reads its log."""

    def write(self, data: Any) -> int:
        written: int | None = None
        with contextlib.suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


class _ResultFile(io.FileIO):
    """A file that holds the result of a command: an error of writing it ends the command.

    Raises:
        SystemExit: the reader of a pipe has left (`| head`) and has what it wanted: exit code 0.
        OSError: any other error; it names standard output.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # Whatever is still buffered goes to /dev/null, so that the next flush does not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if error.errno == errno.EPIPE:
                raise SystemExit(0) from None
            error.filename = "standard output"
            raise


def set_up_streams(*, prints_result: bool) -> None:
    """Make the standard streams of this process safe to write to, whatever happens to whoever reads them.

    Standard error is a log, which may be lost. Where one of the descriptors 0 to 2 is closed, it is opened on
    /dev/null. Otherwise the next file that this process opens would get that number, and with it all messages.

    Args:
        prints_result: standard output holds the result of the command, and not only a message about files.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest number that is free: this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = _opened("stdout", _ResultFile if prints_result else _LossyFile, "surrogateescape")
    sys.stderr = _opened("stderr", _LossyFile, "backslashreplace")


def _opened(name: str, kind: type[io.FileIO], errors: str) -> TextIO:
    before = getattr(sys, name)
    if before is not None:
        if _number_of(before) != _STANDARD[name]:
            # Somebody has put a stream of their own there, as pytest does.
            return before
        with contextlib.suppress(OSError, ValueError):
            before.flush()
    raw = kind(_STANDARD[name], "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", None) or "utf-8",
        # A file name may hold bytes that are not valid text. They are written unchanged.
        errors=errors,
        # As Python has them; `python -u` asks for no buffer.
        line_buffering=name == "stderr" or raw.isatty() or bool(getattr(before, "write_through", False)),
    )


def _number_of(stream: Any) -> int | None:
    try:
        number: int = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
    return number


def write_from_signal_handler(line: str) -> None:
    """Write a line to standard error from a signal handler, which may interrupt a stream in the middle of its work."""
    with contextlib.suppress(OSError):
        os.write(2, line.encode() + b"\n")


class _TqdmHandler(logging.Handler):
    """Prints log lines on standard error without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def set_up_console(*, quiet: bool = False) -> None:
    """Send this package's log to standard error: lines, or only warnings where `quiet` (other ranks)."""
    from tqdm import tqdm

    logger = logging.getLogger("resnext_ignite")
    # tqdm's own lock is one for all processes that were forked: one that is killed while it writes keeps it for ever.
    tqdm.set_lock(threading.RLock())
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    # Ignite reports an error of the run too, which is answered once, at the end. Its launcher sets its own level anew.
    for name in ("ignite.engine.engine.Engine", "ignite.distributed.launcher.Parallel"):
        logging.getLogger(name).disabled = True
