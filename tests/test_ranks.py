"""Several ranks: the same run on any number of them, and the end of all, soon and named, when one fails."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, at_iteration, digest, rank, scalars, tensors
from ignite.engine import Engine
from torch import nn
from tqdm import tqdm

from resnext_ignite.distributed import stopping
from resnext_ignite.runs.checkpoint import iteration_checkpoints, load_checkpoint, verify_checkpoint
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import DataError
from resnext_ignite.runtime.signals import PARENT_GONE, exit_on_signal
from resnext_ignite.training.handlers import checkpointing

OFTEN = ["checkpoint.every_iterations=2", "logging.every_iterations=1"]


def on_rank(which: int, act: Callable[[Engine], Any]) -> Callable[[Engine], Any]:
    return lambda engine: act(engine) if rank() == which else None


def no_log_points_by_time() -> None:
    stopping._EXCHANGE_INTERVAL_S = 1e6


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
        (kill_oneself, 8, "error: rank {} was killed by SIGKILL; continue with --resume"),
        (hang, 8, "error: rank {} hangs (no answer within distributed.timeout_s); continue with --resume"),
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
        stopping._EXCHANGE_INTERVAL_S = 0.5

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
    expected = f"the launcher of the ranks of a machine has died: saved at iteration {saved}; continue with --resume"
    assert status["reason"] == expected


def test_a_parent_that_ends_slowly_is_not_taken_for_a_stop(tmp_path: Path) -> None:
    # The system tells a rank of its parent's end when the first thread of the parent has ended, before the parent has.
    def tell(engine: Engine) -> None:
        os.kill(os.getpid(), PARENT_GONE)

    outcome = Command(tmp_path / "run", *OFTEN, ranks=2, patch=lambda: at_iteration(6, on_rank(1, tell))).wait()
    assert (outcome.code, outcome.left) == (8, []), outcome.stderr
    (line,) = outcome.errors
    assert line.startswith("error: the launcher of the ranks of a machine has died: saved at iteration ")
    status = RunFolder(tmp_path / "run").read_status()
    assert (status["state"], status["exit_code"]) == ("failed", 8)


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


@pytest.mark.parametrize("full", [False, True])
def test_no_rank_says_saved_before_rank_0_has(tmp_path: Path, full: bool) -> None:
    def patch() -> None:
        save = checkpointing.save_checkpoint

        def slowly(path: Path, state: dict[str, Any]) -> None:
            # As long as a large model's takes; longer than a rank waits for the word of rank 0.
            time.sleep(1.5)
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            save(path, state)

        def stop(engine: Engine) -> None:
            pytest.MonkeyPatch().setattr(checkpointing, "save_checkpoint", slowly)
            os.kill(os.getpid(), signal.SIGTERM)

        at_iteration(6, stop)

    values = ["logging.every_iterations=1", "distributed.timeout_s=20"]
    outcome = Command(tmp_path / "run", *values, ranks=2, patch=patch).wait()
    assert (outcome.code, outcome.left) == (6 if full else 75, []), outcome.stderr
    (line,) = outcome.errors
    if full:
        assert "No space left on device" in line
        assert RunFolder(tmp_path / "run").read_status()["exit_code"] == 6
    else:
        # As torchrun must read it, whose own signal ends no run for good.
        assert line == "error: stopped by SIGTERM and saved at iteration 6; continue with --resume"


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


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_that_makes_a_cleanup_fail_is_still_a_stop(tmp_path: Path, ranks: int) -> None:
    def patch() -> None:
        real = tqdm.get_lock

        def interrupted(kind: type[tqdm]) -> Any:
            # Once a run answers signals; the lock is not taken then, and its release fails.
            if rank() == 0 and signal.getsignal(signal.SIGTERM) is not exit_on_signal:
                os.kill(os.getpid(), signal.SIGTERM)
            return real()

        pytest.MonkeyPatch().setattr(tqdm, "get_lock", classmethod(interrupted))

    outcome = Command(tmp_path / "run", ranks=ranks, patch=patch).wait()
    assert (outcome.code, outcome.left) == (75, []), outcome.stderr
    assert outcome.errors == ["error: stopped by SIGTERM before there was anything to save"]
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

        from resnext_ignite.training import engines

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


def test_a_rank_that_is_done_leaves_no_thread_to_abort_it() -> None:
    # In a process of its own, since only the end of an interpreter shows it; always looking, to be caught at it.
    script = """
import os, time
from torch import distributed as dist
from resnext_ignite.distributed import failures
from resnext_ignite.distributed.ranks import Ranks

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
failures._POLL_S = 0
with failures.watch_other_ranks(Ranks(0, 2)):
    time.sleep(0.2)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
