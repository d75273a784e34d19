"""Several ranks: the same run on any number of them, and the end of all, soon and named, when one fails."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, at_iteration, digest, rank, scalars, tensors, tiny_arguments, train_tiny
from ignite.engine import Engine
from torch import nn

from resnext_ignite import distributed, launch, train
from resnext_ignite.checkpoint import iteration_checkpoints, load_checkpoint, verify_checkpoint
from resnext_ignite.config_files import load_config
from resnext_ignite.data import build_eval_loader, load_data
from resnext_ignite.data.images import Images
from resnext_ignite.distributed import Ranks
from resnext_ignite.engines import create_evaluator
from resnext_ignite.errors import DataError
from resnext_ignite.run_folder import RunFolder

OFTEN = ["checkpoint.every_iterations=2", "logging.every_iterations=1"]


def on_rank(which: int, act: Callable[[Engine], Any]) -> Callable[[Engine], Any]:
    return lambda engine: act(engine) if rank() == which else None


def no_log_points_by_time() -> None:
    distributed._LONGEST_SILENCE_S = 1e6


def raise_a_bug(engine: Engine) -> None:
    # Words that torch uses too where it lost another rank.
    raise RuntimeError("a bug: cannot restore the gloo, timed out\nof two lines")


def raise_an_error(engine: Engine) -> None:
    raise DataError("cat.jpg: not a picture")


def kill_oneself(engine: Engine) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(engine: Engine) -> None:
    time.sleep(1000)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        (raise_a_bug, 8, "error: rank {} failed: RuntimeError: a bug: cannot restore the gloo, timed out"),
        (raise_an_error, 3, "error: {}cat.jpg: not a picture"),
        (kill_oneself, 8, "error: rank {} was killed by SIGKILL; go on with --resume"),
        (hang, 8, "error: rank {} hangs (distributed.timeout_s is over); go on with --resume"),
    ],
    ids=["raises", "fails", "killed", "hangs"],
)
def test_a_rank_that_fails_takes_all_down_and_is_named(
    tmp_path: Path, which: int, fault: Callable[[Engine], None], code: int, line: str
) -> None:
    timeout = 2
    values = [*OFTEN, f"distributed.timeout_s={timeout}"]
    command = Command(tmp_path / "run", *values, ranks=2, patch=lambda: at_iteration(6, on_rank(which, fault)))
    outcome = command.wait()
    assert outcome.code == code, outcome.stderr
    who = f"rank {which}: " if fault is raise_an_error and which else "" if fault is raise_an_error else which
    assert outcome.errors == [line.format(who)], outcome.stderr
    assert outcome.seconds < 10 + timeout * (fault is hang)
    assert outcome.left == []
    # Where a bug arose, and where a rank hangs, is shown.
    if fault in (raise_a_bug, hang):
        assert f"in {fault.__name__}" in outcome.stderr
    if which == 1:
        status = RunFolder(tmp_path / "run").read_status()
        expected = outcome.errors[0].removeprefix("error: ")
        assert (status["state"], status["exit_code"]) == ("failed", 8)
        assert status["reason"] == (expected if fault is not raise_an_error else "rank 1: cat.jpg: not a picture")
    assert iteration_checkpoints(tmp_path / "run/checkpoints")
    for path in iteration_checkpoints(tmp_path / "run/checkpoints"):
        verify_checkpoint(path)


def test_ranks_do_not_outlive_the_process_that_started_them(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def slow() -> None:
        at_iteration(2, lambda engine: ready.touch())
        distributed._LONGEST_SILENCE_S = 0.5

    command = Command(tmp_path / "run", "train.epochs=100000", ranks=2, patch=slow)
    while not ready.exists():
        time.sleep(0.02)
    assert len(command.processes()) == 3
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait_until_gone() < 10
    os.waitpid(command.pid, 0)
    # They even saved.
    status = RunFolder(tmp_path / "run").read_status()
    assert (status["state"], status["exit_code"]) == ("failed", 8)
    saved = load_checkpoint(iteration_checkpoints(tmp_path / "run/checkpoints")[0])["trainer"]["iteration"]
    expected = f"what started the ranks of a machine is gone: saved at iteration {saved}; continue with --resume"
    assert status["reason"] == expected


@pytest.mark.parametrize(
    ("number", "to"),
    [(signal.SIGTERM, "parent"), (signal.SIGUSR1, "parent"), (signal.SIGINT, "group"), (signal.SIGTERM, "rank 1")],
)
def test_a_signal_stops_all_ranks_at_one_iteration(
    tmp_path: Path, number: signal.Signals, to: str, two_ranks: Path
) -> None:
    def send(engine: Engine) -> None:
        target = {"parent": os.getppid(), "rank 1": os.getpid(), "group": -os.getpgid(0)}[to]
        if target < 0:
            os.killpg(-target, number)
        else:
            os.kill(target, number)

    outcome = Command(tmp_path / "run", *OFTEN, ranks=2, patch=lambda: at_iteration(6, on_rank(1, send))).wait()
    assert (outcome.code, outcome.left) == (75, []), outcome.stderr
    (line,) = outcome.errors
    assert line.startswith(f"error: stopped by {number.name} and saved at iteration ")
    assert outcome.seconds < 10
    again = Command(tmp_path / "run", *OFTEN, resume=True, ranks=2).wait()
    assert again.code == 0, again.stderr
    assert digest(tmp_path / "run") == digest(two_ranks)


def test_a_signal_while_ranks_start_ends_them(tmp_path: Path) -> None:
    def patch() -> None:
        import resnext_ignite.data as data

        load = data.load_data

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            if rank() == 1:
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(5)
            return load(*args, **kwargs)

        pytest.MonkeyPatch().setattr(data, "load_data", interrupted)

    outcome = Command(tmp_path / "run", ranks=2, patch=patch).wait()
    assert (outcome.code, outcome.left) == (75, []), outcome.stderr
    assert len(outcome.errors) == 1, outcome.stderr
    assert "SIGTERM before there was anything to save" in outcome.errors[0]
    assert "Traceback" not in outcome.stderr


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    outcome = Command(folder, *OFTEN, ranks=2).wait()
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.count("test error") == 1
    return folder


@pytest.mark.parametrize("cut", [3, 8, 11])
def test_two_ranks_killed_and_resumed_end_the_same(tmp_path: Path, cut: int, two_ranks: Path) -> None:
    folder = tmp_path / "run"

    def kill_all(engine: Engine) -> None:
        os.killpg(0, signal.SIGKILL)

    command = Command(folder, *OFTEN, ranks=2, patch=lambda: at_iteration(cut, on_rank(cut % 2, kill_all)))
    assert command.wait().code == -signal.SIGKILL
    command.wait_until_gone()
    outcome = Command(folder, *OFTEN, resume=True, ranks=2).wait()
    assert outcome.code == 0, outcome.stderr
    assert digest(folder) == digest(two_ranks)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_number_of_one_rank_stops_all_and_is_never_written(tmp_path: Path, which: int, where: str) -> None:
    folder = tmp_path / "run"

    def poison(engine: Engine) -> None:
        # The images or the weights of iteration 7, as it begins.
        if where == "loss":
            engine.state.batch.images.fill_(torch.nan)
        else:
            next(engine.state.poisoned.parameters()).register_hook(lambda gradient: gradient * torch.inf)

    def patch() -> None:
        from ignite.engine import Events

        from resnext_ignite import engines

        no_log_points_by_time()
        create = engines.create_trainer

        def with_hook(model: nn.Module, *args: Any, **kwargs: Any) -> Engine:
            trainer = create(model, *args, **kwargs)
            trainer.state.poisoned = model
            trainer.add_event_handler(Events.ITERATION_STARTED(once=7), on_rank(which, poison))
            return trainer

        engines.create_trainer = with_hook

    values = ["checkpoint.every_iterations=3", "logging.every_iterations=100", "logging.tensorboard=true"]
    outcome = Command(folder, *values, "schedule.name=constant", ranks=2, patch=patch).wait()
    assert (outcome.code, outcome.left) == (5, []), outcome.stderr
    # The epoch's end, iteration 8, is the next point at which ranks meet; the save after 6 is the last.
    (line,) = outcome.errors
    assert line.startswith("error: iteration 7: the loss or gradient is not finite (learning rate 0.1)")
    assert "iteration 8 loss" not in outcome.stderr
    assert iteration_checkpoints(folder / "checkpoints")[0].name == "iteration_00000006.pt"
    assert_nothing_is_bad(folder)


def assert_nothing_is_bad(folder: Path) -> None:
    """No file of a run holds a number that is not finite."""
    for path in (folder / "checkpoints").glob("*.pt"):
        for part in ("model", "ema", "optimizer", "statistics"):
            assert all(tensor.isfinite().all() for tensor in tensors(load_checkpoint(path)[part]))
    for name in ("metrics.jsonl", "status.json"):
        text = (folder / name).read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
    for points in scalars(folder).values():
        assert all(abs(value) < 1e30 for _, value in points)


def test_from_one_to_two_ranks_and_back_sees_the_same_samples(tmp_path: Path) -> None:
    log = tmp_path / "samples.jsonl"

    def note(engine: Engine) -> None:
        entry = {
            "iteration": engine.state.iteration,
            "rank": rank(),
            "indices": engine.state.batch.indices.tolist(),
            "pixels": engine.state.batch.images.double().sum((1, 2, 3)).tolist(),
        }
        with log.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def patch(stop_at: int | None) -> Callable[[], None]:
        def apply() -> None:
            at_iteration(None, note)
            if stop_at is not None:
                at_iteration(stop_at, lambda engine: os.kill(os.getpid(), signal.SIGTERM))

        return apply

    def samples() -> dict[int, tuple[list[int], list[float]]]:
        entries = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda e: e["rank"])
        seen: dict[int, tuple[list[int], list[float]]] = {}
        for entry in entries:
            indices, pixels = seen.setdefault(entry["iteration"], ([], []))
            indices += entry["indices"]
            pixels += entry["pixels"]
        log.unlink()
        return seen

    values = [*OFTEN, "optimizer.lr=1e-3"]
    assert Command(tmp_path / "whole", *values, patch=patch(None)).wait().code == 0
    expected = samples()
    assert sorted(expected) == list(range(1, 13))
    folder = tmp_path / "cut"
    for ranks, stop_at, code in ((1, 3, 75), (2, 7, 75), (1, None, 0)):
        outcome = Command(folder, *values, resume=stop_at != 3, ranks=ranks, patch=patch(stop_at)).wait()
        assert outcome.code == code, outcome.stderr
    assert samples() == expected
    rates = [[r["lr"] for r in RunFolder(tmp_path / name).read_metrics()] for name in ("whole", "cut")]
    assert rates[0] == rates[1]
    assert load_checkpoint(folder / "checkpoints/final.pt")["trainer"]["iteration"] == 12


class ByPixels(nn.Module):
    """Logits that depend on the image alone, without a weight."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)).repeat(1, 4)[:, :10] * torch.arange(1, 11)


def count_errors(local_rank: int, images: int, results: Path) -> None:
    ranks = Ranks.current()
    config = load_config(None, [f"data.test_size={max(images, 1)}", "evaluation.batch_size=16"])
    data = load_data(config, ranks, ("test",))
    assert isinstance(data.splits["test"], Images)
    evaluator = create_evaluator(ByPixels(), torch.device("cpu"), num_classes=10, ranks=ranks, keep_mistakes=5)
    result = evaluator.run(build_eval_loader(config, data, "test", torch.device("cpu"), ranks)).metrics
    names = ("images", "correct", "correct_top5", "top1_error", "top5_error", "loss", "mistakes")
    plain = {"confusion": result["confusion"].tolist(), **{name: result[name] for name in names}}
    (results / f"{ranks.world_size}-{ranks.rank}.json").write_text(json.dumps(plain))


@pytest.mark.parametrize("images", [1, 7, 257])
def test_counts_are_exact_on_any_number_of_ranks(
    tmp_path: Path, images: int, in_fork: Callable[[Callable[[], Any]], int]
) -> None:
    def child(ranks: int) -> None:
        launch.mp.start_processes = functools.partial(launch.mp.start_processes, start_method="fork")
        launch.launch(count_errors, images, tmp_path, nproc_per_node=ranks, backend="gloo")

    for ranks in (1, 2, 3):
        assert in_fork(functools.partial(child, ranks)) == 0
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(results) == {"1-0", "2-0", "2-1", "3-0", "3-1", "3-2"}
    whole = results["1-0"]
    assert sum(map(sum, whole["confusion"])) == whole["images"] == images
    for result in results.values():
        # Sums in another order may round otherwise; counts may not.
        assert result["loss"] == pytest.approx(whole["loss"], rel=1e-12)
        for key in ("images", "correct", "correct_top5", "confusion", "top1_error", "top5_error"):
            assert result[key] == whole[key]
        assert [m["index"] for m in result["mistakes"]] == [m["index"] for m in whole["mistakes"]]


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    # Ghost batches of one rank's size make BatchNorm see the same statistics on one rank and on two.
    # A small rate: at a large one a rounding that turns a ReLU on or off grows from update to update.
    values = ["train.ghost_batch=8", "train.ema_decay=0.5", "data.val_size=20", "optimizer.lr=1e-3"]
    assert train_tiny(tmp_path / "one", *values) == 0
    # Spawned as a user's are, not forked.
    assert train.main([*tiny_arguments(tmp_path / "two", *values), "--nproc-per-node", "2", "--backend", "gloo"]) == 0
    one, two = (RunFolder(tmp_path / name).read_metrics() for name in ("one", "two"))
    assert len(one) == len(two) == 5
    for ours, theirs in zip(two, one, strict=True):
        exact = ("epoch", "iteration", "split", "images", "lr")
        assert [ours[key] for key in exact] == [theirs[key] for key in exact]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        if theirs["train_loss"] is not None:
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
    states = [load_checkpoint(tmp_path / name / "checkpoints/final.pt") for name in ("one", "two")]
    assert len(states[1]["generators"]) == 2
    for key, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][key], value, rtol=2e-3, atol=2e-4)


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
