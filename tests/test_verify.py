"""The verify command: it finds all damage, says what a resume would take, and disturbs nothing."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_ITERATIONS, Payload

from resnext_ignite import verify
from resnext_ignite.runs import checkpoint
from resnext_ignite.runs.checkpoint import checksum_path, load_checkpoint, newest_resume_point, save_checkpoint
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import CheckpointError, RunFolderError, run_command

NEWEST, OLDER = "iteration_00000012.pt", "iteration_00000008.pt"
NAMES = [NEWEST, OLDER, "final.pt", "best.pt"]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def report_of(capsys: pytest.CaptureFixture[str], *paths: Path) -> tuple[list[dict[str, Any]], str]:
    """What `--json` says of runs, and the error that it ends with."""
    capsys.readouterr()
    error = ""
    try:
        assert verify.main([*map(str, paths), "--json"]) == 0
    except CheckpointError as caught:
        error = str(caught)
        assert "\n" not in error
    return json.loads(capsys.readouterr().out)["runs"], error


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_good_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(run)
    assert verify.main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "iteration", "epoch", "MiB", "resumable", "state"]
    assert [line.split()[0] for line in lines[1:5]] == NAMES
    size = f"{(run / 'checkpoints' / NEWEST).stat().st_size / 2**20:.1f}"
    assert lines[1].split()[1:] == [str(TINY_ITERATIONS), "3", size, "yes", "ok"]
    assert lines[2].split()[1:3] == ["8", "2"]
    assert lines[5:] == [f"resumes from {run}/checkpoints/{NEWEST} (iteration 12 of 12)"]
    assert files_of(run) == before


def test_the_form_of_the_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,), error = report_of(capsys, run)
    assert error == ""
    newest = run / "checkpoints" / NEWEST
    assert (found["run"], found["resumes_from"]) == (str(run), str(newest))
    assert found["checkpoints"][0] == {
        "file": str(newest),
        "iteration": 12,
        "epoch": 3,
        "bytes": newest.stat().st_size,
        "ok": True,
        "reason": None,
        "resumable": True,
    }
    assert [Path(file["file"]).name for file in found["checkpoints"]] == NAMES


def to_nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "with_sum", "reason"),
    [
        (lambda path: flip(path, path.stat().st_size // 2), True, "damaged: its sha256 is "),
        (lambda path: flip(path, 0), True, "damaged: its sha256 is "),
        (lambda path: flip(path, 0), False, "damaged: the CRC of its record "),
        (to_nothing, True, "damaged: its sha256 is "),
        (to_nothing, False, "damaged, or not a checkpoint"),
    ],
    ids=["a bit", "header", "header without sum", "empty", "empty without sum"],
)
def test_damage_is_named_and_passed_over(
    run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], with_sum: bool, reason: str
) -> None:
    newest = run / "checkpoints" / NEWEST
    damage(newest)
    if not with_sum:
        checksum_path(newest).unlink()
    (found,), error = report_of(capsys, run)
    first, *others = found["checkpoints"]
    assert (first["ok"], first["resumable"], first["iteration"]) == (False, False, None)
    assert first["reason"].startswith(reason)
    assert all(file["ok"] and file["resumable"] for file in others)
    assert error.startswith(f"{newest}: {first['reason']}; 1 of 4 checkpoints damaged")
    point = newest_resume_point(run / "checkpoints")
    assert point is not None
    assert found["resumes_from"] == str(point.path) == str(run / "checkpoints" / OLDER)
    with pytest.raises(CheckpointError):
        verify.main([str(run)])
    assert f"resumes from {run}/checkpoints/{OLDER} (iteration 8 of 12)" in capsys.readouterr().out.splitlines()


def test_without_its_sum_the_archive_vouches(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run / "checkpoints" / NEWEST
    checksum_path(newest).unlink()
    (found,), error = report_of(capsys, run)
    assert error == ""
    first = found["checkpoints"][0]
    assert (first["ok"], first["resumable"], first["reason"]) == (True, True, "no .sha256")
    assert found["resumes_from"] == str(newest)
    assert verify.main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("yes        ok (no .sha256)")


def test_all_damaged_and_several_runs(run: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        to_nothing(run / "checkpoints" / name)
    (good, bad), error = report_of(capsys, finished_run, run)
    assert good["resumes_from"] is not None
    assert bad["resumes_from"] is None
    assert "4 of 8 checkpoints damaged" in error
    with pytest.raises(CheckpointError):
        verify.main([str(run)])
    assert capsys.readouterr().out.endswith(f"{run}: cannot be resumed: all checkpoints are damaged\n")


def test_a_foreign_torch_file_is_not_ok(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = run / "checkpoints/best.pt"
    torch.save({"state_dict": {}}, foreign)
    checksum_path(foreign).unlink()
    with pytest.raises(CheckpointError, match=r"best\.pt: damaged: its format is None, .*1 of 4"):
        verify.main([str(run)])
    assert "damaged: its format is None" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("with_sum", [True, False])
def test_a_hostile_file_is_not_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, with_sum: bool
) -> None:
    path, sentinel = run / "checkpoints" / NEWEST, tmp_path / "sentinel"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(sentinel)))
    else:
        torch.save({"format": checkpoint.FORMAT, "model": Payload(sentinel)}, path)
    checksum_path(path).unlink()
    if with_sum:
        checkpoint._write_sums(path, [checkpoint.sha256_of(path)])
    (found,), error = report_of(capsys, run)
    assert not found["checkpoints"][0]["ok"]
    assert found["resumes_from"] == str(run / "checkpoints" / OLDER)
    assert error.startswith(f"{path}: ")
    assert not sentinel.exists()


def test_what_a_resume_needs_is_all_that_a_run_saves(finished_run: Path) -> None:
    """A part that is added to a run's state is either needed to go on, or said here not to be."""
    state = load_checkpoint(finished_run / "checkpoints/final.pt")
    facts = {"format", "config", "classes", "mean", "std", "image_size", "selection", "ema"}
    needed = {name.split(".")[0] for name in (*verify._PARTS, *verify._COUNTS)}
    assert set(state) == facts | needed
    handlers = {name.removeprefix("handlers.") for name in verify._PARTS if name.startswith("handlers.")}
    # Files of before `epoch_ends` go on as if the ends of all their epochs had been answered.
    assert set(state["handlers"]) == handlers | {"epoch_ends"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optimizer": None}, "without optimizer"),
        ({"handlers": {"best": {}, "log_point": {}}}, "without handlers.evaluation"),
        ({"trainer": {"iteration": "12", "epoch_length": 4}}, "without trainer.iteration"),
        ({"trainer": 3}, "without trainer.iteration, trainer.epoch_length"),
        ({"config": {"train": {"epocs": 1}}}, "its config is not one of this version"),
        ({"config": {"train": {"ema_decay": 0.9}}}, "without ema"),
    ],
)
def test_a_whole_file_that_cannot_be_resumed(
    run: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], reason: str
) -> None:
    path = run / "checkpoints" / NEWEST
    save_checkpoint(path, {**load_checkpoint(path), **change})
    (found,), error = report_of(capsys, run)
    first = found["checkpoints"][0]
    assert (first["ok"], first["resumable"]) == (True, False)
    assert first["reason"].startswith(reason)
    # A resume takes the first undamaged file, and fails on it.
    assert found["resumes_from"] is None
    assert error.startswith(f"{run}: cannot be resumed: {NEWEST} would be used, and is ok ({reason}")


def test_a_single_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run / "checkpoints/best.pt"
    (found,), error = report_of(capsys, best)
    assert error == ""
    assert found["run"] == found["resumes_from"] == str(best)
    flip(best, 100)
    with pytest.raises(CheckpointError, match=r"best\.pt: damaged: .*1 of 1"):
        verify.main([str(best)])


def test_what_is_left_over_is_mentioned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    for name in (".final.pt.tmp", "iteration_00000004.pt.sha256", "iteration_00000004.pt.damaged"):
        (folder / name).write_bytes(b"")
    assert verify.main([str(run)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("not a checkpoint: ")] == [
        "not a checkpoint: .final.pt.tmp: from a save that was killed, or is still running",
        "not a checkpoint: iteration_00000004.pt.damaged: set aside by a resume",
        "not a checkpoint: iteration_00000004.pt.sha256: without its checkpoint",
    ]


def test_what_is_no_run_or_has_no_checkpoint(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        verify.main([str(run), str(tmp_path)])
    with pytest.raises(RunFolderError, match="no such file or folder"):
        verify.main([str(tmp_path / "none")])
    # Before anything is checked: that may take a while.
    assert capsys.readouterr().out == ""
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="cannot be resumed: there is no checkpoint"):
        verify.main([str(run)])


def test_a_file_that_is_pruned_meanwhile_is_left_out(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.load_checkpoint

    def pruning(path: Path) -> dict[str, Any]:
        if path.name == OLDER:
            path.unlink()
        return real(path)

    monkeypatch.setattr(checkpoint, "load_checkpoint", pruning)
    (run / "checkpoints/final.pt").unlink()
    (found,), error = report_of(capsys, run)
    assert error == ""
    assert [Path(file["file"]).name for file in found["checkpoints"]] == [NEWEST, "best.pt"]


def test_a_file_that_is_replaced_meanwhile_is_checked_again(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the reading of its checksum and of its bytes `best.pt` is saved anew."""
    best = run / "checkpoints/best.pt"
    state, real = load_checkpoint(best), checkpoint.sha256_of

    def late(path: Path) -> str:
        if path == best:
            monkeypatch.setattr(checkpoint, "sha256_of", real)
            save_checkpoint(best, {**state, "generators": []})
        return real(path)

    monkeypatch.setattr(checkpoint, "sha256_of", late)
    (found,), error = report_of(capsys, run)
    assert error == ""
    assert checkpoint.sha256_of is real
    assert all(file["ok"] for file in found["checkpoints"])


@pytest.mark.parametrize(("damaged", "json_form", "code"), [(False, False, 0), (True, False, 4), (True, True, 4)])
def test_the_exit_codes(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damaged: bool,
    json_form: bool,
    code: int,
) -> None:
    if damaged:
        to_nothing(run / "checkpoints" / OLDER)
    monkeypatch.setattr(sys, "argv", ["verify", str(run), *(["--json"] if json_form else [])])
    with pytest.raises(SystemExit) as left:
        run_command(verify.main)
    assert left.value.code == code
    out, err = capsys.readouterr()
    assert out.count("\n") == (1 if json_form else 6)
    assert err.count("\n") == (1 if damaged else 0)
    assert not damaged or err.startswith(f"error: {run}/checkpoints/{OLDER}: damaged: ")


def test_it_needs_no_lock(run: Path) -> None:
    folder = RunFolder(run)
    folder.lock()
    try:
        assert verify.main([str(run)]) == 0
    finally:
        folder.unlock()
