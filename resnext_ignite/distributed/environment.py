"""Reads the environment variables of torchrun and srun, and reads and writes torchrun's error files.

This module does not import torch.

torchrun restarts failed ranks (`--max-restarts`), whatever their exit code. The first start and each restart are called
attempts. The agent of torchrun gives each rank the path of an error file; each attempt has its own folder of these
files. A failed rank writes its exit code to its file. If a rank of a later attempt finds the exit code of an error that
a restart cannot fix, it exits immediately with the same code. `failures.refuse_restart_of` does the same for errors on
other machines; it reads them from the store that all ranks share.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from resnext_ignite.runtime.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    PreemptedError,
    as_resnext_error,
)

_FINAL_ERRORS = {
    kind.exit_code: kind for kind in (ConfigError, DataError, CheckpointError, NonFiniteError, PreemptedError)
}


def launched_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun, or a launcher that sets the same variables, started this process as a rank."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def launched_by_srun(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is one of several tasks of an `srun`.

    A process that a batch script starts without `srun` is not such a task: it runs alone, although its environment
    holds the job's number of tasks.
    """
    return "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1


def launched_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks that the launcher started; 1 without a launcher."""
    if launched_by_torchrun(environment):
        return int(environment["WORLD_SIZE"])
    return int(environment["SLURM_NTASKS"]) if launched_by_srun(environment) else 1


def launched_on_this_machine(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks that the launcher started on this machine; 1 if no variable gives this number."""
    if launched_by_torchrun(environment):
        return int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if not launched_by_srun(environment):
        return 1
    # Tasks per node: "8(x2),4" means 8, 8 and 4.
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        counts += [int(count)] * int(times or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1


@contextlib.contextmanager
def record_exit_for_torchrun() -> Iterator[None]:
    """Write an error that is raised in the `with` block to torchrun's error file, unless the error is a bug.

    Raises:
        ResnextError: an earlier attempt ended with an error that a restart cannot fix (config, data, checkpoint,
            non-finite number, preemption). The raised error has the class and exit code of the earlier error, and the
            `with` block does not run.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        yield
        return
    try:
        _refuse_earlier_attempts(Path(file))
        yield
    except BaseException as error:
        known = as_resnext_error(error)
        if known is not None:
            # torchrun's summary shows the message with the earliest timestamp.
            word = {"message": str(known), "timestamp": int(time.time()), "exit_code": known.exit_code}
            with contextlib.suppress(OSError):
                Path(file).write_text(json.dumps(word), encoding="utf-8")
        raise


def refuse_restart_after(exit_code: int, message: str) -> None:
    """Raise the error of an earlier attempt again, if a restart cannot fix this error; otherwise, do nothing.

    Raises:
        ResnextError: `exit_code` is the code of an error that a restart cannot fix.
    """
    kind = _FINAL_ERRORS.get(exit_code)
    if kind is not None:
        error = kind(f"restart by torchrun refused: {message}")
        error.quiet = int(os.environ.get("LOCAL_RANK", "0")) != 0
        raise error


def _refuse_earlier_attempts(file: Path) -> None:
    # The path is .../attempt_<n>/<local rank>/error.json. Skip the files of the current attempt: they come from the
    # current ranks. When machines join or leave, the agent restarts its ranks within the same attempt, but it removes
    # the files of the attempt first.
    attempt = file.parent.parent
    for other in sorted(attempt.parent.glob("attempt_*/*/error.json")):
        word = _read(other) if other.parent.parent != attempt else {}
        refuse_restart_after(word.get("exit_code", 0), word.get("message", ""))


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        word = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(word, dict) and "message" in word:
            return word
    return {}
