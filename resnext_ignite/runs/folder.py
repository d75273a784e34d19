"""The run folder: its names, its lock, and the small files in it. Checkpoint files are `checkpoint.py`'s."""

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
    """One run's folder. Only rank 0 holds one; only one process at a time may write into it.

    Args:
        path: the folder; it is made by `lock`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # No soft lock where the file system has no locks: it is a plain file, and a killed run would leave it behind.
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
        """Whether anything of a run lies here."""
        return self._config.exists() or bool(resume_candidates(self.checkpoints))

    def lock(self) -> None:
        """Make the folder and take it for this process; the system frees it when the process ends, however.

        Raises:
            RunFolderError: another process has it.
            StorageError: it cannot be made or locked.
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
        # A process that has reached its limit of open files can close these, and then write why it failed.
        self._spare_descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(_SPARE_DESCRIPTORS)]

    def free_spare_descriptors(self) -> None:
        """Make room for the files that are written when a run has failed."""
        while self._spare_descriptors:
            os.close(self._spare_descriptors.pop())

    def unlock(self) -> None:
        """Free the folder."""
        self.free_spare_descriptors()
        # The system releases the lock anyway when this process ends.
        with contextlib.suppress(OSError):
            self._lock.release()

    def start(self, config: Config) -> None:
        """Write down a config and make room for checkpoints; what a killed process left half-written goes."""
        self.checkpoints.mkdir(exist_ok=True)
        remove_leftovers(self.checkpoints)
        # No more than what is a run's own: a user may have chosen a folder with files of his.
        for file in (self._config, self._metrics, self._status, self._evaluation, self.curves, self.mistakes):
            temporary_path(file).unlink(missing_ok=True)
        save_config(config, self._config)

    def saved_config(self) -> Config | None:
        """The config of the run that lies here."""
        return load_config(self._config) if self._config.exists() else None

    def append_metrics(self, record: Record) -> None:
        """Add one evaluation to `metrics.jsonl`."""
        append_durably(self._metrics, json.dumps(record, allow_nan=False))

    def read_metrics(self) -> list[Record]:
        """All evaluations, in order."""
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
                # The last line of a run that was killed while it wrote; the evaluation will be made again.
                break
        return records

    def keep_metrics(self, count: int) -> None:
        """Drop all evaluations after the first `count`: those a resumed run will make again."""
        kept = self.read_metrics()[:count]
        if len(kept) < count:
            log.warning(f"{self._metrics}: only {len(kept)} of the run's {count} evaluations are still there")
        if kept or self._metrics.exists():
            text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept)
            write_durably(self._metrics, text)

    def write_evaluation(self, evaluation: Record) -> None:
        """Write `evaluation.json`: what the last line of `metrics.jsonl` counts, in detail."""
        write_durably(self._evaluation, json.dumps(evaluation, allow_nan=False) + "\n")

    def read_evaluation(self) -> Record:
        """What `evaluation.json` says; empty where it is not there, or damaged."""
        return _read_object(self._evaluation, EvaluationInDetail)

    def write_status(self, state: str, **fields: Any) -> None:
        """Write `status.json`: the state of the run, fields of it, and the versions it runs on."""
        status = {"state": state, **fields, "versions": _versions()}
        text = json.dumps(status, indent=2, allow_nan=False) + "\n"
        write_durably(self._status, text)

    def read_status(self) -> Record:
        """What `status.json` says; empty where it is not there, or damaged."""
        return _read_object(self._status, Status)


@functools.cache
def _versions() -> dict[str, str]:
    # Read once, at the start: when a run fails, the packages' files may not be readable any more.
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
    """A run folder that is locked for this run, the config to run with, and the state to continue from, if any.

    `changes` are the resumes with other values, in order: the iteration, and by key (before, now). `unreadable` are
    newer checkpoints that could not be read, and may be readable another day.
    """

    folder: RunFolder
    config: Config
    state: dict[str, Any] | None
    changes: list[Record]
    unreadable: frozenset[Path] = frozenset()

    def check_data(self, contents: dict[str, str]) -> None:
        """Check that a continued run is given the images that it had before: all that is keyed by index rests on that.

        Raises:
            RunFolderError: the line says what differs.
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
    """Take a run folder for a new run, or for the continuation of the one in it, until the block ends.

    An error inside the block is written into `status.json`. Only rank 0 touches the folder.

    Raises:
        RunFolderError: it is in use, holds another run, or its run would be changed.
        CheckpointError: there are resume points, and none verifies.
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
        raise RunFolderError(f"{path}: this config would change the run: {listed}; keep those, or start a new run")


def _write_failure(folder: RunFolder, error: BaseException) -> None:
    known = as_resnext_error(error)
    folder.free_spare_descriptors()
    status = folder.read_status()
    if status.get("state") in ENDED:
        # It ended well, and nothing has been trained since: then it says "running".
        return
    before = {key: value for key, value in status.items() if key not in ("versions", "state")}
    fields = {**before, "exit_code": known.exit_code if known else 1, "reason": str(known or repr(error))}
    state = "preempted" if isinstance(known, PreemptedError) else "failed"
    # A status that cannot be written (a full disk) must not hide why the run failed.
    with contextlib.suppress(OSError):
        folder.write_status(state, **fields)
