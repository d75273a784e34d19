"""Sets up the log, standard output and standard error, and handles closed pipes, full disks and lost terminals.

This module does not import torch.
"""

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
    """A file that drops the bytes of a failed write: a run must not end because nobody reads its log."""

    def write(self, data: Any) -> int:
        written: int | None = None
        with contextlib.suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


class _ResultFile(io.FileIO):
    """A file for the result of a command: a failed write ends the command.

    Raises:
        SystemExit: standard output is a pipe, and its reader has closed it (`| head`); exit code 0.
        OSError: any other error; its file name is "standard output".
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # Send the rest of the buffer to /dev/null, so that the next flush does not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if error.errno == errno.EPIPE:
                raise SystemExit(0) from None
            error.filename = "standard output"
            raise


def set_up_streams(*, prints_result: bool) -> None:
    """Replace standard output and standard error by streams that handle failed writes.

    A failed write to standard error, which is only a log, drops the text. A descriptor from 0 to 2 that is closed is
    opened on /dev/null. Otherwise, the next file that this process opens would get this descriptor, and all messages
    would go into this file.

    Args:
        prints_result: if true, standard output carries the result of the command, and a failed write ends the command.
            If false, a failed write drops the text.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # os.open returns the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = _opened("stdout", _ResultFile if prints_result else _LossyFile, "surrogateescape")
    sys.stderr = _opened("stderr", _LossyFile, "backslashreplace")


def _opened(name: str, kind: type[io.FileIO], errors: str) -> TextIO:
    before = getattr(sys, name)
    if before is not None:
        if _descriptor_of(before) != _STANDARD[name]:
            # The stream has been replaced, for example by pytest.
            return before
        with contextlib.suppress(OSError, ValueError):
            before.flush()
    raw = kind(_STANDARD[name], "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", None) or "utf-8",
        # A file name may hold bytes that are not valid text: standard output writes them unchanged, standard error
        # writes them escaped.
        errors=errors,
        # Flush after each line wherever Python itself would: on standard error, on terminals, and with `python -u`
        # (which sets write_through) on every stream.
        line_buffering=name == "stderr" or raw.isatty() or bool(getattr(before, "write_through", False)),
    )


def _descriptor_of(stream: Any) -> int | None:
    try:
        number: int = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
    return number


def write_from_signal_handler(line: str) -> None:
    """Write a line to descriptor 2 directly: the signal may have interrupted a write to `sys.stderr`."""
    with contextlib.suppress(OSError):
        os.write(2, line.encode() + b"\n")


class _TqdmHandler(logging.Handler):
    """Prints log lines to standard error without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def set_up_console(*, quiet: bool = False) -> None:
    """Send this package's log to standard error.

    Args:
        quiet: log only warnings and errors; set this on all ranks except rank 0.
    """
    from tqdm import tqdm

    logger = logging.getLogger("resnext_ignite")
    # tqdm's default lock is shared by all forked processes: a process killed during a write would hold it for ever.
    tqdm.set_lock(threading.RLock())
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    # Ignite also logs the error that ends a run, but the command itself reports this error. Disable Ignite's loggers
    # instead of setting their level, because Ignite's launcher sets the level again.
    for name in ("ignite.engine.engine.Engine", "ignite.distributed.launcher.Parallel"):
        logging.getLogger(name).disabled = True
