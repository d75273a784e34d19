"""What torchrun's and srun's environment tells a process they started. Torch-free.

torchrun starts failed ranks again (`--max-restarts`), whatever their exit code. Its agent gives each rank a file for
its error, in a folder of the attempt; a rank leaves its exit code there, and a later attempt that finds one which no
restart would cure ends at once with the same. What ended ranks of other machines is read where the ranks find one
another (`failures.refuse_restart_of`).
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

_FINAL = {kind.exit_code: kind for kind in (ConfigError, DataError, CheckpointError, NonFiniteError, PreemptedError)}


def by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process as a rank."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def by_srun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several tasks of an `srun`.

    A plain process of a batch script is not: it sees the job's tasks in its environment, and is alone.
    """
    return "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1


def launched_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks a launcher started; 1 where there is none."""
    if by_torchrun(environment):
        return int(environment["WORLD_SIZE"])
    return int(environment["SLURM_NTASKS"]) if by_srun(environment) else 1


def launched_on_this_machine(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks a launcher started on this machine, as far as it says; else 1."""
    if by_torchrun(environment):
        return int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if not by_srun(environment):
        return 1
    # Tasks of each node: "8(x2),4" is 8, 8 and 4.
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        counts += [int(count)] * int(times or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1


@contextlib.contextmanager
def record_exit_for_torchrun() -> Iterator[None]:
    """Leave word for torchrun of how the block ends, and refuse to begin it again where that would not help.

    Raises:
        ResnextError: the error with which an earlier attempt ended, if it was one of config, data, checkpoint, numbers
            or preemption.
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
            # torchrun's summary shows the message of the first rank that failed.
            word = {"message": str(known), "timestamp": int(time.time()), "exit_code": known.exit_code}
            with contextlib.suppress(OSError):
                Path(file).write_text(json.dumps(word), encoding="utf-8")
        raise


def refuse_restart_after(exit_code: int, message: str) -> None:
    """Raises ResnextError where an earlier end with this code would only come again."""
    kind = _FINAL.get(exit_code)
    if kind is not None:
        error = kind(f"not started again by torchrun: {message}")
        error.quiet = int(os.environ.get("LOCAL_RANK", "0")) != 0
        raise error


def _refuse_earlier_attempts(file: Path) -> None:
    # .../attempt_<n>/<local rank>/error.json; an agent that starts its ranks anew because others joined or left does so
    # in the same attempt, whose files it removes first.
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
