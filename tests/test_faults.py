"""Faults injected for real into runs of one process: nothing is lost, and what happened is said in a line."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    DRAWN,
    Command,
    assert_newest_is_there,
    at_iteration,
    digest,
    fill,
    rig_errors,
    scalars,
    small_disk,
    tiny_arguments,
    train_tiny,
)
from ignite.engine import Engine, Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from resnext_ignite.distributed import stopping
from resnext_ignite.runs import checkpoint
from resnext_ignite.runs.checkpoint import (
    checksum_path,
    iteration_checkpoints,
    load_checkpoint,
    newest_resume_point,
    verify_checkpoint,
)
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.console import set_up_console
from resnext_ignite.runtime.errors import CheckpointError, RunFolderError, StorageError, as_resnext_error
from resnext_ignite.training import engines
from resnext_ignite.training.handlers.checkpointing import SaveCheckpoints
from resnext_ignite.training.handlers.files import EvaluationFile
from resnext_ignite.training.handlers.plots import Curves, MistakesPlot
from resnext_ignite.training.handlers.tensorboard import TensorBoard

DIED = 86
VALUES = ["checkpoint.every_iterations=1", "logging.every_iterations=1", "train.ema_decay=0.9"]
WITH_EVENTS = [*VALUES, "logging.tensorboard=true", "logging.images=0"]


class Steps:
    """Writes down each step by which files change, and ends the process at one of them, as `os._exit` does.

    Args:
        log: where they are written; a line each.
        last: the number of the step at which the process ends; None: none.
        begin: steps are counted from the first one whose name contains this.
    """

    def __init__(self, log: Path, last: int | None = None, begin: str = "") -> None:
        self.log, self.last, self.begin = log, last, begin
        self.count = 0

    def __call__(self, step: str) -> None:
        self.count += bool(self.count or self.begin in step)
        with self.log.open("a") as log:
            log.write(step + "\n")
        if self.count == self.last:
            os._exit(DIED)

    def install(self) -> None:
        """Hook the functions through which storage is changed."""
        fsync, rename, unlink, write = os.fsync, Path.replace, Path.unlink, checkpoint.HashingFile.write

        def noted_fsync(descriptor: int) -> None:
            name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
            self(f"before fsync {name}")
            fsync(descriptor)
            self(f"after fsync {name}")

        def noted_rename(path: Path, target: Path) -> Path:
            self(f"before rename {target.name}")
            result = rename(path, target)
            self(f"after rename {target.name}")
            return result

        def noted_unlink(path: Path, missing_ok: bool = False) -> None:
            self(f"before unlink {path.name}")
            unlink(path, missing_ok=missing_ok)
            self(f"after unlink {path.name}")

        def noted_write(file: checkpoint.HashingFile, data: Any) -> int:
            half = len(data) // 2
            # Once a file, in the middle of its first tensor.
            if half < 256 or hasattr(file, "noted"):
                return write(file, data)
            file.noted = True  # type: ignore[attr-defined]
            done = write(file, memoryview(data)[:half])
            file.flush()
            self(f"amid write {Path(file.file.name).name}")
            return done + write(file, memoryview(data)[half:])

        for owner, name, noted in (
            (os, "fsync", noted_fsync),
            (Path, "replace", noted_rename),
            (Path, "unlink", noted_unlink),
            (checkpoint.HashingFile, "write", noted_write),
        ):
            setattr(owner, name, noted)

    def promised(self) -> int:
        """The iteration of the newest resume point whose save went so far that it must be found again."""
        steps = self.log.read_text().splitlines() if self.log.exists() else []
        found = (re.fullmatch(r"after rename iteration_(\d+)\.pt", step) for step in steps)
        return max((int(match[1]) for match in found if match), default=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_tiny(folder, *WITH_EVENTS) == 0
    return folder


SAVE = """
    amid write .NAME.tmp
    before fsync .NAME.tmp, after fsync .NAME.tmp
    before fsync .NAME.sha256.tmp, after fsync .NAME.sha256.tmp, before rename NAME.sha256, after rename NAME.sha256
    before fsync checkpoints, after fsync checkpoints
    before rename NAME, after rename NAME
    before fsync checkpoints, after fsync checkpoints
"""
PRUNE = "before unlink NAME, after unlink NAME, before unlink NAME.sha256, after unlink NAME.sha256"
# Where a file was replaced, the sum of the old one goes at last.
REPLACED = """
    before fsync .NAME.sha256.tmp, after fsync .NAME.sha256.tmp, before rename NAME.sha256, after rename NAME.sha256
    before fsync checkpoints, after fsync checkpoints
"""


@pytest.mark.parametrize(
    ("name", "steps"), [("iteration_N.pt", SAVE + PRUNE), ("best.pt", SAVE + REPLACED), ("final.pt", SAVE + REPLACED)]
)
def test_a_run_that_dies_at_each_step_of_a_save_ends_the_same(
    tmp_path: Path, whole: Path, name: str, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each session dies one step further into its first save of this kind.
    folder, log, values = tmp_path / "run", tmp_path / "steps", VALUES
    if name == "best.pt":
        # A session that got as far as the rename has its best; the next one dies at that of the next epoch.
        values = [*VALUES, "train.epochs=13"]
        rig_errors(monkeypatch, lambda epoch: 100.0 - epoch)
        whole = tmp_path / "whole"
        assert train_tiny(whole, *values) == 0
    expected = [step for step in re.split(r"[,\n]\s*", steps.replace("NAME", name)) if step.strip()]
    for last, step in enumerate(expected, start=1):
        hooks = Steps(log, last, begin="amid write ." + name.partition("N")[0])
        outcome = Command(folder, *values, resume=last > 1, patch=hooks.install).wait()
        assert outcome.code == DIED, outcome.stderr
        assert re.sub(r"\d{8}", "N", log.read_text().splitlines()[-1]) == step.strip()
        assert_newest_is_there(folder, hooks.promised())
    assert train_tiny(folder, *values, resume=True) == 0
    assert digest(folder) == digest(whole)
    assert not list(folder.rglob("*.tmp"))
    files = (folder / "checkpoints").glob("*.pt")
    assert {checksum_path(path) for path in files} == set((folder / "checkpoints").glob("*.sha256"))


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_moments_ends_the_same(tmp_path: Path, whole: Path, seed: int) -> None:
    folder = tmp_path / "run"
    generator = random.Random(seed)
    for number in range(3):
        command = Command(folder, *WITH_EVENTS, resume=number > 0)
        time.sleep(generator.uniform(0.1, 1.0))
        os.kill(command.pid, signal.SIGKILL)
        assert command.wait().code in (-signal.SIGKILL, 0)
        newest_resume_point(folder / "checkpoints")
    assert train_tiny(folder, *WITH_EVENTS, resume=True) == 0
    assert digest(folder) == digest(whole)
    assert scalars(folder) == scalars(whole)


def test_a_process_that_is_killed_while_it_writes_leaves_others_their_console(
    in_fork: Callable[[Callable[[], Any]], int],
) -> None:
    def die() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    set_up_console()
    assert in_fork(die) == signal.SIGKILL
    assert tqdm.get_lock().acquire(timeout=5)
    tqdm.get_lock().release()


def test_the_system_calls_of_a_save_come_in_order(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    trace = tmp_path / "trace"

    def wait_for_the_tracer() -> None:
        while "TracerPid:\t0" in Path("/proc/self/status").read_text():
            time.sleep(0.01)

    command = Command(tmp_path / "run", "checkpoint.every_iterations=1", patch=wait_for_the_tracer)
    names = "trace=fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat"
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-s", "300", "-e", names, "-o", str(trace), "-p", str(command.pid)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert tracer.stderr is not None
        if "attached" not in (line := tracer.stderr.readline()):
            pytest.skip(f"cannot trace here: {line.strip()}")
        assert command.wait(120).code == 0
    finally:
        with_what_is_left = command.processes()
        for process in with_what_is_left:
            os.kill(process, signal.SIGKILL)
        tracer.communicate(timeout=20)
    calls = []
    for line in trace.read_text().splitlines():
        if (match := re.search(r"\b(f\w*sync|rename\w*|unlink\w*)\((.*)\)\s+= 0", line)) and "checkpoints" in line:
            # The last path is what a rename makes.
            path = re.findall(r'"([^"]+)"|<([^>]+)>', match[2])[-1]
            calls.append(f"{match[1].rstrip('at2')} {Path(path[0] or path[1]).name}")
    first, pruned = "iteration_00000003.pt", "iteration_00000001.pt"
    start = calls.index(f"fsync .{first}.tmp")
    assert calls[start : start + 8] == [
        f"fsync .{first}.tmp",
        f"fsync .{first}.sha256.tmp",
        f"rename {first}.sha256",
        "fsync checkpoints",
        f"rename {first}",
        "fsync checkpoints",
        f"unlink {pruned}",
        f"unlink {pruned}.sha256",
    ]


def signal_each_fsync() -> None:
    fsync = os.fsync

    def interrupted(descriptor: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        fsync(descriptor)

    os.fsync = interrupted  # type: ignore[assignment]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_more_signals_do_not_harm_the_save_of_the_first(tmp_path: Path, whole: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    values = ["train.ema_decay=0.9", "logging.every_iterations=1"]

    def first(engine: Engine) -> None:
        os.kill(os.getpid(), number)
        signal_each_fsync()

    outcome = Command(folder, *values, patch=lambda: at_iteration(6, first)).wait()
    assert (outcome.code, outcome.left) == (75, []), outcome.stderr
    assert outcome.errors == [f"error: stopped by {number.name} and saved at iteration 6; continue with --resume"]
    assert "Traceback" not in outcome.stderr
    assert iteration_checkpoints(folder / "checkpoints")[0].name == "iteration_00000006.pt"
    assert train_tiny(folder, *values, resume=True) == 0
    assert digest(folder) == digest(whole)


def test_what_tensorboard_was_told_before_a_save_is_there_after_it(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"

    def patch() -> None:
        write, save = RecordWriter.write, SaveCheckpoints._save

        def slowly(writer: RecordWriter, data: bytes) -> None:
            time.sleep(0.02)
            write(writer, data)

        def save_and_die(saver: SaveCheckpoints, engine: Engine) -> None:
            save(saver, engine)
            if engine.state.iteration == 6:
                os._exit(DIED)

        RecordWriter.write = slowly
        SaveCheckpoints._save = save_and_die  # type: ignore[method-assign, assignment]

    assert Command(folder, *WITH_EVENTS, patch=patch).wait().code == DIED
    assert train_tiny(folder, *WITH_EVENTS, resume=True) == 0
    assert scalars(folder) == scalars(whole)


def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"

    def patch() -> None:
        create = engines.create_evaluator

        def with_hook(*args: Any, **kwargs: Any) -> Engine:
            evaluator = create(*args, **kwargs)

            def send(engine: Engine) -> None:
                if engine.state.iteration == 3 and RunFolder(folder).read_metrics():
                    os.kill(os.getpid(), signal.SIGTERM)

            evaluator.add_event_handler(Events.ITERATION_STARTED, send)
            return evaluator

        engines.create_evaluator = with_hook
        # Every batch, as if each took its five seconds.
        stopping._EXCHANGE_INTERVAL_S = 0

    values = [*WITH_EVENTS, "evaluation.batch_size=4", "logging.histograms=true"]
    outcome = Command(folder, *values, patch=patch).wait()
    assert (outcome.code, outcome.left) == (75, []), outcome.stderr
    assert "stopped by SIGTERM and saved at iteration 4" in outcome.errors[0]
    assert [record["iteration"] for record in RunFolder(folder).read_metrics()] == [0]
    # Killed right after the evaluation that was left: its points are not doubled by the next one either.
    killed = Command(folder, *values, resume=True, patch=lambda: at_iteration(5, lambda engine: os._exit(DIED)))
    assert killed.wait().code == DIED
    assert train_tiny(folder, *values, resume=True) == 0
    assert train_tiny(tmp_path / "whole", *values) == 0
    assert digest(folder) == digest(tmp_path / "whole")
    assert scalars(folder) == scalars(tmp_path / "whole")
    assert histogram_steps(folder) == histogram_steps(tmp_path / "whole") == [0, 4, 8, 12]


def histogram_steps(folder: Path) -> list[int]:
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    return [event.step for event in events.Histograms("weights/conv1/weight")]


def test_a_signal_while_torch_is_imported_ends_the_command(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "resnext_ignite.train", *tiny_arguments(tmp_path / "run")]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True) as command:
        while "libtorch" not in Path(f"/proc/{command.pid}/maps").read_text():
            time.sleep(0.005)
        os.killpg(command.pid, signal.SIGTERM)
        _, stderr = command.communicate(timeout=10)
    assert (command.returncode, stderr) == (75, "error: stopped by SIGTERM before there was anything to save\n")
    assert not (tmp_path / "run").exists()


def test_a_damaged_newest_checkpoint_is_always_found_out(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", folder)
    newest, before = iteration_checkpoints(folder)[:2]
    good = newest.read_bytes()
    generator = random.Random(0)
    damaged = [b"", *(good[: len(good) * tenth // 10] for tenth in range(10))]
    for number in range(200):
        # Half of them where the directory of the archive is.
        at = generator.randrange(len(good)) if number % 2 else len(good) - 1 - generator.randrange(20_000)
        damaged.append(good[:at] + bytes([good[at] ^ 1 << generator.randrange(8)]) + good[at + 1 :])
    for content in damaged:
        newest.write_bytes(content)
        point = newest_resume_point(folder)
        assert point is not None
        assert (point.path, point.damaged) == (before, (newest,))
    # And without the checksums, which another tool may have left behind.
    for sums in folder.glob("*.sha256"):
        sums.unlink()
    for content in damaged[:11]:
        newest.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_checkpoint(newest)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    stop = Command(folder, *VALUES, patch=lambda: at_iteration(7, lambda engine: os._exit(DIED)))
    assert stop.wait().code == DIED
    newest, before = iteration_checkpoints(folder / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert train_tiny(folder, *VALUES, resume=True) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1
    assert str(newest) in said[0]
    assert f"resuming from {before} instead" in said[0]
    assert digest(folder) == digest(whole)
    assert newest.with_name(newest.name + ".damaged").exists()


def test_a_disk_that_fills_during_a_save_costs_no_checkpoint(tmp_path: Path, whole: Path) -> None:
    size = (whole / "checkpoints/final.pt").stat().st_size
    with small_disk(tmp_path / "disk", int(2.5 * size) + 100_000) as disk:
        folder = disk / "run"
        values = [*VALUES, "evaluation.every=3"]
        outcome = Command(folder, *values).wait()
        assert outcome.code == 6, outcome.stderr
        assert "iteration_00000003.pt: No space left on device" in outcome.errors[0]
        kept = iteration_checkpoints(folder / "checkpoints")
        assert [path.name for path in kept] == ["iteration_00000002.pt", "iteration_00000001.pt"]
        for path in kept:
            verify_checkpoint(path)
        assert not list(folder.rglob("*.tmp"))
        assert RunFolder(folder).read_status()["exit_code"] == 6
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(disk)], check=True)
        assert train_tiny(folder, *values, resume=True) == 0
        assert train_tiny(tmp_path / "whole", *values) == 0
        assert digest(folder) == digest(tmp_path / "whole")


def test_a_full_disk_at_what_a_run_can_do_without_is_a_warning(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 32_000_000) as disk:
        folder = disk / "run"

        def on_a_full_disk(act: Callable[..., None]) -> Callable[..., None]:
            def wrapped(*args: Any) -> None:
                filler = fill(disk)
                act(*args)
                filler.unlink()

            return wrapped

        def patch() -> None:
            flush = TensorBoard.flush

            def flush_much(board: TensorBoard) -> None:
                # More than the page in which the file ends.
                board.writer.add_text("long", "x" * 20_000, 0)
                flush(board)

            for owner, name in (
                (SaveCheckpoints, "save_best"),
                (Curves, "draw"),
                (EvaluationFile, "__call__"),
                (MistakesPlot, "__call__"),
            ):
                setattr(owner, name, on_a_full_disk(getattr(owner, name)))
            TensorBoard.flush = flush_much  # type: ignore[method-assign, assignment]

        outcome = Command(folder, *WITH_EVENTS, *DRAWN, patch=patch).wait()
        assert outcome.code == 0, outcome.stderr
        for what in ("best.pt", "curves.png", "evaluation.json", "mistakes.png", "TensorBoard's events"):
            assert f"{what} could not be written (No space left on device); training continues" in outcome.stderr
        assert "Traceback" not in outcome.stderr
        names = sorted(path.name for path in (folder / "checkpoints").glob("*.pt"))
        assert names == ["final.pt", "iteration_00000011.pt", "iteration_00000012.pt"]
        assert len(RunFolder(folder).read_metrics()) == 4
        # What could not be kept is not called the best.
        assert RunFolder(folder).read_status()["best"] is None


def test_an_io_error_at_a_resume_point_is_exit_6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if "iteration_00000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        train_tiny(tmp_path / "run", *VALUES)
    assert isinstance(as_resnext_error(caught.value), StorageError)
    point = newest_resume_point(tmp_path / "run/checkpoints")
    assert point is not None
    assert point.path.name == "iteration_00000003.pt"


def test_a_second_process_is_refused_at_once_and_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    folder, ready = tmp_path / "run", tmp_path / "ready"
    patch = lambda: at_iteration(2, lambda engine: ready.touch())  # noqa: E731
    holder = Command(folder, "train.epochs=100000", patch=patch)
    while not ready.exists():
        time.sleep(0.02)
    began = time.monotonic()
    with pytest.raises(RunFolderError, match="another process trains here") as caught:
        # Were it not, it would end at once.
        train_tiny(folder, "train.epochs=100000", "train.max_hours=1e-9", resume=True)
    assert time.monotonic() - began < 1
    assert caught.value.exit_code == 7
    os.kill(holder.pid, signal.SIGKILL)
    assert holder.wait().code == -signal.SIGKILL
    RunFolder(folder).lock()


def test_a_read_only_disk_is_exit_6_before_anything_is_trained(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 10_000_000, "ro") as disk:
        outcome = Command(disk / "run").wait()
    assert outcome.code == 6
    assert outcome.errors == [f"error: {disk / 'run'}: Read-only file system; choose another --output-dir"]
    assert "epoch" not in outcome.stderr


def test_a_clock_set_back_and_an_odd_zone_change_nothing(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"

    def another_time(shift: float, cut: int | None) -> Callable[[], None]:
        def patch() -> None:
            os.environ["TZ"] = "Pacific/Kiritimati"
            time.tzset()
            now = time.time
            time.time = lambda: now() + shift
            if cut is not None:
                at_iteration(cut, lambda engine: os._exit(DIED))

        return patch

    for number, (shift, cut) in enumerate(((0, 4), (-1e8, 8), (-2e8, None))):
        outcome = Command(folder, *WITH_EVENTS, resume=number > 0, patch=another_time(shift, cut)).wait()
        assert outcome.code == (0 if cut is None else DIED), outcome.stderr
    assert digest(folder) == digest(whole)
    assert scalars(folder) == scalars(whole)
