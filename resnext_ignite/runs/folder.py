"""Defines the run folder: its file names, its lock and its small files. `checkpoint.py` handles checkpoint files."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel

from resnext_ignite import __version__
from resnext_ignite.config.files import load_config, save_config
from resnext_ignite.config.resume import SAFE_ON_RESUME, adopt_resolved, changed_values
from resnext_ignite.config.schema import Config
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runs.checkpoint import (
    ResumePoint,
    config_of_checkpoint,
    newest_resume_point,
    remove_leftovers,
    resume_candidates,
    set_aside,
)
from resnext_ignite.runs.records import EvaluationInDetail, MetricsLine, Status
from resnext_ignite.runtime.errors import PreemptedError, RunFolderError, StorageError, advice_for, as_resnext_error
from resnext_ignite.runtime.storage import append_durably, name_file_in_errors, temporary_path, write_durably

ENDED = ("completed", "stopped_early")
_PACKAGES = ("torch", "torchvision", "pytorch-ignite", "tensorboard")
_SPARE_DESCRIPTORS = 4
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
Record = dict[str, Any]
log = logging.getLogger(__name__)


class RunFolder:
    """The folder of one run. Only rank 0 locks it and writes into it; only one process at a time can hold the lock.

    Args:
        path: the folder; `lock` creates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # On a file system without locks, do not use a soft lock instead: it is a plain file, which would remain after
        # the run is killed.
        self._lock = FileLock(path / ".lock", fallback_to_soft=False)
        self._spare_descriptors: list[int] = []

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def mistakes(self) -> Path:
        return self.path / "mistakes.png"

    @property
    def _config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _status(self) -> Path:
        return self.path / "status.json"

    @property
    def _evaluation(self) -> Path:
        return self.path / "evaluation.json"

    def holds_a_run(self) -> bool:
        """Return whether the folder contains a config or a checkpoint of a run."""
        return self._config.exists() or bool(resume_candidates(self.checkpoints))

    def lock(self) -> None:
        """Create the folder and lock it for this process; the system releases the lock when the process ends.

        Raises:
            RunFolderError: another process holds the lock.
            StorageError: the folder cannot be created or locked.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}; choose another --output-dir") from None
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunFolderError(f"{self.path}: another process trains here; choose another --output-dir") from None
        except OSError as error:
            advice = "choose another --output-dir, on a file system with locks"
            if error.errno not in _NO_LOCKS:
                advice = advice_for(error.errno)
            raise StorageError(f"{self._lock.lock_file}: {error.strerror}; {advice}") from None
        # A process that has reached its limit of open files can close these descriptors, and then write `status.json`.
        self._spare_descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(_SPARE_DESCRIPTORS)]

    def free_spare_descriptors(self) -> None:
        """Close the spare descriptors, so that a failed run can still open the files that it must write."""
        while self._spare_descriptors:
            os.close(self._spare_descriptors.pop())

    def unlock(self) -> None:
        """Release the lock of the folder."""
        self.free_spare_descriptors()
        # The system releases the lock anyway when this process ends.
        with contextlib.suppress(OSError):
            self._lock.release()

    def start(self, config: Config) -> None:
        """Write the config, create the checkpoint folder, and remove partly written files of a killed process."""
        self.checkpoints.mkdir(exist_ok=True)
        remove_leftovers(self.checkpoints)
        # Remove only files of a run: the folder may contain other files of the user.
        for file in (self._config, self._metrics, self._status, self._evaluation, self.curves, self.mistakes):
            temporary_path(file).unlink(missing_ok=True)
        save_config(config, self._config)

    def saved_config(self) -> Config | None:
        """Return the config of the run in this folder, or None if there is none."""
        return load_config(self._config) if self._config.exists() else None

    def append_metrics(self, record: Record) -> None:
        """Append the record of one evaluation to `metrics.jsonl`."""
        append_durably(self._metrics, json.dumps(record, allow_nan=False))

    def read_metrics(self) -> list[Record]:
        """Return the records of all evaluations, in order, up to the first damaged line."""
        if not self._metrics.exists():
            return []
        records = []
        with name_file_in_errors(self._metrics):
            lines = self._metrics.read_bytes().splitlines()
        for line in lines:
            try:
                record = json.loads(line)
                MetricsLine.model_validate(record)
                records.append(record)
            except (ValueError, RecursionError):
                # A run that was killed during a write leaves an incomplete line. A resume repeats the evaluation.
                break
        return records

    def truncate_metrics(self, count: int) -> None:
        """Keep the first `count` records of `metrics.jsonl`, and drop the rest.

        A resumed run calls this method, and then repeats the evaluations of the dropped records.
        """
        kept = self.read_metrics()[:count]
        if len(kept) < count:
            log.warning(f"{self._metrics}: only {len(kept)} of the run's {count} evaluations are still there")
        if kept or self._metrics.exists():
            text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept)
            write_durably(self._metrics, text)

    def write_evaluation(self, evaluation: Record) -> None:
        """Write `evaluation.json`: the details of the evaluation in the last line of `metrics.jsonl`."""
        write_durably(self._evaluation, json.dumps(evaluation, allow_nan=False) + "\n")

    def read_evaluation(self) -> Record:
        """Return the content of `evaluation.json`, or an empty dict if the file is missing or damaged."""
        return _read_object(self._evaluation, EvaluationInDetail)

    def write_status(self, state: str, **fields: Any) -> None:
        """Write `status.json`: the state of the run, further fields, and the versions of the packages."""
        status = {"state": state, **fields, "versions": _versions()}
        text = json.dumps(status, indent=2, allow_nan=False) + "\n"
        write_durably(self._status, text)

    def read_status(self) -> Record:
        """Return the content of `status.json`, or an empty dict if the file is missing or damaged."""
        return _read_object(self._status, Status)


@functools.cache
def _versions() -> dict[str, str]:
    # Cached from the start of the run: when the run fails, the metadata files of the packages may be unreadable.
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {"resnext_ignite": __version__, "python": platform.python_version(), **versions}


def _read_object(path: Path, kind: type[BaseModel]) -> Record:
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
        kind.model_validate(found)
    except (OSError, ValueError, RecursionError):
        return {}
    return found


@dataclass(frozen=True)
class OpenRun:
    """A locked run folder, the config of the run, and the state to resume from, which is None for a new run.

    `changes` has one entry for each resume that changed config values, in order: the iteration, and (before, after) for
    each changed key. `unreadable` holds the checkpoints that were tried before `state` and could not be read; they may
    be readable later.
    """

    folder: RunFolder
    config: Config
    state: dict[str, Any] | None
    changes: list[Record]
    unreadable: frozenset[Path] = frozenset()

    def check_data(self, contents: dict[str, str]) -> None:
        """Check that a resumed run gets the same images as before the interruption.

        The random numbers of an image depend only on (seed, epoch, index). With other images, the resumed run would
        therefore differ from an uninterrupted run.

        Args:
            contents: split -> string that describes its images.

        Raises:
            RunFolderError: the images of a split differ; the message shows both descriptions.
        """
        before = contents if self.state is None else self.state["data"]
        for split, found in contents.items():
            if before.get(split) != found:
                raise RunFolderError(
                    f"{self.folder.path}: the data has changed: {split} was {before.get(split)}, and is {found}; "
                    "restore it, or start a new run"
                )


@contextlib.contextmanager
def open_run(path: Path, config: Config, ranks: Ranks, *, resume: bool) -> Iterator[OpenRun]:
    """Lock a run folder until the `with` block ends. With `resume`, load the newest checkpoint in the folder.

    If the block raises an error, `status.json` records it. Only rank 0 accesses the folder.

    Raises:
        RunFolderError: another process uses the folder; or the folder already contains a run, but `resume` is false; or
            the config would change the run.
        CheckpointError: there are checkpoints to resume from, but none can be used.
    """
    folder = RunFolder(path)

    def take() -> ResumePoint | None:
        if not resume and folder.holds_a_run():
            raise RunFolderError(f"{path}: holds a run already; add --resume, or choose another --output-dir")
        folder.lock()
        return newest_resume_point(folder.checkpoints) if resume else None

    try:
        point = ranks.from_rank_zero(take)
        changes: list[Record] = []
        if point is not None:
            saved = config_of_checkpoint(point.path, point.state)
            config = adopt_resolved(config, saved)
            changed = changed_values(config, saved)
            _refuse_changes(path, changed)
            iteration = point.state["trainer"]["iteration"]
            changes = [*point.state["changes"], *([{"iteration": iteration, **changed}] if changed else [])]
            log.info(f"resuming {path} from iteration {iteration}")
            for damaged in point.damaged if ranks.rank == 0 else ():
                set_aside(damaged)
        elif resume:
            log.info(f"nothing to resume in {path}: starting at iteration 0")
        try:
            state, unreadable = (None, ()) if point is None else (point.state, point.unreadable)
            yield OpenRun(folder, config, state, changes, frozenset(unreadable))
        except BaseException as error:
            if ranks.rank == 0:
                _write_failure(folder, error)
            raise
    finally:
        folder.unlock()


def _refuse_changes(path: Path, changes: dict[str, tuple[Any, Any]]) -> None:
    refused = [key for key in changes if key not in SAFE_ON_RESUME]
    if "train.epochs" in changes and changes["train.epochs"][1] < changes["train.epochs"][0]:
        refused.append("train.epochs")
    if refused:
        listed = ", ".join(f"{key} {changes[key][0]} -> {changes[key][1]}" for key in refused)
        raise RunFolderError(
            f"{path}: this config would change the run: {listed}; keep the old values, or start a new run"
        )


def _write_failure(folder: RunFolder, error: BaseException) -> None:
    known = as_resnext_error(error)
    folder.free_spare_descriptors()
    status = folder.read_status()
    if status.get("state") in ENDED:
        # The run ended normally at an earlier time, and has not trained since: training sets the state to "running".
        return
    before = {key: value for key, value in status.items() if key not in ("versions", "state")}
    fields = {**before, "exit_code": known.exit_code if known else 1, "reason": str(known or repr(error))}
    state = "preempted" if isinstance(known, PreemptedError) else "failed"
    # If the status cannot be written, for example to a full disk, this must not hide the error of the run.
    with contextlib.suppress(OSError):
        folder.write_status(state, **fields)
