"""Writes checkpoint files durably, verifies and reads them, and builds a model from a checkpoint.

`training/handlers/checkpointing.py` defines the content of a checkpoint, and when checkpoints are written and removed.
"""

from __future__ import annotations

import contextlib
import logging
import re
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import ValidationError
from torch import nn

from resnext_ignite.config.schema import Config, config_of
from resnext_ignite.models import build_model
from resnext_ignite.runtime.errors import CheckpointError, DamagedError, ForeignFileError, as_out_of_memory
from resnext_ignite.runtime.storage import HashingFile, replace_durably, sha256_of, write_durably

log = logging.getLogger(__name__)
FORMAT = "resnext_ignite/1"
_ITERATION_FILE = re.compile(r"iteration_(\d{8,})\.pt")


def checksum_path(path: Path) -> Path:
    """Return the path of a checkpoint's checksum file, which is in the same folder and contains the sha256."""
    return path.with_name(path.name + ".sha256")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: sync the data, read it back and compare, sync the checksum, rename, sync the folder.

    Raises:
        OSError: a write failed. `path` is then the old file or the complete new file; in both cases, it matches its
            checksum file.
        CheckpointError: the data that was read back differs from the data that was written.
    """
    replaced = _sums_of_existing(path)
    digest = ""

    def write(file: IO[bytes]) -> None:
        nonlocal digest
        hashing = HashingFile(file)
        try:
            torch.save({"format": FORMAT, **state}, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:
            # After a failed write, torch tries to close its archive. This fails too, and torch raises this second error
            # ('unexpected pos'). Raise the first error instead.
            raise hashing.error or error from None
        digest = hashing.hash.hexdigest()

    def check(temporary: Path) -> None:
        found = sha256_of(temporary, from_disk=True)
        if found != digest:
            raise CheckpointError(f"{path}: read back with sha256 {found}, not {digest}; the storage is failing")
        # Store both checksums: until the rename, the file at `path` is still the old one.
        _write_sums(path, [digest, *replaced])

    replace_durably(path, write, before_rename=check)
    if replaced:
        _write_sums(path, [digest])


def _sums_of_existing(path: Path) -> list[str]:
    """Return the stored checksums of the file at `path`.

    If there is no checksum (for example, because only the checkpoint was copied) and the file is intact, compute it.
    """
    sums = _read_sums(path)
    if not sums and path.exists():
        # If the old file fails this check, no run can use it. A failed save then need not preserve it.
        with contextlib.suppress(CheckpointError, OSError):
            verify_archive(path)
            sums = [sha256_of(path)]
    return sums


def _write_sums(path: Path, digests: list[str]) -> None:
    # Use the format of sha256sum, so that `sha256sum -c` can check the checkpoint too.
    text = "".join(f"{digest}  {path.name}\n" for digest in digests)
    write_durably(checksum_path(path), text)


def _read_sums(path: Path) -> list[str]:
    beside = checksum_path(path)
    if not beside.exists():
        return []
    lines = beside.read_text(encoding="ascii", errors="replace").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def verify_checkpoint(path: Path) -> None:
    """Check a file against the checksum file beside it or, if there is none, against the CRCs in its archive.

    Raises:
        DamagedError: the file is damaged; the message names it.
        CheckpointError: the file cannot be read.
    """
    try:
        if checksum_path(path).exists():
            expected, found = _read_sums(path), sha256_of(path)
            if found not in expected:
                raise DamagedError(f"{path}: damaged: its sha256 is {found}, not {' or '.join(expected) or 'known'}")
            return
        verify_archive(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def verify_archive(path: Path) -> None:
    """Check a file from torch.save against the CRCs that the file contains; torch.load does not check these CRCs.

    Raises:
        DamagedError: a CRC is wrong.
        ForeignFileError: the file is not a zip archive, or is only a part of a zip archive.
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError):
        # zipfile raises any of these for a damaged central directory.
        raise ForeignFileError(f"{path}: damaged, or not a checkpoint") from None
    if damaged is not None:
        raise DamagedError(f"{path}: damaged: the CRC of its record {damaged} is wrong")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Verify a checkpoint, and return its content, with all tensors on the CPU.

    Raises:
        DamagedError: the file is damaged.
        ForeignFileError: the file is not a checkpoint of this project. The class is a subclass of DamagedError.
        CheckpointError: the file cannot be read, or has the format of another version.
    """
    verify_checkpoint(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        # The file has just been verified; only the storage can have caused the error.
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        if as_out_of_memory(error):
            raise
        # A malicious or foreign file can make torch raise any exception; raise a one-line error instead.
        reason = " ".join(str(error).split())[:120]
        raise ForeignFileError(f"{path}: not a checkpoint of this project ({reason})") from None
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        kind = CheckpointError if str(found).startswith(FORMAT.partition("/")[0]) else ForeignFileError
        raise kind(f"{path}: its format is {found!r}, not {FORMAT!r}")
    return state


def config_of_checkpoint(path: Path, state: dict[str, Any]) -> Config:
    """Return the config in a checkpoint.

    Raises:
        CheckpointError: the config is missing or not valid for this version.
    """
    try:
        return config_of(state["config"])
    except (KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path}: its config is not one of this version ({reason})") from None


def iteration_checkpoints(folder: Path) -> list[Path]:
    """Return the resume points of a folder, newest first.

    The iteration in the file name defines the order, because file times are unreliable.
    """
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _ITERATION_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def outdated_checkpoints(newest: Path, keep: int, unreadable: Collection[Path] = ()) -> list[Path]:
    """Return the resume points to remove after `newest` was written and verified.

    `newest` and the `keep` - 1 resume points before it remain; all older ones are removed. Files that are newer than
    `newest` and files in `unreadable` are neither removed nor counted.
    """
    newest_first = [path for path in iteration_checkpoints(newest.parent) if path not in unreadable]
    return newest_first[newest_first.index(newest) + keep :]


def iteration_checkpoint_path(folder: Path, iteration: int) -> Path:
    """Return the path of the resume point after an iteration."""
    return folder / f"iteration_{iteration:08d}.pt"


def resume_candidates(folder: Path) -> list[Path]:
    """Return the files that a run can resume from; a resume tries them in this order.

    First come the resume points, newest first; then `final.pt` and `best.pt`, which also contain a complete state.
    """
    return [*iteration_checkpoints(folder), *(p for p in (folder / "final.pt", folder / "best.pt") if p.exists())]


@dataclass(frozen=True)
class ResumePoint:
    """The path and the content of a verified checkpoint.

    `damaged` and `unreadable` are the checkpoints that were tried before it and could not be used.
    """

    path: Path
    state: dict[str, Any]
    damaged: tuple[Path, ...] = ()
    unreadable: tuple[Path, ...] = ()


def newest_resume_point(folder: Path) -> ResumePoint | None:
    """Return the first resume candidate that is readable and undamaged, or None if there are no candidates.

    Raises:
        CheckpointError: all candidates are damaged or unreadable; or the candidate to return is of another version.
    """
    unusable: dict[Path, CheckpointError] = {}
    for path in resume_candidates(folder):
        try:
            state = load_checkpoint(path)
        except DamagedError as error:
            unusable[path] = error
            continue
        except CheckpointError as error:
            if not isinstance(error.__context__, OSError):
                raise
            unusable[path] = error
            continue
        reasons = "; ".join(map(str, unusable.values()))
        if reasons:
            log.warning("%s; resuming from %s instead", reasons, path)
        # A file that cannot be read now does not count as damaged: it may be readable later.
        damaged = tuple(p for p, e in unusable.items() if isinstance(e, DamagedError))
        return ResumePoint(path, state, damaged, tuple(p for p in unusable if p not in damaged))
    if unusable:
        raise CheckpointError(
            f"no checkpoint in {folder} can be used: {'; '.join(map(str, unusable.values()))}; "
            "restore one, or start a new run with another --output-dir"
        )
    return None


def set_aside(path: Path) -> None:
    """Rename a damaged file and its checksum to `*.damaged`, so that the next save does not replace them."""
    for file in (path, checksum_path(path)):
        if file.exists():
            file.replace(file.with_name(file.name + ".damaged"))


def remove_leftovers(folder: Path) -> None:
    """Remove the files that a killed process left: partly written files, and checksum files without a checkpoint."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("*.pt.sha256")]:
        if path.suffix == ".tmp" or not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint file of a run folder; if `path` is not a folder, return it unchanged.

    The checkpoint of a run is `best.pt` if the run selected it on held-out images (split "val"), else `final.pt`, else
    the newest resume point.

    Raises:
        CheckpointError: the run folder has no checkpoint, or `best.pt` cannot be used.
    """
    if not path.is_dir():
        return path
    folder = path / "checkpoints"
    best, final = folder / "best.pt", folder / "final.pt"
    candidates = [final, *iteration_checkpoints(folder)]
    if best.exists() and load_checkpoint(best)["selection"] == "val":
        candidates.insert(0, best)
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise CheckpointError(f"{path}: a run without a checkpoint; name a checkpoint file or a run folder")


@dataclass(frozen=True)
class ModelMetadata:
    """The metadata of a model: everything that is needed to prepare its input and to name its classes.

    `errors` contains the records of the last and the best evaluation. The best is selected on the split `selection`.
    `config` is the resolved config. `source` is None for weights from a run of this project. For other weights,
    `source` names the system that they come from, and `config` describes only the model and the normalisation.
    """

    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    iteration: int
    errors: dict[str, Any]
    selection: str
    source: str | None
    config: Config


def load_model(path: str | Path) -> tuple[nn.Module, ModelMetadata]:
    """Return a model in eval mode on the CPU, from a checkpoint file or a run folder, and its metadata.

    If the run averaged its weights (`train.ema_decay`, `train.ema_horizon`), the model has the averaged weights: the
    run's own evaluations used the averaged weights, too.

    Raises:
        CheckpointError: there is no usable checkpoint.
    """
    file = find_checkpoint(Path(path))
    return model_of(load_checkpoint(file), file)


def model_of(state: dict[str, Any], file: Path) -> tuple[nn.Module, ModelMetadata]:
    """Return a model and its metadata, as `load_model` does, from the content of a checkpoint; errors name `file`."""
    config = config_of_checkpoint(file, state)
    try:
        model = build_model(config)
        model.load_state_dict(state.get("ema") or state["model"])
        metadata = ModelMetadata(
            classes=tuple(state["classes"]),
            mean=tuple(state["mean"]),
            std=tuple(state["std"]),
            image_size=state["image_size"],
            iteration=state["trainer"]["iteration"],
            errors=state["errors"],
            selection=state["selection"],
            source=state.get("source"),
            config=config,
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if as_out_of_memory(error):
            raise
        raise CheckpointError(f"{file}: does not fit its model: {' '.join(str(error).split())[:200]}") from None
    return model.eval(), metadata
