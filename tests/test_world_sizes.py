"""One run on any number of ranks: the same samples, rates and updates, the same counts, and few collectives."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import torchvision
from conftest import (
    DRAWN,
    Command,
    at_iteration,
    digest,
    fork,
    fork_ranks,
    rank,
    rig_errors,
    tiny_arguments,
    train_tiny,
)
from ignite.engine import Engine
from test_data import write_cifar
from test_data_faults import CIFAR
from torch import distributed as dist
from torch import nn

from resnext_ignite import train
from resnext_ignite.config.files import load_config
from resnext_ignite.data import build_eval_loader, load_data
from resnext_ignite.data.images import Images
from resnext_ignite.data.sources.cifar import prepare_cifar
from resnext_ignite.distributed import launch
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.distributed.stopping import StopAgreement, StopReason
from resnext_ignite.models.resnext import ResNeXt
from resnext_ignite.runs.checkpoint import load_checkpoint
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime import devices
from resnext_ignite.training import engines

# In one process, which makes the runs that these tests compare once.
pytestmark = pytest.mark.xdist_group("world sizes")

OFTEN = ["checkpoint.every_iterations=2", "logging.every_iterations=1"]


class IterationLog:
    """What each iteration of a run saw, on all of its ranks: a line a rank beside the run folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder.with_suffix(".jsonl")

    def note(self, engine: Engine) -> None:
        """Attach with `at_iteration`: before the log point, so that the metrics are the iteration's before."""
        batch = engine.state.batch
        seen = {"indices": batch.indices.tolist(), "pixels": [crc32(image.numpy().tobytes()) for image in batch.images]}
        metrics = {name: engine.state.metrics.get(name) for name in ("loss", "lr")}
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": engine.state.iteration, "rank": rank(), **seen, **metrics}) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return sorted(lines, key=lambda line: (line["iteration"], line["rank"]))

    def samples(self) -> dict[int, tuple[list[int], list[int]]]:
        """Indices and checksums of the pixels of each iteration's global batch, in its order."""
        seen: dict[int, tuple[list[int], list[int]]] = {}
        for line in self._lines():
            indices, pixels = seen.setdefault(line["iteration"], ([], []))
            indices += line["indices"]
            pixels += line["pixels"]
        return seen

    def metrics(self, name: str) -> dict[int, float]:
        """A training metric of each iteration but the last."""
        return {line["iteration"] - 1: line[name] for line in self._lines() if line["rank"] == 0 and line[name]}


def run_logged(
    folder: Path, *values: str, ranks: int, patch: Callable[[], None], resume: bool = False, stop_at: int | None = None
) -> None:
    """A tiny run with an IterationLog, possibly stopped by a signal to every rank."""

    def note_too() -> None:
        patch()
        at_iteration(None, IterationLog(folder).note)
        if stop_at is not None:
            at_iteration(stop_at, lambda engine: os.kill(os.getpid(), signal.SIGTERM))

    outcome = Command(folder, *OFTEN, *values, resume=resume, ranks=ranks, patch=note_too).wait()
    assert outcome.code == (0 if stop_at is None else 75), outcome.stderr
    assert f"{ranks} rank" in outcome.stderr
    assert f"{16 // ranks} images per rank and iteration" in outcome.stderr


# BatchNorm takes its statistics over the share of one rank of four, on any number of ranks.
ALIKE = ["train.ghost_batch=4", "train.ema_decay=0.5", "data.val_size=20"]
WORLDS = (1, 2, 4)


def train_in_float64() -> None:
    """Let this process's runs compute in double precision, in which a rounding is too small to grow into anything."""
    place, forward = devices.place, ResNeXt.forward

    def in_float64(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return place(model, *args, **kwargs).double()

    patch = pytest.MonkeyPatch()
    patch.setattr(devices, "place", in_float64)
    patch.setattr(ResNeXt, "forward", lambda self, images: forward(self, images.double()))


@pytest.fixture(scope="module")
def by_world_size(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run on 1, 2 and 4 ranks, in double precision and at the recipe's own learning rate."""
    root = tmp_path_factory.mktemp("worlds")
    for ranks in WORLDS:
        run_logged(root / str(ranks), *ALIKE, ranks=ranks, patch=train_in_float64)
    return {ranks: root / str(ranks) for ranks in WORLDS}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_see_the_samples_and_rates_of_one(by_world_size: dict[int, Path], ranks: int) -> None:
    one, several = (IterationLog(by_world_size[count]) for count in (1, ranks))
    assert sorted(one.samples()) == list(range(1, 10))
    assert several.samples() == one.samples()
    assert sorted(one.metrics("lr")) == list(range(1, 9))
    assert several.metrics("lr") == one.metrics("lr")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one(by_world_size: dict[int, Path], ranks: int) -> None:
    # Measured: 1e-14 for all weights together, and for all statistics. The losses are summed in single precision.
    assert_alike(by_world_size[1], by_world_size[ranks], loss=1e-6, state=1e-10)
    assert len(load_checkpoint(by_world_size[ranks] / "checkpoints/final.pt")["generators"]) == ranks


def test_ranks_accumulate_as_one(tmp_path: Path) -> None:
    # Each micro-batch is shared, not each rank's share cut: so that a micro-batch's BatchNorm sees the same images.
    values = [*ALIKE, "train.accumulate=2", "train.epochs=2"]
    for ranks in (1, 2):
        run_logged(tmp_path / str(ranks), *values, ranks=ranks, patch=train_in_float64)
    one, several = (IterationLog(tmp_path / str(ranks)).samples() for ranks in (1, 2))
    assert all(sorted(one[iteration][0]) == sorted(several[iteration][0]) for iteration in one)
    assert_alike(tmp_path / "1", tmp_path / "2", loss=1e-6, state=1e-10, records=4)


@pytest.mark.parametrize("cut", [2, 6])
def test_a_run_of_three_ranks_goes_on_bit_for_bit(tmp_path: Path, cut: int) -> None:
    # Two sums of two numbers are the same in any order, those of three are not.
    values = ["train.batch_size=12", "evaluation.early=[]"]
    assert Command(tmp_path / "whole", *OFTEN, *values, ranks=3).wait().code == 0
    for resume in (False, True):

        def kill_all(engine: Engine) -> None:
            os.killpg(0, signal.SIGKILL)

        patch = None if resume else lambda: at_iteration(cut + 1, kill_all)
        command = Command(tmp_path / "cut", *OFTEN, *values, ranks=3, resume=resume, patch=patch)
        assert command.wait().code == (0 if resume else -signal.SIGKILL)
        command.wait_until_gone()
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one_in_single_precision(tmp_path: Path, ranks: int) -> None:
    # A small rate: at a large one a rounding that turns a ReLU on or off grows from update to update. Measured: 8e-6
    # for the losses, 4e-6 for the weights, 7e-5 for the statistics.
    values = [*ALIKE, "optimizer.lr=1e-3"]
    assert train_tiny(tmp_path / "one", *values) == 0
    if ranks == 2:
        # Spawned as a user's are, not forked.
        arguments = [*tiny_arguments(tmp_path / "several", *values), "--nproc-per-node", "2", "--backend", "gloo"]
        assert train.main(arguments) == 0
    else:
        outcome = Command(tmp_path / "several", *values, ranks=ranks).wait()
        assert outcome.code == 0, outcome.stderr
    assert_alike(tmp_path / "one", tmp_path / "several", loss=1e-4, state=1e-3)


def assert_alike(one: Path, several: Path, *, loss: float, state: float, records: int = 5) -> None:
    """Two finished runs have the same records, and weights and statistics that differ by roundings."""
    made = [RunFolder(folder).read_metrics() for folder in (one, several)]
    assert len(made[0]) == len(made[1]) == records
    for theirs, ours in zip(*made, strict=True):
        for key in ("epoch", "iteration", "split", "images", "lr", "correct", "top5_error"):
            assert ours[key] == theirs[key]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=loss)
        assert ours["train_loss"] == (theirs["train_loss"] and pytest.approx(theirs["train_loss"], rel=loss))
    states = [load_checkpoint(folder / "checkpoints/final.pt") for folder in (one, several)]
    for part in ("model", "ema"):
        weights, statistics = ([key for key in states[0][part] if ("running" in key) == of] for of in (False, True))
        for keys in (weights, statistics):
            theirs, ours = (torch.cat([saved[part][key].flatten().double() for key in keys]) for saved in states)
            assert (ours - theirs).norm() / theirs.norm() < state


@pytest.mark.parametrize("worlds", [(1, 2, 1), (2, 1), (2, 4)])
def test_a_run_cut_on_some_ranks_goes_on_with_others(
    tmp_path: Path, worlds: tuple[int, ...], by_world_size: dict[int, Path]
) -> None:
    folder = tmp_path / "run"
    for turn, ranks in enumerate(worlds):
        last = turn == len(worlds) - 1
        stop_at = None if last else 3 * turn + 2
        run_logged(folder, *ALIKE, ranks=ranks, patch=train_in_float64, resume=turn > 0, stop_at=stop_at)
    whole, cut = IterationLog(by_world_size[1]), IterationLog(folder)
    assert cut.samples() == whole.samples()
    assert_alike(by_world_size[1], folder, loss=1e-6, state=1e-10)


class ByPixels(nn.Module):
    """Logits that depend on the image alone, without a weight."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)).repeat(1, 4)[:, :10] * torch.arange(1, 11)


def count_errors(local_rank: int, images: int, results: Path) -> None:
    ranks = Ranks.current()
    config = load_config(None, [f"data.test_size={max(images, 1)}", "evaluation.batch_size=16"])
    data = load_data(config, ranks, ("test",))
    assert isinstance(data.splits["test"], Images)
    evaluator = engines.create_evaluator(ByPixels(), torch.device("cpu"), num_classes=10, ranks=ranks, keep_mistakes=5)
    result = evaluator.run(build_eval_loader(config, data, "test", torch.device("cpu"), ranks)).metrics
    names = ("images", "correct", "correct_top5", "top1_error", "top5_error", "loss", "mistakes")
    plain = {"confusion": result["confusion"].tolist(), **{name: result[name] for name in names}}
    (results / f"{ranks.world_size}-{ranks.rank}.json").write_text(json.dumps(plain))


@pytest.mark.parametrize("images", [1, 7, 257])
def test_counts_are_exact_on_any_number_of_ranks(
    tmp_path: Path, images: int, in_fork: Callable[[Callable[[], Any]], int]
) -> None:
    def child(ranks: int) -> None:
        fork_ranks()
        launch.launch(count_errors, images, tmp_path, nproc_per_node=ranks, backend="gloo")

    for ranks in range(1, 5):
        assert in_fork(functools.partial(child, ranks)) == 0
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(results) == {f"{ranks}-{rank}" for ranks in range(1, 5) for rank in range(ranks)}
    whole = results["1-0"]
    assert sum(map(sum, whole["confusion"])) == whole["images"] == images
    for result in results.values():
        # Sums in another order may round otherwise; counts may not.
        assert result["loss"] == pytest.approx(whole["loss"], rel=1e-12)
        for key in ("images", "correct", "correct_top5", "confusion", "top1_error", "top5_error"):
            assert result[key] == whole[key]
        assert [m["index"] for m in result["mistakes"]] == [m["index"] for m in whole["mistakes"]]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_iteration_has_no_collective_but_the_reduction_of_gradients(tmp_path: Path, accumulate: int) -> None:
    counts = tmp_path / "collectives.jsonl"

    def count(engine: Engine) -> None:
        # Called before an iteration's log point. Gloo numbers all its collectives, whoever calls them.
        number = dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[union-attr]
        with counts.open("a") as file:
            file.write(json.dumps([rank(), engine.state.iteration, number]) + "\n")

    values = ["data.train_size=160", "train.epochs=1", "logging.every_iterations=5", "evaluation.early=[]"]
    values += [f"train.accumulate={accumulate}", "checkpoint.every_iterations=0"]
    outcome = Command(tmp_path / "run", *values, ranks=2, patch=lambda: at_iteration(None, count)).wait()
    assert outcome.code == 0, outcome.stderr
    for one in range(2):
        numbers = {at: number for who, at, number in map(json.loads, counts.read_text().splitlines()) if who == one}
        # All gradients fit one bucket; by the third iteration DDP has settled which. Ranks meet after the fifth.
        assert [numbers[at + 1] - numbers[at] for at in range(3, 10)] == [1, 1, 2, 1, 1, 1, 1]


def test_a_time_limit_that_one_rank_sees_stops_all_at_one_iteration(
    tmp_path: Path, by_world_size: dict[int, Path]
) -> None:
    def patch() -> None:
        train_in_float64()

        agreements: list[StopAgreement] = []
        create = StopAgreement.__init__

        def remember(self: StopAgreement, *args: Any, **kwargs: Any) -> None:
            create(self, *args, **kwargs)
            agreements.append(self)

        def wish(engine: Engine) -> None:
            if rank() == 1:
                agreements[-1].request_stop(StopReason.TIME_LIMIT)

        pytest.MonkeyPatch().setattr(StopAgreement, "__init__", remember)
        at_iteration(5, wish)

    folder = tmp_path / "run"
    outcome = Command(folder, *OFTEN, *ALIKE, ranks=2, patch=patch).wait()
    assert (outcome.code, outcome.left) == (0, []), outcome.stderr
    status = RunFolder(folder).read_status()
    assert (status["state"], status["iteration"]) == ("stopped_early", 5)
    assert "max_hours" in status["reason"]
    run_logged(folder, *ALIKE, ranks=2, patch=train_in_float64, resume=True)
    assert digest(folder) == digest(by_world_size[2])


def test_ranks_lose_patience_together(tmp_path: Path) -> None:
    def patch() -> None:
        rig_errors(pytest.MonkeyPatch(), lambda epoch: 50.0)

    outcome = Command(tmp_path / "run", "evaluation.patience=1", ranks=2, patch=patch).wait()
    assert (outcome.code, outcome.left) == (0, []), outcome.stderr
    status = RunFolder(tmp_path / "run").read_status()
    assert (status["state"], status["epoch"]) == ("stopped_early", 2)


def test_only_rank_0_touches_the_run_folder(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    folder = tmp_path / "run"

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if rank() and event != "import" and any(str(folder) in str(argument) for argument in arguments):
            os.close(os.open(touched, os.O_CREAT))

    values = [*OFTEN, "logging.tensorboard=true", *DRAWN, "data.val_size=20", "train.epochs=1"]
    outcome = Command(folder, *values, ranks=2, patch=lambda: sys.addaudithook(watch)).wait()
    assert outcome.code == 0, outcome.stderr
    resumed = Command(folder, *values, "train.epochs=2", ranks=2, resume=True, patch=lambda: sys.addaudithook(watch))
    assert resumed.wait().code == 0
    assert not touched.exists()
    assert {"config.yaml", "metrics.jsonl", "status.json", "curves.png"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("fails", [False, True])
def test_data_is_downloaded_once_a_machine_and_a_failure_fails_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    archive, _ = write_cifar(tmp_path, torchvision.datasets.CIFAR10, monkeypatch)
    there = archive.rename(tmp_path / "there")
    log = tmp_path / "downloads"

    def download(url: str, root: str, *_: Any) -> None:
        with log.open("a") as file:
            file.write(f"rank {rank()}\n")
        if fails:
            raise OSError("the network is unreachable")
        shutil.copy(there, archive)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    values = [*CIFAR, f"data.root={tmp_path}", "data.download=true"]
    outcome = Command(tmp_path / "run", *values, ranks=2).wait()
    assert log.read_text() == "rank 0\n"
    assert (outcome.code, outcome.left) == (3 if fails else 0, []), outcome.stderr
    if fails:
        (line,) = outcome.errors
        assert "cannot be downloaded (the network is unreachable)" in line


def test_machines_that_share_a_folder_prepare_it_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_fork: Callable[[Callable[[], Any]], int]
) -> None:
    archive, _ = write_cifar(tmp_path, torchvision.datasets.CIFAR10, monkeypatch)
    there = archive.rename(tmp_path / "there")

    def download(url: str, root: str, *_: Any) -> None:
        # Half of it, a while, and the rest: who looks in between finds a damaged archive.
        content = there.read_bytes()
        archive.write_bytes(content[: len(content) // 2])
        begun.touch()
        time.sleep(1)
        archive.write_bytes(content)

    begun = tmp_path / "begun"
    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)

    def prepare() -> None:
        prepare_cifar("cifar10", tmp_path, download=True)

    def both() -> None:
        other = fork()
        if other == 0:
            while not begun.exists():
                time.sleep(0.01)
            prepare()
            os._exit(0)
        prepare()
        assert os.waitpid(other, 0)[1] == 0

    assert in_fork(both) == 0


def test_gradients_may_travel_as_bf16(tmp_path: Path) -> None:
    # A small rate: what a rounding changes grows from update to update.
    values = ["optimizer.lr=1e-3", "evaluation.early=[]"]
    for name, more in (("plain", []), ("compressed", ["distributed.compress_gradients=true"])):
        outcome = Command(tmp_path / name, *values, *more, ranks=2).wait()
        assert outcome.code == 0, outcome.stderr
    plain, compressed = (load_checkpoint(tmp_path / name / "checkpoints/final.pt") for name in ("plain", "compressed"))
    momenta = [
        torch.cat([one["momentum_buffer"].flatten() for one in state["optimizer"]["state"].values()])
        for state in (plain, compressed)
    ]
    # bf16 keeps 8 bits of each number.
    assert 0 < (momenta[0] - momenta[1]).norm() / momenta[0].norm() < 0.1
