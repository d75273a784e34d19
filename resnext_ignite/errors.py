"""The errors a user can meet, each with its exit code, and the one place that turns them into a line.

How an error arises is said where it is raised; this module knows nothing of configs, data or torch.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable


class ResnextError(Exception):
    """An error that is answered with one line: what is wrong, its value, what would do."""

    exit_code = 1


class ConfigError(ResnextError):
    """A config file or command line that cannot be used."""

    exit_code = 2


class DataError(ResnextError):
    """Data that is missing, damaged or unreadable."""

    exit_code = 3


class CheckpointError(ResnextError):
    """No usable checkpoint, or one of the wrong kind."""

    exit_code = 4


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


class PreemptedError(ResnextError):
    """The run was asked to stop; what there was to save is saved."""

    exit_code = 75


_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


def as_resnext_error(error: BaseException) -> ResnextError | None:
    """The error as one of this module's, or None where it is a bug and deserves its traceback."""
    if isinstance(error, ResnextError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return PreemptedError("stopped by Ctrl-C before there was anything to save")
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        where = error.filename if error.filename is not None else "the run folder"
        return StorageError(f"{where}: {error.strerror}; free some space or choose another --output-dir")
    # By name, since torch may not be imported yet, and must not be for an error of the config.
    if type(error).__name__ == "OutOfMemoryError":
        return ConfigError(
            "out of device memory: lower train.batch_size, raise train.accumulate, or set train.precision=bf16"
        )
    return None


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command's `main` on the process's arguments and leave with the exit code of what happened.

    With `RESNEXT_DEBUG=1` every error keeps its traceback.
    """
    try:
        code = main(sys.argv[1:])
    except BrokenPipeError:
        # The reader of a pipe (`| head`) is gone: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        known = as_resnext_error(error)
        if known is None or os.environ.get("RESNEXT_DEBUG") == "1":
            raise
        print(f"error: {known}", file=sys.stderr)
        sys.exit(known.exit_code)
    sys.exit(code or 0)
