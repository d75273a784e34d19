"""Defines the errors that a command reports to the user in one line, each with its exit code.

This module does not depend on configs, data or torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator

from resnext_ignite.runtime.console import set_up_streams


class ResnextError(Exception):
    """An error that is reported in one line. The line names what is wrong, its value, and what to do.

    `quiet` is True if another rank prints the error, False if this rank prints it, and None if this is not known yet.
    """

    exit_code = 1
    quiet: bool | None = None


class ConfigError(ResnextError):
    """A config file or command line that cannot be used."""

    exit_code = 2


class DataError(ResnextError):
    """Data that is missing, damaged or unreadable."""

    exit_code = 3


class CheckpointError(ResnextError):
    """A checkpoint that is missing, unusable or of the wrong kind."""

    exit_code = 4


class DamagedError(CheckpointError):
    """A file that is not a checkpoint, or whose content has changed since it was written."""


class ForeignFileError(DamagedError):
    """A file that is not a whole checkpoint of this project: a file of another system, or a part of a checkpoint."""


class NonFiniteError(ResnextError):
    """A loss or gradient that is not finite."""

    exit_code = 5


class StorageError(ResnextError):
    """A file or folder of the run that the system cannot read, write or lock."""

    exit_code = 6


class RunFolderError(ResnextError):
    """A run folder that another process uses, or that belongs to another run or to another config."""

    exit_code = 7


class RankError(ResnextError):
    """A rank that failed or hung."""

    exit_code = 8


class OrphanedError(ResnextError):
    """The process that started the ranks of a machine is gone; the run is saved, if there was anything to save."""

    exit_code = 8


class PreemptedError(ResnextError):
    """A signal stopped the run; the run is saved, if there was anything to save."""

    exit_code = 75


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
_TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
# Errors of processes and connections, not of files.
_NOT_FILE_ERRORS = (
    ChildProcessError,
    ProcessLookupError,
    BlockingIOError,
    ConnectionRefusedError,
    ConnectionResetError,
)
# Only a bug in this code causes these.
_BUGS = {errno.EBADF, errno.EFAULT}
# torch raises a plain RuntimeError when the CPU runs out of memory; recognise it by its message.
_CPU_ALLOCATOR = re.compile(r"DefaultCPUAllocator: .*?(tried to allocate \d+ bytes|not enough memory)", re.DOTALL)


def advice_for(number: int | None) -> str:
    """Return the advice to the user for the `errno` of a failed storage operation."""
    if number in _NO_ROOM:
        return "free some space or write somewhere else (--output-dir)"
    if number in _NOT_ALLOWED:
        return "change its permissions or write somewhere else (--output-dir)"
    if number in _TOO_MANY_FILES:
        return "raise `ulimit -n` or lower data.workers"
    return "check that storage, then run the command again"


def data_error(where: object, error: OSError, advice: str = "check that it is there and can be read") -> DataError:
    """Return an OSError as a DataError with the message `where: what happened; advice`.

    If the process has too many open files, the data is not the cause; the message then advises how to open more files.
    """
    if error.errno in _TOO_MANY_FILES:
        advice = advice_for(error.errno)
    return DataError(f"{where}: {error.strerror or error}; {advice}")


@contextlib.contextmanager
def raise_as_data_error(where: object) -> Iterator[None]:
    """Turn any file error (OSError) raised in the `with` block into a DataError.

    Args:
        where: what the message names if the error itself names no file.

    Raises:
        DataError: an operation on a file failed with an OSError. Other errors are raised unchanged.
    """
    try:
        yield
    except OSError as error:
        if not _is_file_error(error):
            raise
        what = where if error.filename is None else error.filename
        raise data_error(what, error) from None


def as_resnext_error(error: BaseException) -> ResnextError | None:
    """Return the error as a ResnextError, or None if it is a bug, which must be shown with its traceback."""
    if isinstance(error, ResnextError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return PreemptedError(str(error) or "stopped by Ctrl-C before there was anything to save")
    # While the KeyboardInterrupt of a stop signal unwinds the stack, something else may fail, such as the release of a
    # lock that was never taken. Report the stop, because it is the cause.
    context = error.__context__
    while context is not None and not isinstance(context, KeyboardInterrupt):
        context = context.__context__
    if context is not None:
        return as_resnext_error(context)
    if isinstance(error, OSError) and _is_file_error(error):
        where = error.filename if error.filename is not None else "a file"
        return StorageError(f"{where}: {error.strerror}; {advice_for(error.errno)}")
    # Compare the name of the class, so that this module need not import torch.
    if type(error).__name__ == "OutOfMemoryError":
        return ConfigError(
            "out of device memory: lower train.batch_size, raise train.accumulate, or set train.precision=bf16"
        )
    return as_out_of_memory(error)


def _is_file_error(error: OSError) -> bool:
    # Exclude the errors that cannot come from a file, and accept all others: some file systems have their own error
    # numbers, so the numbers of file errors cannot be listed. The `errno` of a `socket.gaierror` is not one of the
    # system's error numbers.
    foreign = isinstance(error, _NOT_FILE_ERRORS) or type(error).__name__ == "gaierror"
    return bool(error.errno) and error.errno not in _BUGS and not foreign


def as_out_of_memory(error: BaseException) -> ConfigError | None:
    """Return an out-of-memory error of the CPU as a ConfigError; return None for any other error."""
    reason = ""
    if isinstance(error, RuntimeError):
        match = _CPU_ALLOCATOR.search(str(error))
        if match is None:
            return None
        reason = f" ({match[1]})"
    elif not isinstance(error, MemoryError):
        return None
    return ConfigError(
        f"out of memory{reason}: lower train.batch_size or evaluation.batch_size, raise train.accumulate, or lower "
        "data.workers"
    )


def report_error(error: BaseException) -> int:
    """Print an error to standard error, and return its exit code.

    A bug is printed with its traceback; every other error takes one line.

    An error whose `quiet` is True is not printed. With `RESNEXT_DEBUG=1`, every other error is printed with its
    traceback.
    """
    known = as_resnext_error(error)
    bug = error if known is None else known.__cause__
    if known is not None and not known.quiet:
        print(f"error: {known}", file=sys.stderr)
    if os.environ.get("RESNEXT_DEBUG") == "1":
        bug = error
    if bug is not None and not (known and known.quiet):
        traceback.print_exception(bug)
    return known.exit_code if known else 1


def run_command(main: Callable[[list[str]], int | None], *, prints_result: bool = True) -> None:
    """Run a command's `main` on the arguments of this process, and exit.

    The exit code is the value that `main` returns (None: 0). If `main` raises an error, this function reports the error
    and exits with the exit code of the error.

    Args:
        prints_result: see `console.set_up_streams`.
    """
    set_up_streams(prints_result=prints_result)
    try:
        code = main(sys.argv[1:])
        # Flush now: if the flush failed at interpreter shutdown, Python would exit with code 120.
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error)
        # The command has failed; if the flush fails too, this second error must not replace the first one.
        with contextlib.suppress(OSError, SystemExit):
            sys.stdout.flush()
    sys.exit(code or 0)
