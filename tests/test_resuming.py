"""What a resumed run must not lose, mistake or forget, whatever happened to the one before it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, at_iteration, digest, rig_errors, tensors, train_tiny
from ignite.engine import Engine

from resnext_ignite import checkpoint, engines
from resnext_ignite.checkpoint import checksum_path, iteration_checkpoints, load_checkpoint, save_checkpoint
from resnext_ignite.errors import CheckpointError, DataError
from resnext_ignite.handlers import checkpointing
from resnext_ignite.run_folder import RunFolder

DIED = 86
OFTEN = ["checkpoint.every_iterations=1", "logging.every_iterations=1"]


def die(engine: Engine) -> None:
    os._exit(DIED)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, ranks: int) -> None:
    # Losses and gradients are still finite when the running variances no longer are.
    values = [*OFTEN, "train.ema_decay=0.9", "evaluation.every=3", "evaluation.early=[]", "schedule.name=constant"]

    def patch() -> None:
        place = engines.place

        def burst_later(*arguments: Any, **options: Any) -> torch.nn.Module:
            model = place(*arguments, **options)
            variance = next(buffer for name, buffer in model.named_buffers() if name.endswith("running_var"))

            def burst(engine: Engine) -> None:
                variance.fill_(torch.inf)

            at_iteration(6, burst)
            return model

        engines.place = burst_later

    outcome = Command(tmp_path / "run", *values, ranks=ranks, patch=patch).wait()
    assert outcome.code == 5, outcome.stderr
    (line,) = outcome.errors
    assert line.startswith("error: iteration 6: ")
    assert "running_var is not finite after this update; lower optimizer.lr" in line
    files = list((tmp_path / "run/checkpoints").glob("*.pt"))
    assert {path.name for path in files} == {"iteration_00000004.pt", "iteration_00000005.pt"}
    for path in files:
        state = load_checkpoint(path)
        for part in ("model", "ema", "optimizer", "statistics"):
            assert all(tensor.isfinite().all() for tensor in tensors(state[part]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_checkpoint_is_read_does_not_make_it_damaged(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    assert Command(folder, *OFTEN, patch=lambda: at_iteration(6, die)).wait().code == DIED
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())

    def patch() -> None:
        load = torch.load

        def interrupted(*args: Any, **options: Any) -> Any:
            os.kill(os.getpid(), number)
            return load(*args, **options)

        torch.load = interrupted

    outcome = Command(folder, *OFTEN, resume=True, patch=patch).wait()
    assert (outcome.code, outcome.left) == (75, []), outcome.stderr
    assert outcome.errors == [f"error: stopped by {number.name} before there was anything to save"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    assert train_tiny(folder, *OFTEN, resume=True) == 0
    assert train_tiny(tmp_path / "whole", *OFTEN) == 0
    assert digest(folder) == digest(tmp_path / "whole")


def test_a_signal_is_heard_though_iterations_have_become_slow(tmp_path: Path) -> None:
    def patch() -> None:
        began = time.monotonic()

        def slow_down(engine: Engine) -> None:
            if time.monotonic() - began > 3:
                if not hasattr(engine, "told"):
                    engine.told = True
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)

        at_iteration(None, slow_down)

    values = ["logging.every_iterations=100000", "train.epochs=1", "data.train_size=4000", "train.batch_size=4"]
    outcome = Command(tmp_path / "run", *values, patch=patch).wait()
    assert outcome.code == 75, outcome.stderr
    assert outcome.seconds < 3 + 4


def test_the_best_weights_are_those_of_the_best_record_wherever_the_run_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig_errors(monkeypatch, lambda epoch: 100.0 - epoch)

    def die_once_it_is_kept() -> None:
        save = checkpointing.save_checkpoint

        def saved(path: Path, state: dict[str, Any]) -> None:
            save(path, state)
            if path.name == "best.pt" and state["trainer"]["iteration"] == 6:
                os._exit(DIED)

        checkpointing.save_checkpoint = saved

    folder, values = tmp_path / "run", ["data.val_size=20", "train.epochs=4", "checkpoint.every_epochs=4"]
    assert Command(folder, *values, patch=die_once_it_is_kept).wait().code == DIED
    # No further evaluation but the last, which a time limit leaves out.
    stop = ["evaluation.every=4", "train.max_hours=1e-9", "logging.every_iterations=1"]
    outcome = Command(folder, *values, *stop, resume=True).wait()
    assert outcome.code == 0, outcome.stderr
    best = RunFolder(folder).read_status()["best"]
    assert best["iteration"] == load_checkpoint(folder / "checkpoints/best.pt")["trainer"]["iteration"] == 6
    assert "last weights" not in outcome.stderr


def test_a_run_that_stopped_early_between_saves_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    values = ["checkpoint.every_iterations=3", "checkpoint.every_epochs=2", "evaluation.target_error=100"]
    assert train_tiny(folder, *values) == 0
    assert RunFolder(folder).read_status()["state"] == "stopped_early"
    again = Command(folder, *values, resume=True).wait()
    assert again.code == 0, again.stderr
    assert "resuming" in again.stderr
    assert f"{folder} is finished already" in again.stderr
    assert len(RunFolder(folder).read_metrics()) == 2


def test_a_damaged_status_costs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train_tiny(folder, "train.epochs=1") == 0
    for content in ("", "[]", '{"state": '):
        (folder / "status.json").write_text(content)
        assert train_tiny(folder, "train.epochs=1", resume=True) == 0
        assert json.loads((folder / "status.json").read_text())["state"] == "completed"


def test_a_resume_that_fails_leaves_a_completed_run_completed(tmp_path: Path, picture_folder: Path) -> None:
    folder = tmp_path / "run"
    values = ["data.name=imagefolder", "data.train_size=null", "data.test_size=null", "data.image_size=24"]
    values += ["train.epochs=1", "data.workers=0", "train.batch_size=8"]
    assert train_tiny(folder, *values, f"data.root={picture_folder}") == 0
    before = (folder / "status.json").read_bytes()
    with pytest.raises(DataError):
        train_tiny(folder, *values, "data.root=/nowhere", resume=True)
    assert (folder / "status.json").read_bytes() == before
    # A damaged one does not hide why a run failed.
    (folder / "status.json").write_text("")
    with pytest.raises(DataError, match="nowhere"):
        train_tiny(folder, *values, "data.root=/nowhere", resume=True)
    assert RunFolder(folder).read_status()["exit_code"] == 3


def test_a_run_removes_no_file_of_the_users(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    mine = [folder / name for name in (".mine.tmp", "model.pt.sha256")]
    for path in mine:
        path.write_text("precious")
    (folder / ".status.json.tmp").write_text("of a run that was killed")
    assert train_tiny(folder, "train.epochs=1") == 0
    assert all(path.read_text() == "precious" for path in mine)
    assert not (folder / ".status.json.tmp").exists()


def test_a_damaged_file_is_set_aside_with_its_checksum(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert Command(folder, *OFTEN, patch=lambda: at_iteration(6, die)).wait().code == DIED
    newest = iteration_checkpoints(folder / "checkpoints")[0]
    proof = checksum_path(newest).read_bytes()
    newest.write_bytes(newest.read_bytes()[:-1])
    assert train_tiny(folder, *OFTEN, resume=True) == 0
    assert checksum_path(newest).with_name(checksum_path(newest).name + ".damaged").read_bytes() == proof


def test_a_whole_file_of_another_version_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert Command(folder, *OFTEN, patch=lambda: at_iteration(6, die)).wait().code == DIED
    newest = iteration_checkpoints(folder / "checkpoints")[0]
    save_checkpoint(newest, {**load_checkpoint(newest), "format": "resnext_ignite/2"})
    content = newest.read_bytes()
    with pytest.raises(CheckpointError, match="its format is 'resnext_ignite/2', not 'resnext_ignite/1'"):
        train_tiny(folder, *OFTEN, resume=True)
    assert newest.read_bytes() == content


def test_a_file_that_cannot_be_read_today_is_passed_over_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert Command(folder, *OFTEN, patch=lambda: at_iteration(6, die)).wait().code == DIED
    newest, before = iteration_checkpoints(folder / "checkpoints")
    read = checkpoint.sha256_of

    def failing(path: Path, **options: bool) -> str:
        if path == newest:
            raise OSError(5, "Input/output error")
        return read(path, **options)

    monkeypatch.setattr(checkpoint, "sha256_of", failing)
    caplog.set_level("WARNING")
    point = checkpoint.newest_resume_point(folder / "checkpoints")
    assert point is not None
    assert (point.path, point.damaged) == (before, ())
    assert f"{newest}: Input/output error; resuming from {before} instead" in caplog.text
