"""The errors a user can meet, each with its exit code, and the one place that turns them into a line.

How an error arises is said where it is raised; this module knows nothing of configs, data or torch.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable


class ResnextError(Exception):
    """An error that is answered with one line: what is wrong, its value, what would do.

    `quiet`: of several ranks' errors, whether another rank tells it; None: not settled yet.
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
    """No usable checkpoint, or one of the wrong kind."""

    exit_code = 4


class DamagedError(CheckpointError):
    """A file that is no checkpoint, or no longer the one that was written."""


class ForeignFileError(DamagedError):
    """A file that no save of this project's left so: another system's, or a part of one of ours."""


class NonFiniteError(ResnextError):
    """A loss or gradient that is not finite."""

    exit_code = 5


class StorageError(ResnextError):
    """A disk that is full or a folder that may not be written."""

    exit_code = 6


class RunFolderError(ResnextError):
    """A run folder that is in use, holds another run, or would be continued with another config."""

    exit_code = 7


class RankError(ResnextError):
    """A rank that failed or hung."""

    exit_code = 8


class OrphanedError(ResnextError):
    """What started the ranks of a machine is gone; what there was to save is saved."""

    exit_code = 8


class PreemptedError(ResnextError):
    """The run was asked to stop; what there was to save is saved."""

    exit_code = 75


_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


def as_resnext_error(error: BaseException) -> ResnextError | None:
    """The error as one of this module's, or None where it is a bug and deserves its traceback."""
    if isinstance(error, ResnextError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return PreemptedError(str(error) or "stopped by Ctrl-C before there was anything to save")
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        where = error.filename if error.filename is not None else "the run folder"
        return StorageError(f"{where}: {error.strerror}; free some space or choose another --output-dir")
    # By name, since torch may not be imported yet, and must not be for an error of the config.
    if type(error).__name__ == "OutOfMemoryError":
        return ConfigError(
            "out of device memory: lower train.batch_size, raise train.accumulate, or set train.precision=bf16"
        )
    # What fails while a stop unwinds the stack, as the release of a lock that it kept from being taken, comes of it.
    behind = error.__context__
    while behind is not None and not isinstance(behind, KeyboardInterrupt):
        behind = behind.__context__
    return as_resnext_error(behind) if behind is not None else None


def report_error(error: BaseException) -> int:
    """Say on standard error what happened, in one line; a bug keeps its traceback. Returns the exit code.

    With `RESNEXT_DEBUG=1` every error keeps its traceback.
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


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command's `main` on the process's arguments and leave with the exit code of what happened."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may be bytes that are no text: they leave as they came.
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        code = main(sys.argv[1:])
    except BrokenPipeError:
        # The reader of a pipe (`| head`) is gone: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report_error(error))
    sys.exit(code or 0)
