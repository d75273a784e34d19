"""A command whose console is closed, full, or hung up: a run goes on, a result that cannot be printed is an error."""

from __future__ import annotations

import itertools
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command, Outcome, at_iteration, digest, tiny_arguments, train_tiny
from ignite.engine import Engine

from resnext_ignite.runs.checkpoint import iteration_checkpoints, load_checkpoint
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.signals import STOP_SIGNALS
from resnext_ignite.training.handlers import checkpointing

VALUES = ["train.epochs=2", "logging.every_iterations=1", "checkpoint.every_iterations=1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_tiny(folder, *VALUES) == 0
    return folder


def python(code: str, *arguments: str, **streams: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], **streams)  # type: ignore[call-overload]


def without_reader(*numbers: int) -> None:
    """Put a pipe whose reader has left in the place of some descriptors."""
    reads, writes = os.pipe()
    os.close(reads)
    for number in numbers:
        os.dup2(writes, number)


def hung_up(*numbers: int) -> None:
    """Put a terminal whose other side is closed in the place of some descriptors."""
    master, slave = pty.openpty()
    for number in numbers:
        os.dup2(slave, number)
    os.close(master)


def full(*numbers: int) -> None:
    """Put a full disk in the place of some descriptors."""
    device = os.open("/dev/full", os.O_WRONLY)
    for number in numbers:
        os.dup2(device, number)


LOSSES: dict[str, Callable[..., None]] = {"reader left": without_reader, "hung up": hung_up, "full": full}


def trained(folder: Path, *values: str, patch: Callable[[], None], resume: bool = False) -> Outcome:
    return Command(folder, *VALUES, *values, patch=patch, resume=resume).wait()


@pytest.mark.parametrize(("loss", "ranks"), [*((loss, 1) for loss in LOSSES), ("reader left", 2)])
def test_a_run_outlives_its_console(tmp_path: Path, whole: Path, loss: str, ranks: int) -> None:
    def lose(engine: Engine) -> None:
        LOSSES[loss](1, 2)

    folder = tmp_path / "run"
    outcome = Command(folder, *VALUES, patch=lambda: at_iteration(2, lose), ranks=ranks).wait()
    assert outcome.code == 0
    assert RunFolder(folder).read_status()["state"] == "completed"
    assert load_checkpoint(folder / "checkpoints/final.pt")["trainer"]["iteration"] == 8
    if ranks == 1:
        assert digest(folder) == digest(whole)


@pytest.mark.parametrize(("loss", "number"), [*zip(itertools.cycle(LOSSES), STOP_SIGNALS, strict=False)])
def test_a_signal_without_a_console_saves(tmp_path: Path, loss: str, number: signal.Signals) -> None:
    def lose_and_stop(engine: Engine) -> None:
        LOSSES[loss](1, 2)
        os.kill(os.getpid(), number)

    folder = tmp_path / "run"
    assert trained(folder, patch=lambda: at_iteration(3, lose_and_stop)).code == 75
    assert iteration_checkpoints(folder / "checkpoints")[0].name == "iteration_00000003.pt"
    assert RunFolder(folder).read_status()["state"] == "preempted"


def test_a_hang_up_is_a_stop_but_not_under_nohup(tmp_path: Path) -> None:
    hang_up = "import signal, sys\nsignal.signal(signal.SIGHUP, getattr(signal, sys.argv.pop(1)))\n"
    code = hang_up + "from resnext_ignite.runtime.signals import STOP_SIGNALS\nprint(signal.SIGHUP in STOP_SIGNALS)"
    for action, heard in (("SIG_DFL", b"True\n"), ("SIG_IGN", b"False\n")):
        assert python(code, action, stdout=subprocess.PIPE).communicate()[0] == heard


# Every descriptor that is opened is looked at: where one of the first three is closed, a file could get its number.
RUN = """
import io, os, runpy, sys
closed = [int(number) for number in sys.argv.pop(1)]
for number in closed:
    os.close(number)
sys.stdout = None if 1 in closed else sys.stdout
sys.stderr = None if 2 in closed else sys.stderr
real = os.fsync
def fsync(descriptor):
    assert descriptor > 2, f"{os.readlink(f'/proc/self/fd/{descriptor}')} has the number {descriptor}"
    real(descriptor)
os.fsync = fsync
sys.argv[0] = "train"
runpy.run_module("resnext_ignite.train", run_name="__main__")
"""


def test_a_closed_console_gives_its_number_to_no_file(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    assert python(RUN, "012", *tiny_arguments(folder, *VALUES)).wait(60) == 0
    assert digest(folder) == digest(whole)


@pytest.mark.parametrize("loss", ["full", "reader left"])
def test_a_result_that_cannot_be_printed_is_an_error_unless_its_reader_has_left(loss: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "resnext_ignite.train", "--help-config"],
        preexec_fn=lambda: LOSSES[loss](1),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if loss == "full":
        assert ended.returncode == 6
        assert ended.stderr.splitlines()[-1].startswith("error: standard output: No space left on device; ")
    else:
        assert (ended.returncode, ended.stderr) == (0, "")


def test_a_reader_that_has_left_hides_no_failure() -> None:
    code = (
        "import sys\nfrom resnext_ignite.runtime.errors import StorageError, run_command\n"
        "def main(arguments):\n    print('one line')\n    raise StorageError('the disk is full')\nrun_command(main)"
    )
    reads, writes = os.pipe()
    os.close(reads)
    # Buffered, so that the line leaves when the command has failed already.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = python(code, stdout=writes, stderr=subprocess.PIPE, env=environment)
    os.close(writes)
    assert (process.communicate()[1], process.returncode) == (b"error: the disk is full\n", 6)


def test_what_is_printed_without_a_buffer_comes_at_once() -> None:
    code = (
        "import time\nfrom resnext_ignite.runtime.errors import run_command\n"
        "def main(arguments):\n    print('one line')\n    time.sleep(30)\nrun_command(main)"
    )
    with subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"one line\n"
        process.kill()


def test_a_broken_pipe_that_is_not_the_consoles_is_an_error_of_storage(tmp_path: Path) -> None:
    def break_the_save() -> None:
        def broken(path: Path, state: object) -> None:
            raise BrokenPipeError(32, "Broken pipe", str(path))

        checkpointing.save_checkpoint = broken

    outcome = trained(tmp_path / "run", patch=break_the_save)
    assert outcome.code == 6
    (line,) = outcome.errors
    assert "iteration_00000001.pt: Broken pipe" in line
