"""The train command as a user runs it, on tiny real runs: what it writes, and that a cut run loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_ITERATIONS, at_iteration, digest, rig_errors, scalars, train_tiny, without_times
from ignite.engine import Engine
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resnext_ignite import evaluate, train
from resnext_ignite.config.files import load_config
from resnext_ignite.runs.checkpoint import load_checkpoint, verify_checkpoint
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    PreemptedError,
    RunFolderError,
    StorageError,
)
from resnext_ignite.training.handlers.log_point import LogPoint


def test_a_run_folder_holds_what_is_promised(finished_run: Path) -> None:
    records = RunFolder(finished_run).read_metrics()
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert [record["iteration"] for record in records] == [0, 4, 8, 12]
    for record in records:
        assert record["images"] == 37
        assert record["top1_error"] == pytest.approx(100 * (37 - record["correct"]) / 37)
    status = RunFolder(finished_run).read_status()
    assert (status["state"], status["exit_code"], status["iteration"]) == ("completed", 0, 12)
    assert status["last"] == records[-1]
    assert status["versions"]["torch"] == torch.__version__.split("+")[0]
    names = sorted(path.name for path in (finished_run / "checkpoints").glob("*.pt"))
    assert names == ["best.pt", "final.pt", "iteration_00000008.pt", "iteration_00000012.pt"]
    for name in names:
        verify_checkpoint(finished_run / "checkpoints" / name)
    with Image.open(finished_run / "curves.png") as picture:
        assert min(picture.size) > 500
    state = load_checkpoint(finished_run / "checkpoints/final.pt")
    promised = "format config model ema optimizer lr_scheduler scaler trainer handlers generators classes mean std"
    assert set(promised.split()) <= set(state)


def test_a_run_keeps_its_last_evaluation_in_detail(finished_run: Path, tmp_path: Path) -> None:
    last = RunFolder(finished_run).read_metrics()[-1]
    kept = RunFolder(finished_run).read_evaluation()
    assert list(kept) == ["split", "epoch", "iteration", "classes", "confusion", "mistakes"]
    assert (kept["split"], kept["epoch"], kept["iteration"]) == ("test", 3, 12)
    assert sum(count for _, _, count in kept["confusion"]) == 37
    assert sum(count for true, predicted, count in kept["confusion"] if true == predicted) == last["correct"]
    assert all(count > 0 for _, _, count in kept["confusion"])
    confused = {(true, predicted) for true, predicted, _ in kept["confusion"]}
    assert len(kept["mistakes"]) == 8
    for mistake in kept["mistakes"]:
        assert mistake["label"] != mistake["predicted"]
        assert (mistake["label"], mistake["predicted"]) in confused
    with Image.open(finished_run / "mistakes.png") as picture:
        assert picture.info["Description"] == "test, epoch 3, iteration 12"
    # Chosen on held-out images, the last record is that of the test split; and no TensorBoard is needed.
    assert train_tiny(tmp_path / "run", "data.val_size=10", "logging.mistakes=4", "train.epochs=1") == 0
    assert RunFolder(tmp_path / "run").read_evaluation()["split"] == "test"
    with Image.open(tmp_path / "run/mistakes.png") as picture:
        assert picture.info["Description"].startswith("test, epoch 1, iteration ")
    # What a longer run of itself no longer draws is not left beside it.
    assert train_tiny(tmp_path / "run", "data.val_size=10", "logging.mistakes=0", "train.epochs=2", resume=True) == 0
    assert not (tmp_path / "run/mistakes.png").exists()


def test_the_saved_config_repeats_the_run(finished_run: Path, tmp_path: Path) -> None:
    config = load_config(finished_run / "config.yaml")
    assert config.model.num_classes == 10
    assert config.train.precision == "fp32"
    assert config.data.mean is not None
    arguments = ["--config", str(finished_run / "config.yaml"), "--output-dir", str(tmp_path / "again")]
    assert train.main([*arguments, "logging.tensorboard=false"]) == 0
    assert digest(tmp_path / "again") == digest(finished_run)


def test_tensorboard_has_what_came_before_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(engine: Engine) -> None:
        raise NonFiniteError("iteration 9: the loss is not finite")

    at_iteration(9, fail, monkeypatch)
    with pytest.raises(NonFiniteError):
        train_tiny(tmp_path / "run", "logging.tensorboard=true", "logging.images=0")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert max(event.step for event in events.Scalars("train/loss")) == 8


def test_tensorboard_has_every_tag(finished_run: Path) -> None:
    events = EventAccumulator(str(finished_run)).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "train/images_per_s", "test/top1_error", "test/loss"} <= set(tags["scalars"])
    assert set(tags["images"]) == {"train/augmented", "test/confusion", "test/worst_mistakes"}
    assert "config/text_summary" in tags["tensors"]
    assert not any("hparam" in tag for tag in tags["scalars"])
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert any("conv1" in tag for tag in tags["histograms"])
    errors = [(event.step, event.value) for event in events.Scalars("test/top1_error")]
    records = RunFolder(finished_run).read_metrics()
    assert errors == [(r["iteration"], pytest.approx(r["top1_error"])) for r in records]
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    rates = [event.value for event in events.Scalars("train/lr")]
    # Triangular: up over 1.2 epochs of 4 iterations (5), then down by a seventh each; every second is logged.
    assert rates == pytest.approx([0.1 * factor for factor in (2 / 5, 4 / 5, 1, 5 / 7, 3 / 7, 1 / 7)])


RESUMED = ["checkpoint.every_iterations=1", "train.ema_decay=0.9", "logging.tensorboard=true", "logging.images=0"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train_tiny(folder, *RESUMED) == 0
    return folder


def killed_at(
    folder: Path, iteration: int, in_fork: Callable[[Callable[[], Any]], int], *overrides: str, resume: bool = False
) -> None:
    """Train in a child process that is killed, by SIGKILL, in the middle of an iteration."""

    def child() -> None:
        at_iteration(iteration, lambda engine: os.kill(os.getpid(), signal.SIGKILL))
        train_tiny(folder, *overrides, resume=resume)

    assert os.WTERMSIG(in_fork(child)) == signal.SIGKILL


@pytest.mark.parametrize("cut", range(1, TINY_ITERATIONS + 1))
def test_a_run_killed_at_any_iteration_ends_the_same(
    cut: int, uninterrupted: Path, tmp_path: Path, in_fork: Callable[[Callable[[], Any]], int]
) -> None:
    folder = tmp_path / "run"
    killed_at(folder, cut, in_fork, *RESUMED)
    status = RunFolder(folder).read_status()
    assert status["state"] == "running"
    assert train_tiny(folder, *RESUMED, resume=True) == 0
    assert digest(folder) == digest(uninterrupted)
    assert scalars(folder) == scalars(uninterrupted)


def test_a_run_killed_three_times_ends_the_same(tmp_path: Path, in_fork: Callable[[Callable[[], Any]], int]) -> None:
    # Each time two iterations are lost with the points they wrote, and made again.
    values = [*RESUMED, "checkpoint.every_iterations=3", "logging.every_iterations=1", "logging.mistakes=8"]
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert train_tiny(whole, *values) == 0
    for number, cut in enumerate((3, 6, 12)):
        killed_at(folder, cut, in_fork, *values, resume=number > 0)
    assert train_tiny(folder, *values, resume=True) == 0
    assert digest(folder) == digest(whole)
    assert scalars(folder) == scalars(whole)
    detail = RunFolder(whole).read_evaluation()
    assert len(detail["mistakes"]) == 8
    assert RunFolder(folder).read_evaluation() == detail


def test_scaler_generators_best_and_patience_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_fork: Callable[[Callable[[], Any]], int]
) -> None:
    # No evaluation after the first is that much better, so that patience ends the run after epoch 3.
    patience = [
        "train.epochs=5",
        "evaluation.early=[]",
        "evaluation.patience=2",
        "evaluation.min_delta=100",
    ]
    values = [*patience, "train.precision=fp16", "checkpoint.every_iterations=1"]
    update = LogPoint.__call__

    def with_a_draw(self: LogPoint, engine: Engine) -> None:
        torch.rand(1)
        update(self, engine)

    monkeypatch.setattr(LogPoint, "__call__", with_a_draw)
    rig_errors(monkeypatch, lambda epoch: {1: 50.0, 2: 40.0, 3: 60.0}[epoch])
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert train_tiny(whole, *values) == 0
    killed_at(folder, 10, in_fork, *values)
    assert train_tiny(folder, *values, resume=True) == 0
    assert digest(folder) == digest(whole)
    ours, theirs = (RunFolder(path).read_status() for path in (folder, whole))
    assert (ours["state"], ours["epoch"], ours["reason"]) == (theirs["state"], 3, theirs["reason"])
    assert without_times(ours["best"]) == without_times(theirs["best"])
    # It was before the cut.
    assert ours["best"]["epoch"] == 2
    best = [load_checkpoint(path / "checkpoints/best.pt")["trainer"]["iteration"] for path in (folder, whole)]
    assert best == [ours["best"]["iteration"]] * 2
    scaler = load_checkpoint(folder / "checkpoints/final.pt")["scaler"]
    assert scaler["_growth_tracker"] > 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_files_killed_and_resumed_ends_the_same(
    workers: int, picture_folder: Path, tmp_path: Path, in_fork: Callable[[Callable[[], Any]], int]
) -> None:
    values = [
        "data.name=imagefolder",
        f"data.root={picture_folder}",
        "data.train_size=null",
        "data.test_size=null",
        "data.image_size=24",
        "augment.random_resized_crop=true",
        "augment.color=0.4",
        "augment.lighting=0.1",
        "checkpoint.every_iterations=1",
        "train.batch_size=8",
    ]
    assert train_tiny(tmp_path / "whole", *values, "data.workers=0") == 0
    for cut in (3, 7):
        folder = tmp_path / f"cut{cut}"
        killed_at(folder, cut, in_fork, *values, f"data.workers={workers}")
        assert train_tiny(folder, *values, f"data.workers={workers}", resume=True) == 0
        assert digest(folder) == digest(tmp_path / "whole")


@pytest.mark.parametrize("iteration", [3, 4])
def test_a_signal_saves_and_exits_75(
    iteration: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    values = [*RESUMED, "checkpoint.every_iterations=0", "logging.every_iterations=1"]
    with monkeypatch.context() as patch:
        at_iteration(iteration, lambda engine: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(PreemptedError, match=f"SIGTERM and saved at iteration {iteration}") as caught:
            train_tiny(folder, *values)
    assert caught.value.exit_code == 75
    status = RunFolder(folder).read_status()
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert (folder / f"checkpoints/iteration_{iteration:08}.pt").exists()
    # At an epoch's last iteration its evaluation is left for the resumed run.
    assert train_tiny(folder, *RESUMED, "logging.every_iterations=2", resume=True) == 0
    assert digest(folder) == digest(uninterrupted)


def test_a_signal_during_start_up_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resnext_ignite.data as data

    def interrupt(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(data, "load_data", interrupt)
    with pytest.raises(KeyboardInterrupt, match="before there was anything to save"):
        train_tiny(tmp_path / "run")
    assert not RunFolder(tmp_path / "run").holds_a_run()


def test_the_time_limit_stops_resumably(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train_tiny(folder, *RESUMED, "train.max_hours=1e-9", "logging.every_iterations=1") == 0
    status = RunFolder(folder).read_status()
    assert (status["state"], status["exit_code"], status["iteration"]) == ("stopped_early", 0, 1)
    assert "max_hours" in status["reason"]
    assert train_tiny(folder, *RESUMED, resume=True) == 0
    assert digest(folder) == digest(uninterrupted)


def test_more_epochs_continue_a_finished_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train_tiny(folder, "train.epochs=1", "schedule.name=constant", "schedule.warmup_epochs=0") == 0
    constant = ["schedule.name=constant", "schedule.warmup_epochs=0"]
    assert train_tiny(folder, *constant, resume=True) == 0
    assert RunFolder(folder).read_status()["changes_on_resume"] == [{"iteration": 4, "train.epochs": [1, 3]}]
    # What was changed once is not forgotten by a resume that changes nothing more, or something else.
    assert train_tiny(folder, *constant, "train.epochs=4", resume=True) == 0
    changes = [{"iteration": 4, "train.epochs": [1, 3]}, {"iteration": 12, "train.epochs": [3, 4]}]
    assert RunFolder(folder).read_status()["changes_on_resume"] == changes
    constant += ["train.epochs=4"]
    assert train_tiny(tmp_path / "whole", *constant) == 0
    assert digest(folder) == digest(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert train_tiny(folder, "train.epochs=1", "data.val_size=20") == 0
    before = (folder / "metrics.jsonl").read_text(), (folder / "checkpoints/final.pt").read_bytes()
    first = capsys.readouterr().out
    assert train_tiny(folder, "train.epochs=1", "data.val_size=20", resume=True) == 0
    output = capsys.readouterr()
    assert output.out == first
    assert "already finished" in output.err
    assert ((folder / "metrics.jsonl").read_text(), (folder / "checkpoints/final.pt").read_bytes()) == before


def test_a_run_killed_after_its_last_save_is_brought_to_its_end(
    tmp_path: Path, in_fork: Callable[[Callable[[], Any]], int]
) -> None:
    from resnext_ignite.training.handlers.checkpointing import SaveCheckpoints

    def child() -> None:
        patch = pytest.MonkeyPatch()
        save = SaveCheckpoints.save_as

        def killed(self: SaveCheckpoints, name: str) -> None:
            if name == "final.pt":
                os.kill(os.getpid(), signal.SIGKILL)
            save(self, name)

        patch.setattr(SaveCheckpoints, "save_as", killed)
        train_tiny(tmp_path / "run", "data.val_size=20")

    assert os.WTERMSIG(in_fork(child)) == signal.SIGKILL
    assert train_tiny(tmp_path / "run", "data.val_size=20", resume=True) == 0
    assert train_tiny(tmp_path / "whole", "data.val_size=20") == 0
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_held_out_images_choose_and_the_test_split_is_read_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train_tiny(folder, "data.val_size=20") == 0
    records = RunFolder(folder).read_metrics()
    assert [record["split"] for record in records] == ["val"] * 4 + ["test"]
    assert [record["images"] for record in records] == [20] * 4 + [37]
    best = min((r for r in records[1:4]), key=lambda r: r["top1_error"])
    assert load_checkpoint(folder / "checkpoints/best.pt")["trainer"]["iteration"] == best["iteration"]
    capsys.readouterr()
    # A run means its best weights here, and they give the figure that the run itself read.
    assert evaluate.main(["--checkpoint", str(folder), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["correct"] == records[-1]["correct"]
    assert counted["loss"] == records[-1]["loss"]


def test_early_stopping_ends_the_run_with_its_epoch_saved(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train_tiny(folder, "evaluation.target_error=100") == 0
    status = RunFolder(folder).read_status()
    assert (status["state"], status["exit_code"], status["epoch"]) == ("stopped_early", 0, 1)
    assert "target_error" in status["reason"]
    assert (folder / "checkpoints/final.pt").exists()
    assert train_tiny(folder, "evaluation.target_error=100", resume=True) == 0
    assert RunFolder(folder).read_status()["iteration"] == 4


def test_evaluations_come_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train_tiny(folder, "train.epochs=5", "evaluation.every=3", "evaluation.early=[1]") == 0
    assert [record["epoch"] for record in RunFolder(folder).read_metrics()] == [1, 3, 5]


def test_a_number_that_is_not_finite_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"

    def poison(engine: Engine) -> None:
        engine.state.sums.check(torch.tensor(False), engine.state.iteration)

    at_iteration(7, poison, monkeypatch)
    with pytest.raises(NonFiniteError, match="iteration 7:") as caught:
        train_tiny(folder, "checkpoint.every_iterations=1", "logging.every_iterations=100")
    assert caught.value.exit_code == 5
    names = sorted(path.name for path in (folder / "checkpoints").glob("iteration*.pt"))
    assert names == ["iteration_00000005.pt", "iteration_00000006.pt"]
    assert RunFolder(folder).read_status()["exit_code"] == 5
    assert "NaN" not in (folder / "metrics.jsonl").read_text()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_holds_a_run_is_refused_untouched(finished_run: Path) -> None:
    before = tree(finished_run)
    with pytest.raises(RunFolderError, match="holds a run already; add --resume"):
        train_tiny(finished_run)
    assert tree(finished_run) == before


def test_a_config_that_would_change_the_run_is_refused(finished_run: Path) -> None:
    before = tree(finished_run)
    line = r"would change the run: optimizer\.lr 0\.1 -> 0\.2, train\.epochs 3 -> 2;"
    with pytest.raises(RunFolderError, match=line):
        train_tiny(finished_run, "optimizer.lr=0.2", "train.epochs=2", "logging.tensorboard=true", resume=True)
    after = tree(finished_run)
    assert {name for name in after if after[name] != before.get(name)} <= {str(finished_run / "status.json")}


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    try:
        with pytest.raises(RunFolderError, match="another process trains here"):
            train_tiny(tmp_path / "run")
    finally:
        folder.unlock()


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(StorageError, match="choose another --output-dir"):
            train_tiny(path)


def test_resuming_nothing_starts_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny(tmp_path / "run", "train.epochs=1", resume=True) == 0
    assert "nothing to resume" in capsys.readouterr().err


def test_resuming_only_damaged_checkpoints_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train_tiny(folder, "train.epochs=2") == 0
    for path in (folder / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="can be used") as caught:
        train_tiny(folder, "train.epochs=3", resume=True)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.batch_size=71", "train.batch_size: 71 is more than the 70"),
        ("model.num_classes=9", "model.num_classes: 9, but the data has 10"),
        ("train.sync_bn=true", None),
        ("train.device=cuda", "no GPU"),
    ],
)
def test_what_the_machine_or_the_data_forbids(tmp_path: Path, override: str, line: str | None) -> None:
    if override == "train.device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=line or "SyncBatchNorm|synchronised"):
        train_tiny(tmp_path / "run", override)
    assert not RunFolder(tmp_path / "run").holds_a_run()


def test_the_default_output_dir_tells_the_config(tmp_path: Path) -> None:
    assert train.default_output_dir(Path("configs/quickstart.yaml")).parent == Path("runs/quickstart")
    assert train.default_output_dir(Path("runs/mine/2026/config.yaml")).parent == Path("runs/mine")


def test_a_run_is_not_continued_on_other_data(tmp_path: Path, picture_folder: Path) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(picture_folder, root)
    values = ["data.name=imagefolder", "data.train_size=null", "data.test_size=null", "data.image_size=24"]
    values += ["schedule.name=constant"]
    assert train_tiny(tmp_path / "run", *values, f"data.root={root}", "train.epochs=1") == 0
    moved = root.rename(tmp_path / "moved")
    values += [f"data.root={moved}", "train.epochs=2"]
    (moved / "train/dark/00.png").rename(moved / "train/dark/20.png")
    line = r"the data has changed: train was 40 images, sha256 of names \w+, and is 40 images"
    with pytest.raises(RunFolderError, match=line):
        train_tiny(tmp_path / "run", *values, resume=True)
    (moved / "train/dark/20.png").rename(moved / "train/dark/00.png")
    (moved / "test/light/05.png").unlink()
    with pytest.raises(RunFolderError, match=r"test was 12 images.* and is 11 images"):
        train_tiny(tmp_path / "run", *values, resume=True)
    shutil.copy(picture_folder / "test/light/05.png", moved / "test/light")
    assert train_tiny(tmp_path / "run", *values, resume=True) == 0
