"""A hopeless run that ends by itself: `evaluation.abandon` as a config, as a verdict, and in real runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, Command, rig_errors, train_tiny
from ignite.engine import Engine

from resnext_ignite.config.files import dump_config, load_config
from resnext_ignite.config.schema import Config, with_values
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.distributed.stopping import StopAgreement, StopReason
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import ConfigError, RunFolderError
from resnext_ignite.training.handlers.checkpointing import SaveCheckpoints
from resnext_ignite.training.handlers.evaluation import BestRecord

REASON = "abandoned: 62.1 % after epoch 2, above the 60 % of evaluation.abandon"


def configured(*overrides: str) -> Config:
    return load_config(ROOT / "configs/quickstart.yaml", [*TINY, *overrides])


@pytest.mark.parametrize("written", ["{5: 60.0, 20: 15}", "[[5, 60], [20, 15]]", '{"5": 6.0e1, 20: 15.0}'])
def test_limits_are_kept_as_pairs(tmp_path: Path, written: str) -> None:
    config = configured(f"evaluation.abandon={written}")
    assert config.evaluation.abandon == ((5, 60.0), (20, 15.0))
    # As the run keeps it, and for what wants a key of it.
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert hash(load_config(path)) == hash(config)
    assert with_values(config, {"seed": 3}).evaluation == config.evaluation


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{20: 15, 5: 60}", "evaluation.abandon: the epochs [20, 5] must ascend, each once"),
        ("[[5, 60], [5, 50]]", "evaluation.abandon: the epochs [5, 5] must ascend, each once"),
        ("{5: 60, 5: 50}", "evaluation.abandon.5: duplicate key"),
        ("{0: 60}", "evaluation.abandon.0.0: input should be greater than or equal to 1, not 0"),
        ("{5: 101}", "evaluation.abandon.0.1: input should be less than or equal to 100, not 101"),
        ("{5: -1}", "evaluation.abandon.0.1: input should be greater than or equal to 0, not -1"),
        ("{soon: 60}", 'evaluation.abandon.0.0: input should be a valid integer, not "soon"'),
        ("{5: true}", "evaluation.abandon.0.1: input should be a valid number, not true"),
        ("5", "evaluation.abandon: input should be a valid tuple, not 5"),
    ],
)
def test_wrong_limits_are_refused(written: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(f"evaluation.abandon={written}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("errors", "stops_at", "reason"),
    [
        # By the epoch's own limit: 50 is no limit in the first epoch, and at 60 the run is not above it.
        ([99, 70, 60, 15], None, StopReason.NONE),
        ([99, 70, 60.01, 15], 2, StopReason.ABANDONED),
        ([99, 70, 40, 16], 3, StopReason.ABANDONED),
        # What is reached is reached, and a run without hope is not one without patience.
        ([99, 9, 70, 15], 1, StopReason.TARGET),
        ([99, 50, 61, 15], 2, StopReason.ABANDONED),
    ],
)
def test_verdicts_by_hand(errors: list[float], stops_at: int | None, reason: StopReason) -> None:
    stop = StopAgreement(Ranks())
    handler = BestRecord("test", stop, patience=2, min_delta=60, target_error=10, abandon={2: 60, 3: 15})
    engine = Engine(lambda engine, batch: None)
    stopped = None
    for epoch, error in enumerate(errors):
        for split in ("train", "test"):
            # Another split's errors are no reason.
            engine.state.record = {"top1_error": error if split == "test" else 99.0, "epoch": epoch, "split": split}
            handler(engine)
        if stop.reason:
            stopped = epoch
            break
    if reason is StopReason.NONE:
        # Patience: the two evaluations after the first were not lower by 60.
        assert (stopped, stop.reason, handler.hopeless) == (3, StopReason.PATIENCE, "")
    else:
        assert (stopped, stop.reason) == (stops_at, reason)
    # As after a resume, from what a checkpoint holds; one of before this key has none.
    again = BestRecord("test", stop, patience=2, target_error=10)
    again.load_state_dict(handler.state_dict())
    assert again.verdict() == handler.verdict()
    old: dict[str, Any] = {key: value for key, value in handler.state_dict().items() if key != "hopeless"}
    again.load_state_dict(old)
    assert again.hopeless == ""


def test_the_last_epoch_leaves_nothing_to_abandon() -> None:
    stop = StopAgreement(Ranks())
    handler = BestRecord("test", stop, abandon={2: 60})
    engine = Engine(lambda engine, batch: None)
    engine.state.max_epochs = 2
    engine.state.record = {"top1_error": 99.0, "epoch": 2, "split": "test"}
    handler(engine)
    assert (stop.reason, handler.verdict(), handler.hopeless) == (StopReason.NONE, StopReason.NONE, "")


def abandoned(epoch: int) -> float:
    return 62.1 if epoch == 2 else 80.0


HOPELESS = ("train.epochs=5", "evaluation.every=5", "evaluation.abandon={2: 60}")


def test_a_hopeless_run_stops_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig_errors(monkeypatch, abandoned)
    folder = tmp_path / "run"
    assert train_tiny(folder, *HOPELESS) == 0
    run = RunFolder(folder)
    status = run.read_status()
    assert (status["state"], status["exit_code"], status["epoch"]) == ("stopped_early", 0, 2)
    assert status["reason"] == REASON
    # Evaluated whatever `every` says: before the first iteration, and after the second epoch.
    assert [record["epoch"] for record in run.read_metrics()] == [0, 2]
    assert (folder / "checkpoints/final.pt").exists()
    # It is finished: nothing goes on.
    assert train_tiny(folder, *HOPELESS, resume=True) == 0
    assert RunFolder(folder).read_status()["iteration"] == 8
    with pytest.raises(RunFolderError, match=r"evaluation\.abandon"):
        train_tiny(folder, *HOPELESS[:2], "evaluation.abandon={2: 70}", resume=True)


def test_a_run_with_hope_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig_errors(monkeypatch, abandoned)
    # Not above 62.1 after the second epoch; and after the last one there is nothing left to stop.
    assert train_tiny(tmp_path / "run", "evaluation.abandon={2: 62.1, 3: 10}") == 0
    status = RunFolder(tmp_path / "run").read_status()
    assert (status["state"], status["epoch"], status["reason"]) == ("completed", 3, "")


def test_a_run_killed_as_it_is_abandoned_is_still_abandoned(tmp_path: Path) -> None:
    def die(saver: SaveCheckpoints, name: str) -> None:
        os._exit(9)

    def patch() -> None:
        rig_errors(pytest.MonkeyPatch(), abandoned)
        pytest.MonkeyPatch().setattr(SaveCheckpoints, "save_as", die)

    folder = tmp_path / "run"
    assert Command(folder, *HOPELESS, patch=patch).wait().code == 9
    assert RunFolder(folder).read_status()["state"] == "running"
    outcome = Command(folder, *HOPELESS, resume=True).wait()
    assert outcome.code == 0, outcome.stderr
    assert f"stopped: {REASON}" in outcome.stderr
    status = RunFolder(folder).read_status()
    assert (status["state"], status["reason"], status["epoch"]) == ("stopped_early", REASON, 2)
    assert (folder / "checkpoints/final.pt").exists()


def test_ranks_give_up_together(tmp_path: Path) -> None:
    def patch() -> None:
        rig_errors(pytest.MonkeyPatch(), abandoned)

    outcome = Command(tmp_path / "run", *HOPELESS, ranks=2, patch=patch).wait()
    assert (outcome.code, outcome.left) == (0, []), outcome.stderr
    status = RunFolder(tmp_path / "run").read_status()
    assert (status["state"], status["reason"]) == ("stopped_early", REASON)
