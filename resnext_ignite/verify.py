"""Check every checkpoint of a run: `python -m resnext_ignite.verify RUN [RUN ...]`.

The command takes no lock and writes nothing; it can check a run while the run trains. `runs/checkpoint.py` verifies
each file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnext_ignite.runtime.errors import CheckpointError, RunFolderError, run_command
from resnext_ignite.runtime.tables import aligned

# Every resume needs these parts of a checkpoint. `_check_state` also checks the config, and the averaged weights if the
# config requires them.
_PARTS = (
    "model",
    "optimizer",
    "lr_scheduler",
    "scaler",
    "handlers.evaluation",
    "handlers.best",
    "handlers.log_point",
    "errors",
    "data",
    "changes",
    "generators",
    "statistics",
)
_COUNTS = ("trainer.iteration", "trainer.epoch_length")


@dataclass(frozen=True)
class Checked:
    """The result of the check of one file.

    Attributes:
        size: size of the file in bytes.
        ok: the file is undamaged and a checkpoint of this project.
        resumable: the file is also complete, so that a run can resume from it.
        reason: why the file is not ok or not resumable, or another remark; None if there is no remark.
        iteration, epoch: completed iterations and epochs of the run; None if unknown.
        iterations: iterations of the whole run; None if unknown.
    """

    path: Path
    size: int
    ok: bool
    resumable: bool
    reason: str | None
    iteration: int | None = None
    epoch: int | None = None
    iterations: int | None = None

    @property
    def state(self) -> str:
        """Return the state as a string: `ok`, `ok (...)` or `damaged: ...`."""
        if self.reason is None:
            return "ok"
        if self.ok:
            return f"ok ({self.reason})"
        return self.reason if self.reason.startswith("damaged") else f"damaged: {self.reason}"


@dataclass(frozen=True)
class CheckedRun:
    """The results for a run folder or a single checkpoint file.

    `files` holds the checkpoints, in the order in which a resume tries them. `remains` lists the leftover files beside
    the checkpoints, each with an explanation.
    """

    path: Path
    files: list[Checked]
    remains: list[str]

    @property
    def candidate(self) -> Checked | None:
        """Return the file that `--resume` uses: the first undamaged file, even if it is not resumable."""
        return next((file for file in self.files if file.ok), None)

    @property
    def resumes_from(self) -> Checked | None:
        """Return the file that a run resumes from; None if a resume would fail or there is no checkpoint."""
        return self.candidate if self.candidate is not None and self.candidate.resumable else None


def require_run_folder(path: Path) -> None:
    """Check that a path is a run folder or a file.

    Raises:
        RunFolderError: the path is neither.
    """
    from resnext_ignite.runs.folder import RunFolder

    if not path.exists():
        raise RunFolderError(f"{path}: no such file or folder; name a run folder or a checkpoint file")
    if path.is_dir() and not RunFolder(path).holds_a_run():
        raise RunFolderError(f"{path}: not a run folder; it has neither config.yaml nor checkpoints/")


def check_run(path: Path) -> CheckedRun:
    """Check all checkpoints of a run folder, or one checkpoint file."""
    from resnext_ignite.runs.checkpoint import resume_candidates

    folder = path / "checkpoints"
    checked = [check_file(file) for file in (resume_candidates(folder) if path.is_dir() else [path])]
    remains = find_leftovers(folder) if folder.is_dir() else []
    return CheckedRun(path, [file for file in checked if file is not None], remains)


def check_file(path: Path) -> Checked | None:
    """Check one file; return None if it no longer exists, because a run that is training has removed it."""
    from resnext_ignite.runs.checkpoint import checksum_path, load_checkpoint

    while True:
        before = _identity(path)
        if before is None:
            return None
        size, has_sum = before[-1], checksum_path(path).exists()
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            after = _identity(path)
            if after is None:
                return None
            if after == before:
                return Checked(path, size, ok=False, resumable=False, reason=_reason(path, error))
            # A save replaced the file during the check, and the checksum may belong to the old file. Check again.
            continue
        return _check_state(path, size, state, has_sum=has_sum)


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _reason(path: Path, error: CheckpointError) -> str:
    return str(error).removeprefix(f"{path}: ")


def _check_state(path: Path, size: int, state: dict[str, Any], *, has_sum: bool) -> Checked:
    """Check whether an undamaged file contains everything that a resume needs, and return the result."""
    from resnext_ignite.runs.checkpoint import config_of_checkpoint

    iteration, length = (_count(state, name) for name in _COUNTS)
    missing = [name for name in _PARTS if _part(state, name) is None]
    missing += [name for name in _COUNTS if _count(state, name) is None]
    iterations, faults = None, []
    try:
        config = config_of_checkpoint(path, state)
    except CheckpointError as error:
        faults.append(_reason(path, error))
    else:
        iterations = None if length is None else length * config.train.epochs
        if config.train.averages and state.get("ema") is None:
            missing.append("ema")
    if missing:
        faults.append(f"without {', '.join(missing)}")
    return Checked(
        path,
        size,
        ok=True,
        resumable=not faults,
        reason="; ".join([*([] if has_sum else ["no .sha256"]), *faults]) or None,
        iteration=iteration,
        epoch=None if iteration is None or not length else iteration // length,
        iterations=iterations,
    )


def _part(state: Any, name: str) -> Any:
    """Look up a dotted name in nested dicts; return the value, or None if there is none."""
    for key in name.split("."):
        state = state.get(key) if isinstance(state, dict) else None
    return state


def _count(state: dict[str, Any], name: str) -> int | None:
    value = _part(state, name)
    return value if isinstance(value, int) else None


def find_leftovers(folder: Path) -> list[str]:
    """Return the leftover files of a checkpoint folder, each with an explanation."""
    found = []
    for name in sorted(path.name for path in folder.iterdir()):
        if name.startswith(".") and name.endswith(".tmp"):
            found.append(f"{name}: from a save that was killed, or is still running")
        elif name.endswith(".sha256") and not (folder / name.removesuffix(".sha256")).exists():
            found.append(f"{name}: without its checkpoint")
        elif name.endswith(".pt.damaged"):
            found.append(f"{name}: set aside by a resume")
    return found


def table(files: list[Checked]) -> str:
    """Return the files as a table with aligned columns; the epoch is the number of completed epochs."""
    rows = [("file", "iteration", "epoch", "MiB", "resumable", "state")]
    for file in files:
        rows.append(
            (
                file.path.name,
                "-" if file.iteration is None else str(file.iteration),
                "-" if file.epoch is None else str(file.epoch),
                f"{file.size / 2**20:.1f}",
                "yes" if file.resumable else "no",
                file.state,
            )
        )
    return "\n".join(aligned(rows))


def resume_line(run: CheckedRun) -> str:
    """Return a line that says which file the run would resume from, or why the run cannot be resumed."""
    if run.resumes_from is not None:
        point = run.resumes_from
        return f"resumes from {point.path} (iteration {point.iteration} of {point.iterations})"
    if run.candidate is not None:
        return f"{run.path}: cannot be resumed: {run.candidate.path.name} would be used, and is {run.candidate.state}"
    reason = "all checkpoints are damaged" if run.files else "there is no checkpoint"
    return f"{run.path}: cannot be resumed: {reason}"


def as_text(run: CheckedRun) -> str:
    """Return the table of a run's checkpoints, its leftover files, and the line from `resume_line`."""
    parts = [table(run.files)] if run.files else []
    return "\n".join([*parts, *(f"not a checkpoint: {line}" for line in run.remains), resume_line(run)])


def as_json(run: CheckedRun) -> dict[str, Any]:
    """Return the results for a run as plain values for JSON."""
    return {
        "run": str(run.path),
        "resumes_from": None if run.resumes_from is None else str(run.resumes_from.path),
        "checkpoints": [
            {
                "file": str(file.path),
                "iteration": file.iteration,
                "epoch": file.epoch,
                "bytes": file.size,
                "ok": file.ok,
                "reason": file.reason,
                "resumable": file.resumable,
            }
            for file in run.files
        ],
    }


def fail_on_damage(runs: list[CheckedRun]) -> None:
    """Check that every file is undamaged, and that every run can be resumed.

    Raises:
        CheckpointError: a check failed; the message names the first file or run.
    """
    files = [file for run in runs for file in run.files]
    damaged = [file for file in files if not file.ok]
    if damaged:
        raise CheckpointError(
            f"{damaged[0].path}: {damaged[0].state}; {len(damaged)} of {len(files)} checkpoints damaged; "
            "restore it from a copy, or remove it"
        )
    for run in runs:
        if run.resumes_from is None:
            raise CheckpointError(f"{resume_line(run)}; restore one from a copy, or start a new run")


def main(arguments: list[str]) -> int:
    """Run the command.

    Raises:
        ResnextError: an error that the user can fix.
    """
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.verify",
        description="Check every checkpoint of a run, and report which runs can be resumed. Safe while a run trains.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or checkpoint file")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parsed = parser.parse_args(arguments)
    paths = [Path(path) for path in dict.fromkeys(parsed.runs)]
    for path in paths:
        require_run_folder(path)
    runs = []
    for path in paths:
        runs.append(check_run(path))
        if not parsed.json:
            print(as_text(runs[-1]), flush=True)
    if parsed.json:
        print(json.dumps({"runs": [as_json(run) for run in runs]}), flush=True)
    fail_on_damage(runs)
    return 0


if __name__ == "__main__":
    run_command(main)
