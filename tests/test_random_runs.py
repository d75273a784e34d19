"""Random configs, stopped twice at random and at chosen moments, must end as the same runs left alone.

Run with `pytest -m soak tests/test_random_runs.py`. SOAK_SHARE=0.1 tries a tenth of the runs.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Command, Outcome, at_iteration, plain, scalars, tiny_arguments
from ignite.engine import Engine, Events

from resnext_ignite.config.files import load_config
from resnext_ignite.distributed import stopping
from resnext_ignite.distributed.stopping import StopAgreement, StopReason
from resnext_ignite.runs.checkpoint import load_checkpoint, verify_checkpoint
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime import devices
from resnext_ignite.runtime.errors import ConfigError
from resnext_ignite.training import engines
from resnext_ignite.training.handlers import plots

pytestmark = pytest.mark.soak
DIED = 86
PARTS = 10
SHARE = float(os.environ.get("SOAK_SHARE", "1"))
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# What a clock says, wherever it stands in a checkpoint or in metrics.jsonl.
TIMES = {"images_per_s", "evaluation_s", "wall_s", "seconds"}


def random_values(draw: random.Random, picture_folder: Path) -> list[str]:
    """Valid overrides of the tiny config that cross the features of a config."""

    def some(chance: float, *values: str) -> list[str]:
        return list(values) if draw.random() < chance else []

    def one(key: str, *values: Any) -> str:
        return f"{key}={draw.choice(values)}"

    files = draw.random() < 0.25
    epochs, batch = draw.randint(2, 4), draw.choice([8, 16])
    values = [f"train.epochs={epochs}", f"train.batch_size={batch}", f"seed={draw.randrange(1000)}"]
    values += [one("data.val_size", 0, 10, 20), one("evaluation.batch_size", 3, 7, 40), "logging.images=0"]
    values += [one("optimizer.lr", 0.03, 0.1, 0.2), one("schedule.name", "constant", "cosine", "triangular")]
    values += [one("checkpoint.every_epochs", 1, 1, 2, 3), one("checkpoint.every_iterations", 0, 0, 1, 2, 3)]
    values += [one("logging.every_iterations", 1, 2, 5, 50), one("evaluation.every", 1, 1, 2, 3)]
    values += [one("evaluation.early", "[]", "[0]", "[1]", "[0,2]"), one("checkpoint.keep", 2, 3)]
    if files:
        values += ["data.name=imagefolder", f"data.root={picture_folder}", "data.image_size=24", "data.train_size=null"]
        values += ["data.test_size=null", one("data.workers", 0, 0, 2), one("data.in_memory", "null", "false")]
        values += some(0.5, "augment.random_resized_crop=true")
    else:
        values += [one("data.train_size", 40, 56, 70), one("data.test_size", 11, 37)]
        values += some(0.15, "augment.progressive_from=16", "augment.crop_padding=0")
    values += some(0.4, one("train.ema_decay", 0.5, 0.9), *some(0.5, "train.ema_reestimate_bn=2"))
    values += some(0.2, one("train.lookahead", 2, 3)) + some(0.2, "optimizer.name=muon")
    values += some(0.2, "train.accumulate=2") + some(0.2, "train.ghost_batch=4") + some(0.2, "train.clip_grad_norm=0.5")
    values += some(0.2, "train.label_smoothing=0.1") + some(0.2, "train.channels_last=false")
    values += some(0.3, one("train.precision", "bf16", "bf16", "fp16"))
    values += some(0.2, "optimizer.decay_norm_and_bias=false")
    values += some(0.2, "optimizer.momentum=0", "optimizer.nesterov=false") + some(0.2, "schedule.warmup_epochs=0.7")
    values += some(0.2, one("train.grouped_conv", "split", "merged2")) + some(0.1, "model.zero_init_residual=true")
    values += some(0.3, one("augment.flip", "none", "random", "alternating")) + some(0.2, "augment.cutout=8")
    values += some(0.2, "augment.mixup=0.4") + some(0.2, "augment.cutmix=1") + some(0.2, "augment.erasing=0.5")
    values += some(0.15, "augment.color=0.4", "augment.lighting=0.1") + some(0.15, "augment.trivial=true")
    values += some(0.2, "evaluation.flip_tta=true") + some(0.15, "evaluation.inference=folded")
    values += some(0.2, one("evaluation.patience", 1, 2)) + some(0.1, "evaluation.min_delta=3")
    values += some(0.15, one("evaluation.target_error", 60, 80)) + some(0.1, "evaluation.abandon={2: 85}")
    values += some(0.15, "logging.tensorboard=true", *some(0.5, "logging.histograms=true"))
    return values


@dataclass(frozen=True)
class Cut:
    """What stops a run, and when: at a moment that is counted (`at` times), or after some seconds.

    Args:
        how: a signal's name, "time limit", or "death".
        moment: "iteration", "last iteration of an epoch", "evaluation", "save", "start", or "some time".
        at: the how many-th of these; of "some time": hundredths of the time that the whole run took.
    """

    how: str
    moment: str
    at: int

    def act(self) -> None:
        """Stop this process's run."""
        if self.how == "death":
            os._exit(DIED)
        if self.how == "time limit":
            AGREEMENTS[-1].request_stop(StopReason.TIME_LIMIT)
        else:
            os.kill(os.getpid(), signal.Signals[self.how])

    def install(self) -> None:
        """Have it happen in this process."""
        init = StopAgreement.__init__

        def remembered(stop: StopAgreement, *args: Any, **kwargs: Any) -> None:
            init(stop, *args, **kwargs)
            AGREEMENTS.append(stop)

        StopAgreement.__init__ = remembered  # type: ignore[method-assign, assignment]
        getattr(self, "_at_" + self.moment.split()[0])()

    def _counted(self) -> Callable[[], None]:
        left = self.at

        def count() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self.act()

        return count

    def _at_iteration(self) -> None:
        count = self._counted()
        at_iteration(None, lambda engine: count())

    def _at_last(self) -> None:
        count = self._counted()
        at_iteration(None, lambda engine: None if engine.state.iteration % engine.state.epoch_length else count())

    def _at_evaluation(self) -> None:
        create, count = engines.create_evaluator, self._counted()

        def with_hook(*args: Any, **kwargs: Any) -> Engine:
            evaluator = create(*args, **kwargs)
            evaluator.add_event_handler(Events.ITERATION_STARTED, lambda engine: count())
            return evaluator

        engines.create_evaluator = with_hook

    def _at_save(self) -> None:
        fsync, count = os.fsync, self._counted()

        def counted(descriptor: int) -> None:
            fsync(descriptor)
            count()

        os.fsync = counted  # type: ignore[assignment]

    def _at_start(self) -> None:
        place = devices.place

        def placed(*args: Any, **kwargs: Any) -> torch.nn.Module:
            self.act()
            return place(*args, **kwargs)

        devices.place = placed

    def _at_some(self) -> None:
        """The test sends it."""


AGREEMENTS: list[StopAgreement] = []


def random_cut(draw: random.Random, ways: tuple[str, ...]) -> Cut:
    how = draw.choice(ways)
    counts = {"iteration": 12, "last iteration of an epoch": 3, "evaluation": 12, "save": 12, "start": 1}
    moments = [*counts, "last iteration of an epoch", "evaluation"]
    if how != "time limit" and draw.random() < 0.4:
        return Cut(how, "some time", draw.randrange(100))
    # A time limit is looked at while a run trains.
    moment = draw.choice([moment for moment in moments if how != "time limit" or moment != "start"])
    return Cut(how, moment, draw.randint(1, counts[moment]))


def run(folder: Path, values: list[str], ranks: int, *, resume: bool, often: bool, cut: Cut | None = None) -> Outcome:
    def patch() -> None:
        plots.Curves.draw = lambda self: None  # type: ignore[method-assign]
        plots.MistakesPlot.__call__ = lambda self, engine: None  # type: ignore[method-assign]
        if often:
            # Ranks meet at every iteration and at every batch of an evaluation.
            stopping._EXCHANGE_INTERVAL_S = 0
        if cut is not None:
            cut.install()

    command = Command(folder, *values, resume=resume, ranks=ranks, patch=patch)
    if cut is not None and cut.moment == "some time":
        # Not before the command answers signals at all.
        time.sleep(0.1 + cut.at / 100 * SECONDS.get(folder.parent, 1.0))
        number = signal.SIGKILL if cut.how == "death" else signal.Signals[cut.how]
        for process in command.processes() if cut.how == "death" else [command.pid]:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
    outcome = command.wait(180)
    command.wait_until_gone(20)
    return outcome


# How long the run left alone took, by its folder.
SECONDS: dict[Path, float] = {}


def everything(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves behind and a stop must not change."""
    found: dict[str, Any] = {"metrics": plain(RunFolder(folder).read_metrics(), TIMES)}
    for name in ("final.pt", "best.pt"):
        path = folder / "checkpoints" / name
        if not path.exists():
            continue
        verify_checkpoint(path)
        state = load_checkpoint(path)
        # The time limit of a cut is a change of the config, and said so.
        for key in ("config", "changes"):
            state.pop(key)
        for sums in ("since_log", "epoch"):
            # The last of the sums is seconds.
            state["handlers"]["log_point"][sums].pop()
        found[name] = plain(state, TIMES)
    if list(folder.glob("events.out.tfevents.*")):
        found["scalars"] = scalars(folder)
    return found


def try_runs(
    folder: Path, part: int, count: int, ways: tuple[str, ...], picture_folder: Path, kind: str
) -> Counter[str]:
    tally: Counter[str] = Counter()
    draw = random.Random(f"{kind} {part}")
    while tally["runs"] < count:
        values = random_values(draw, picture_folder)
        ranks = 2 if draw.random() < 0.08 else 1
        often = draw.random() < 0.5
        try:
            arguments = tiny_arguments(folder, *values)[4:]
            load_config(ROOT / "configs/quickstart.yaml", arguments)
        except ConfigError:
            continue
        here = folder / str(tally["drawn"])
        tally["drawn"] += 1
        outcome = run(here / "whole", values, ranks, resume=False, often=often)
        if outcome.code in (2, 5):
            # Refused once the data is known (a batch of more ghosts than images), or the training diverged.
            tally[f"left alone: exit {outcome.code}"] += 1
            continue
        said = f"{kind} part {part} run {tally['runs']}: {values}"
        assert outcome.code == 0, f"{said}\n{outcome.stderr}"
        SECONDS[here] = outcome.seconds
        expected = everything(here / "whole")
        for number in range(2):
            cut = random_cut(draw, ways)
            outcome = run(here / "cut", values, ranks, resume=number > 0, often=often, cut=cut)
            said += f"\n{cut}: {outcome.code}"
            killed = cut.how == "death" and outcome.code in (DIED, -signal.SIGKILL, 8)
            assert outcome.code in (0, 75) or killed, f"{said}\n{outcome.stderr}"
            assert "Traceback" not in outcome.stderr, f"{said}\n{outcome.stderr}"
            tally["in time"] += outcome.code != 0 or cut.how == "time limit"
            tally[cut.moment] += 1
        outcome = run(here / "cut", values, ranks, resume=True, often=often)
        assert outcome.code == 0, f"{said}\n{outcome.stderr}"
        found = everything(here / "cut")
        wrong = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        assert not wrong, f"{said}\ndiffers in {wrong}"
        shutil.rmtree(here)
        tally["runs"] += 1
    return tally


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("kind", "count", "ways"), [
    ("kills", 200, ("death",)),
    ("stops", 500, (*(number.name for number in SIGNALS), *("time limit",))),
])  # fmt: skip
def test_random_runs_that_are_cut_twice_end_as_those_left_alone(
    tmp_path: Path,
    kind: str,
    count: int,
    ways: tuple[str, ...],
    part: int,
    picture_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tally = try_runs(tmp_path, part, max(1, round(SHARE * count / PARTS)), ways, picture_folder, kind)
    with capsys.disabled():
        sys.stdout.write(f"\n{kind}, part {part}: {dict(tally)}, all held ")
