"""The checkpoint file: written durably, verified, read with `weights_only`; and a model from it, without an engine.

What a run puts into the file is `handlers/checkpointing.py`'s; when it is written and which older ones go, too.
"""

from __future__ import annotations

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
    """The file beside a checkpoint that holds its sha256."""
    return path.with_name(path.name + ".sha256")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: data synced, read back and compared, checksum synced, renamed, folder synced.

    Raises:
        OSError: what was under `path` is still there, and still verifies.
        CheckpointError: what was read back is not what was written.
    """
    replaced = _read_sums(path)
    digest = ""

    def write(file: IO[bytes]) -> None:
        nonlocal digest
        hashing = HashingFile(file)
        try:
            torch.save({"format": FORMAT, **state}, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch closes its archive after a failed write, fails again, and tells that: 'unexpected pos'.
            raise hashing.error or error from None
        digest = hashing.hash.hexdigest()

    def check(temporary: Path) -> None:
        found = sha256_of(temporary, from_disk=True)
        if found != digest:
            raise CheckpointError(f"{path}: read back with sha256 {found}, not {digest}; the storage is failing")
        # Until the rename, the sum of the file that is replaced stays good as well.
        _write_sums(path, [digest, *replaced])

    replace_durably(path, write, before_rename=check)
    if replaced:
        _write_sums(path, [digest])


def _write_sums(path: Path, digests: list[str]) -> None:
    # The lines of sha256sum, so that `sha256sum -c` checks it too.
    text = "".join(f"{digest}  {path.name}\n" for digest in digests)
    write_durably(checksum_path(path), text)


def _read_sums(path: Path) -> list[str]:
    beside = checksum_path(path)
    if not beside.exists():
        return []
    lines = beside.read_text(encoding="ascii", errors="replace").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def verify_checkpoint(path: Path) -> None:
    """Check a file against the checksum beside it; without one, against its archive's CRCs.

    Raises:
        DamagedError: it is damaged; the line names it.
        CheckpointError: it cannot be read.
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
    """Check a file that torch.save wrote against the CRCs in it, which torch.load does not.

    Raises:
        DamagedError: one is wrong.
        ForeignFileError: it is no such archive, or a part of one.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError):
        # A damaged directory makes zipfile raise any of these.
        raise ForeignFileError(f"{path}: damaged, or not a checkpoint") from None
    if damaged is not None:
        raise DamagedError(f"{path}: damaged: the CRC of its record {damaged} is wrong")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The verified content of a checkpoint, on the CPU.

    Raises:
        DamagedError: it is damaged, or (ForeignFileError) not a checkpoint of this project.
        CheckpointError: it cannot be read, or is of another version's format.
    """
    verify_checkpoint(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        # It was whole a moment ago: the storage is at fault, and not the file.
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        if as_out_of_memory(error):
            raise
        # Whatever a hostile or foreign file makes torch say, it is refused in one line.
        reason = " ".join(str(error).split())[:120]
        raise ForeignFileError(f"{path}: not a checkpoint of this project ({reason})") from None
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        kind = CheckpointError if str(found).startswith(FORMAT.partition("/")[0]) else ForeignFileError
        raise kind(f"{path}: its format is {found!r}, not {FORMAT!r}")
    return state


def config_of_checkpoint(path: Path, state: dict[str, Any]) -> Config:
    """The config in a checkpoint.

    Raises:
        CheckpointError: it is none that this version understands.
    """
    try:
        return config_of(state["config"])
    except (KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path}: its config is not one of this version ({reason})") from None


def iteration_checkpoints(folder: Path) -> list[Path]:
    """The resume points of a folder, newest first, by the iteration in their names: file times prove nothing."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _ITERATION_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def outdated_checkpoints(newest: Path, keep: int, unreadable: Collection[Path] = ()) -> list[Path]:
    """The resume points that may go after `newest` was written and verified, so that `keep` are left.

    Only what is older than `newest` may go. Newer files and `unreadable` ones do not count among the `keep`.
    """
    newest_first = [path for path in iteration_checkpoints(newest.parent) if path not in unreadable]
    return newest_first[newest_first.index(newest) + keep :]


def iteration_checkpoint_path(folder: Path, iteration: int) -> Path:
    """Where the resume point after an iteration lies."""
    return folder / f"iteration_{iteration:08d}.pt"


def resume_candidates(folder: Path) -> list[Path]:
    """What a run can be continued from, in the order in which it is tried: the newest resume points first.

    `final.pt` and `best.pt` hold a whole state too, and are better than nothing.
    """
    return [*iteration_checkpoints(folder), *(p for p in (folder / "final.pt", folder / "best.pt") if p.exists())]


@dataclass(frozen=True)
class ResumePoint:
    """A verified state, the file it is from, and those before it that are damaged or cannot be read today."""

    path: Path
    state: dict[str, Any]
    damaged: tuple[Path, ...] = ()
    unreadable: tuple[Path, ...] = ()


def newest_resume_point(folder: Path) -> ResumePoint | None:
    """The first of the resume candidates that verifies; None where there is none at all.

    Raises:
        CheckpointError: there are some, and none can be used; or the newest is of another version, and whole.
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
        # What could not be read today may be whole tomorrow.
        damaged = tuple(p for p, e in unusable.items() if isinstance(e, DamagedError))
        return ResumePoint(path, state, damaged, tuple(p for p in unusable if p not in damaged))
    if unusable:
        raise CheckpointError(
            f"no checkpoint in {folder} can be used: {'; '.join(map(str, unusable.values()))}; "
            "restore one, or start anew with another --output-dir"
        )
    return None


def set_aside(path: Path) -> None:
    """Take a damaged file out of the way of the next one of its name, without destroying the evidence."""
    for file in (path, checksum_path(path)):
        if file.exists():
            file.replace(file.with_name(file.name + ".damaged"))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed save or prune left: half-written files, and checksums without their file."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("*.pt.sha256")]:
        if path.suffix == ".tmp" or not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def find_checkpoint(path: Path) -> Path:
    """The file a FILE or RUN folder means: `best.pt` where images were held out, else `final.pt`, else the newest.

    Raises:
        CheckpointError: there is none.
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
    """What goes with the weights: enough to feed the model and to name its answers.

    `errors` holds the run's records of its last and best evaluation, the best on the split `selection`; `config` is the
    resolved config. `source` is the other system that the weights are from, of which the config says no more than the
    network and the normalisation; None: a run of this project's.
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
    """A model in eval mode on the CPU, from a checkpoint file or a run folder, and its metadata.

    The averaged weights (`train.ema_decay`, `train.ema_horizon`) where there are any: they are what was evaluated.

    Raises:
        CheckpointError: no usable checkpoint.
    """
    file = find_checkpoint(Path(path))
    return model_of(load_checkpoint(file), file)


def model_of(state: dict[str, Any], file: Path) -> tuple[nn.Module, ModelMetadata]:
    """`load_model` of a checkpoint's content; `file` is named in errors."""
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
