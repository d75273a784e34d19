"""Processes that decode, killed or without memory: the run ends soon with advice, and loses nothing that was saved."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, at_iteration, digest, rank, train_tiny
from ignite.engine import Engine
from test_data import folder_config
from test_data_faults import AS_FILES, IN_WORKERS, PROMISED_S, assert_one_line, on

from resnext_ignite.data import build_train_loader, load_data
from resnext_ignite.data.reading.image_files import ImageFiles
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runs.checkpoint import iteration_checkpoints, verify_checkpoint
from resnext_ignite.runtime.errors import DataError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_tiny(folder, *on(picture_folder, *AS_FILES)) == 0
    return folder


def kill_a_worker(engine: Engine | None = None) -> None:
    """Kill one and wait for its death, which is left to the run to find."""
    pid = multiprocessing.active_children()[-1].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_worker_ends_the_run(tmp_path: Path, picture_folder: Path, ranks: int) -> None:
    def patch() -> None:
        at_iteration(2, lambda engine: kill_a_worker(engine) if rank() == ranks - 1 else None)

    values = on(picture_folder, *IN_WORKERS, "logging.every_iterations=1")
    outcome = Command(tmp_path / "run", *values, ranks=ranks, patch=patch).wait()
    assert_one_line(outcome, "a data worker (pid " if ranks == 1 else "rank 1: a data worker (pid ")
    assert outcome.errors[0].endswith(
        ") was killed by SIGKILL, probably out of memory; lower data.workers or give the machine more memory"
    )
    # At the next batch, though that one had been made.
    assert "iteration 2 " in outcome.stderr
    assert "iteration 3 " not in outcome.stderr


def test_a_worker_that_leaves_while_it_is_waited_for_ends_the_run(tmp_path: Path, picture_folder: Path) -> None:
    def patch() -> None:
        pytest.MonkeyPatch().setattr(ImageFiles, "read", lambda *args: os._exit(7))

    outcome = Command(tmp_path / "run", *on(picture_folder, *IN_WORKERS), patch=patch).wait()
    assert_one_line(outcome, "a data worker (pid ")
    assert outcome.errors[0].endswith(") exited with code 7; try data.workers=0")


def test_a_worker_killed_during_a_save_does_not_harm_it(tmp_path: Path, picture_folder: Path, whole: Path) -> None:
    def patch() -> None:
        fsync = os.fsync

        def kill_and_fsync(descriptor: int) -> None:
            saving = "iteration_00000002" in os.readlink(f"/proc/self/fd/{descriptor}")
            if saving and len(multiprocessing.active_children()) == 2:
                kill_a_worker()
            fsync(descriptor)

        pytest.MonkeyPatch().setattr(os, "fsync", kill_and_fsync)

    values = on(picture_folder, *IN_WORKERS, "checkpoint.every_iterations=2")
    outcome = Command(tmp_path / "run", *values, patch=patch).wait()
    assert_one_line(outcome, "a data worker (pid ")
    (saved,) = iteration_checkpoints(tmp_path / "run/checkpoints")
    assert saved.name == "iteration_00000002.pt"
    verify_checkpoint(saved)
    assert train_tiny(tmp_path / "run", *on(picture_folder, *AS_FILES), resume=True) == 0
    assert digest(tmp_path / "run") == digest(whole)


def test_a_signal_to_all_processes_saves(tmp_path: Path, picture_folder: Path, whole: Path) -> None:
    def send(engine: Engine) -> None:
        os.killpg(0, signal.SIGTERM)
        # Until the run has heard of it, its workers go on.
        time.sleep(0.3)
        assert [worker.exitcode for worker in multiprocessing.active_children()] == [None, None]

    values = on(picture_folder, *IN_WORKERS)
    outcome = Command(tmp_path / "run", *values, patch=lambda: at_iteration(2, send)).wait()
    assert (outcome.code, outcome.left) == (75, []), outcome.stderr
    assert outcome.errors == ["error: stopped by SIGTERM and saved at iteration 2; continue with --resume"]
    assert outcome.stderr.count("SIGTERM: saving") == 1
    assert outcome.seconds < PROMISED_S
    assert train_tiny(tmp_path / "run", *values, resume=True) == 0
    assert digest(tmp_path / "run") == digest(whole)


@pytest.fixture
def may_mount(in_fork: Callable[[Callable[[], Any]], int]) -> None:
    """Skips the test where this user may not mount a file system of its own."""
    if in_fork(partial(with_small_shm, "1m")):
        pytest.skip("cannot mount a tmpfs here")


def with_small_shm(size: str) -> None:
    """From now on /dev/shm is a small file system, for this process and those that it starts."""
    clone_newns = 0x20000
    assert ctypes.CDLL(None).unshare(clone_newns) == 0
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"]
    for command in (["mount", "--make-rprivate", "/"], mount):
        subprocess.run(command, check=True, capture_output=True)


# Of two pages no worker can be started, of 28 not one batch passed on, and of 256 KiB not those that are made ahead.
@pytest.mark.usefixtures("may_mount")
@pytest.mark.parametrize(("size", "ranks"), [("8k", 1), ("112k", 1), ("256k", 1), ("128k", 2)])
def test_a_full_dev_shm_ends_the_run(tmp_path: Path, picture_folder: Path, size: str, ranks: int) -> None:
    values = on(picture_folder, *IN_WORKERS, "train.batch_size=20")
    outcome = Command(tmp_path / "run", *values, ranks=ranks, patch=partial(with_small_shm, size)).wait()
    assert_one_line(outcome, "")
    assert "/dev/shm is full: enlarge it (docker run --shm-size=8g) or set data.workers=0" in outcome.errors[0]


@pytest.mark.usefixtures("may_mount")
def test_no_worker_is_left_where_dev_shm_is_full_at_any_step_of_the_start(
    tmp_path: Path, picture_folder: Path, in_fork: Callable[[Callable[[], Any]], int]
) -> None:
    # A batch of 30 pages: where the workers have started, there is no room for it, however fast it is taken.
    config = folder_config(picture_folder, **{"data.workers": 2, "data.image_size": 32, "train.batch_size": 40})
    loader = build_train_loader(config, load_data(config, Ranks()), torch.device("cpu"), Ranks())

    def child() -> None:
        os.dup2(os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY), 2)
        messages = []
        for pages in range(1, 40):
            with_small_shm(f"{4 * pages}k")
            with pytest.raises(DataError) as caught:
                list(itertools.islice(loader, 8))
            messages.append(str(caught.value).split("/dev/shm")[0])
            assert multiprocessing.active_children() == []
        # First a start fails, step after step, then a batch.
        assert messages == sorted(messages, reverse=True)
        assert len(set(messages)) == 2

    status = in_fork(child)
    said = (tmp_path / "stderr").read_text()
    assert (status, said) == (0, "")
