"""What a resumed run must not lose, mistake or forget, whatever happened to the one before it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, at_iteration, digest, rig_errors, tensors, train_tiny
from ignite.engine import Engine, Events

from resnext_ignite import evaluate, export
from resnext_ignite.distributed.stopping import StopAgreement, StopReason
from resnext_ignite.runs import checkpoint
from resnext_ignite.runs.checkpoint import (
    checksum_path,
    iteration_checkpoint_path,
    iteration_checkpoints,
    load_checkpoint,
    outdated_checkpoints,
    save_checkpoint,
)
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime import devices
from resnext_ignite.runtime.errors import CheckpointError, DataError
from resnext_ignite.training import engines
from resnext_ignite.training.handlers import checkpointing

DIED = 86
# Of the tiny run with 20 of its 70 images held out, in batches of 16.
TRAINED_IN_AN_EPOCH = 3
OFTEN = ["checkpoint.every_iterations=1", "logging.every_iterations=1"]


def die(engine: Engine) -> None:
    os._exit(DIED)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, ranks: int) -> None:
    # Losses and gradients are still finite when the running variances no longer are.
    values = [*OFTEN, "train.ema_decay=0.9", "evaluation.every=3", "evaluation.early=[]", "schedule.name=constant"]

    def patch() -> None:
        place = devices.place

        def burst_later(*arguments: Any, **options: Any) -> torch.nn.Module:
            model = place(*arguments, **options)
            variance = next(buffer for name, buffer in model.named_buffers() if name.endswith("running_var"))

            def burst(engine: Engine) -> None:
                variance.fill_(torch.inf)

            at_iteration(6, burst)
            return model

        devices.place = burst_later

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


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_status_of_an_interrupted_run_names_the_iteration_that_is_saved(tmp_path: Path, ranks: int) -> None:
    folder = tmp_path / "run"
    # No evaluation has written the status since the start.
    values = ["evaluation.early=[]", "evaluation.every=3", "logging.every_iterations=1"]
    stop = lambda: at_iteration(6, lambda engine: os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    outcome = Command(folder, *values, ranks=ranks, patch=stop).wait()
    assert outcome.code == 75, outcome.stderr
    status = RunFolder(folder).read_status()
    saved = load_checkpoint(iteration_checkpoints(folder / "checkpoints")[0])["trainer"]["iteration"]
    assert (status["state"], status["exit_code"], status["iteration"], status["epoch"]) == ("preempted", 75, saved, 2)
    assert f"saved at iteration {saved}" in status["reason"]


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
    assert f"{folder} is already finished" in again.stderr
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


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")]
)
def test_a_file_that_does_not_fit_into_memory_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "iteration_00000001.pt"
    save_checkpoint(path, {"trainer": {"iteration": 1}})

    def hungry(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(torch, "load", hungry)
    with pytest.raises(type(error)):
        checkpoint.newest_resume_point(tmp_path)
    assert path.exists()


@pytest.mark.parametrize("when", ["verified", "loaded"])
def test_a_file_that_cannot_be_read_today_is_passed_over_and_left(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert Command(folder, *OFTEN, patch=lambda: at_iteration(6, die)).wait().code == DIED
    newest, before = iteration_checkpoints(folder / "checkpoints")
    owner, name = (checkpoint, "sha256_of") if when == "verified" else (torch, "load")
    read = getattr(owner, name)

    def failing(path: Path, **options: Any) -> Any:
        if path == newest:
            raise OSError(5, "Input/output error")
        return read(path, **options)

    monkeypatch.setattr(owner, name, failing)
    caplog.set_level("WARNING")
    point = checkpoint.newest_resume_point(folder / "checkpoints")
    assert point is not None
    assert (point.path, point.damaged, point.unreadable) == (before, (), (newest,))
    assert f"{newest}: Input/output error; resuming from {before} instead" in caplog.text


BEST_OF_FOUR = ["data.val_size=20", "train.epochs=4", "checkpoint.every_epochs=4", "evaluation.batch_size=5"]


@pytest.fixture(scope="module")
def best_in_epoch_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose epoch 2 is the best: the test split is read with its weights."""
    folder = tmp_path_factory.mktemp("best") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        rig_errors(monkeypatch, lambda epoch: abs(epoch - 2.0))
        assert train_tiny(folder, *BEST_OF_FOUR) == 0
    return folder


@pytest.mark.parametrize("when", ["last iteration", "evaluation", "time limit"])
def test_a_stop_at_the_end_of_the_best_epoch_keeps_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_in_epoch_2: Path, when: str
) -> None:
    rig_errors(monkeypatch, lambda epoch: abs(epoch - 2.0))
    values, last = BEST_OF_FOUR, 2 * TRAINED_IN_AN_EPOCH

    def stop_in_the_evaluation() -> None:
        create = engines.create_evaluator

        def with_hook(*args: Any, **kwargs: Any) -> Engine:
            evaluator = create(*args, **kwargs)
            batches = itertools.count(1)

            def send(engine: Engine) -> None:
                # After those of epochs 0 and 1, each of four batches.
                if next(batches) == 10:
                    os.kill(os.getpid(), signal.SIGTERM)

            evaluator.add_event_handler(Events.ITERATION_STARTED, send)
            return evaluator

        engines.create_evaluator = with_hook

    def wish_for_the_end() -> None:
        agreements = []
        remember = StopAgreement.__init__

        def remembered(stop: StopAgreement, *args: Any) -> None:
            remember(stop, *args)
            agreements.append(stop)

        StopAgreement.__init__ = remembered  # type: ignore[method-assign, assignment]
        at_iteration(last, lambda engine: agreements[-1].request_stop(StopReason.TIME_LIMIT))

    patch, code = {
        "last iteration": (lambda: at_iteration(last, lambda engine: os.kill(os.getpid(), signal.SIGTERM)), 75),
        "evaluation": (stop_in_the_evaluation, 75),
        "time limit": (wish_for_the_end, 0),
    }[when]
    folder = tmp_path / "run"
    outcome = Command(folder, *values, patch=patch).wait()
    assert outcome.code == code, outcome.stderr
    assert iteration_checkpoints(folder / "checkpoints")[0].name == f"iteration_{last:08}.pt"
    assert not (folder / "checkpoints/final.pt").exists()
    outcome = Command(folder, *values, resume=True).wait()
    assert outcome.code == 0, outcome.stderr
    assert "last weights" not in outcome.stderr
    assert digest(folder) == digest(best_in_epoch_2)
    assert digest(folder, "best.pt") == digest(best_in_epoch_2, "best.pt")
    assert load_checkpoint(folder / "checkpoints/best.pt")["trainer"]["iteration"] == last


def test_the_end_of_an_epoch_that_a_stop_cut_off_is_answered_once(tmp_path: Path) -> None:
    # No evaluation is due there; whatever else is attached to EPOCH_COMPLETED must not miss an epoch, or see one twice.
    ends = tmp_path / "ends"

    def note_ends() -> None:
        create = engines.create_trainer

        def with_hook(*args: Any, **kwargs: Any) -> Engine:
            trainer = create(*args, **kwargs)

            @trainer.on(Events.EPOCH_COMPLETED)
            def note(engine: Engine) -> None:
                with ends.open("a") as file:
                    file.write(f"{engine.state.epoch}\n")

            return trainer

        engines.create_trainer = with_hook

    def stop_at(iteration: int) -> None:
        note_ends()
        at_iteration(iteration, lambda engine: os.kill(os.getpid(), signal.SIGTERM))

    folder, values = tmp_path / "run", ["evaluation.every=3", "evaluation.early=[]", "logging.every_iterations=1"]
    for number, patch in enumerate((lambda: stop_at(4), lambda: stop_at(6))):
        assert Command(folder, *values, resume=number > 0, patch=patch).wait().code == 75
    assert Command(folder, *values, resume=True, patch=note_ends).wait().code == 0
    assert ends.read_text().split() == ["1", "2", "3"]


def test_a_checkpoint_of_before_epoch_ends_were_noted_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stop = Command(folder, *OFTEN, patch=lambda: at_iteration(4, lambda engine: os.kill(os.getpid(), signal.SIGTERM)))
    assert stop.wait().code == 75
    newest = iteration_checkpoints(folder / "checkpoints")[0]
    state = load_checkpoint(newest)
    assert state["handlers"].pop("epoch_ends") == {"last": 0}
    save_checkpoint(newest, state)
    assert train_tiny(folder, *OFTEN, resume=True) == 0
    assert train_tiny(tmp_path / "whole", *OFTEN) == 0
    assert digest(folder) == digest(tmp_path / "whole")


def test_a_run_of_an_earlier_version_resumes_bit_for_bit(tmp_path: Path) -> None:
    """A run folder as versions without `logging.curves` wrote it is resumed, evaluated and exported."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    values = [*OFTEN, "train.ema_decay=0.9", "train.lookahead=2", "evaluation.flip_tta=true", "data.val_size=10"]
    assert train_tiny(whole, *values) == 0
    assert Command(folder, *values, patch=lambda: at_iteration(6, die)).wait().code == DIED
    saved = folder / "config.yaml"
    lines = saved.read_text().splitlines(keepends=True)
    older = [line for line in lines if line.split(":")[0].strip() not in ("curves", "mistakes")]
    assert len(older) == len(lines) - 2
    saved.write_text("".join(older))
    for path in iteration_checkpoints(folder / "checkpoints"):
        state = load_checkpoint(path)
        del state["config"]["logging"]["curves"], state["config"]["logging"]["mistakes"]
        save_checkpoint(path, state)
    # What reads a checkpoint alone takes it as well as a resume does.
    earlier = str(iteration_checkpoints(folder / "checkpoints")[0])
    assert evaluate.main(["--checkpoint", earlier]) == 0
    weights = ["--format", "safetensors", "--output", str(tmp_path / "model.safetensors")]
    assert export.main(["--checkpoint", earlier, *weights]) == 0
    assert train_tiny(folder, *values, resume=True) == 0
    assert digest(folder) == digest(whole)


def test_a_new_checkpoint_is_not_pruned_for_newer_ones_that_cannot_be_read(tmp_path: Path) -> None:
    folder, often = tmp_path / "run", [*OFTEN, "evaluation.every=3", "evaluation.early=[]"]
    assert Command(folder, *often, patch=lambda: at_iteration(8, die)).wait().code == DIED
    away = {path: path.rename(tmp_path / path.name) for path in iteration_checkpoints(folder / "checkpoints")}
    assert [path.name for path in away] == ["iteration_00000007.pt", "iteration_00000006.pt"]
    # A disk that is not mounted today.
    for path in away:
        path.symlink_to("/not-mounted/" + path.name)
    # What can be read is of before them.
    assert Command(tmp_path / "early", *often, patch=lambda: at_iteration(3, die)).wait().code == DIED
    for path in (tmp_path / "early/checkpoints").glob("iteration_00000002.pt*"):
        path.rename(folder / "checkpoints" / path.name)
    assert Command(folder, *often, resume=True, patch=lambda: at_iteration(6, die)).wait().code == DIED
    names = [path.name for path in iteration_checkpoints(folder / "checkpoints")]
    assert names == [f"iteration_{number:08}.pt" for number in (7, 6, 5, 4)]
    assert train_tiny(folder, *often, resume=True) == 0
    assert train_tiny(tmp_path / "whole", *often) == 0
    assert digest(folder) == digest(tmp_path / "whole")


def test_only_what_is_older_than_the_newest_may_go(tmp_path: Path) -> None:
    paths = {number: iteration_checkpoint_path(tmp_path, number) for number in (1, 2, 3, 4, 5, 6)}
    for path in paths.values():
        path.touch()
    assert outdated_checkpoints(paths[6], 2) == [paths[number] for number in (4, 3, 2, 1)]
    assert outdated_checkpoints(paths[4], 2) == [paths[2], paths[1]]
    assert outdated_checkpoints(paths[1], 2) == []
    # A file that cannot be read is kept, and takes the place of none that can.
    assert outdated_checkpoints(paths[4], 2, {paths[6], paths[3]}) == [paths[1]]
