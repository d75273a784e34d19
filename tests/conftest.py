"""What tests share: tiny real runs, in this process, on one thread."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resnext_ignite import train
from resnext_ignite.distributed import launch
from resnext_ignite.runs.checkpoint import load_checkpoint, newest_resume_point, resume_candidates, verify_checkpoint
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import run_command
from resnext_ignite.runtime.signals import install_exit_on_signals
from resnext_ignite.training import engines
from resnext_ignite.training.handlers.evaluation import BestRecord

# One thread: no OpenMP pool exists, so that a test may fork a run and kill it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent
TINY = [
    "model.name=cifar_resnext11_2x8d",
    "model.stem_channels=8",
    "data.train_size=70",
    "data.test_size=37",
    "train.epochs=3",
    "train.batch_size=16",
    "train.precision=fp32",
    "logging.tensorboard=false",
    "logging.every_iterations=2",
    # Drawing costs more than such a run.
    "logging.curves=false",
    "logging.mistakes=0",
    "logging.images=0",
]
TINY_ITERATIONS = 12
# What draws everything that a run can draw.
DRAWN = ["logging.curves=true", "logging.mistakes=8", "logging.images=8"]


def tiny_arguments(folder: Path, *overrides: str, resume: bool = False) -> list[str]:
    """The command line of a tiny run: 3 epochs of 4 iterations, in well under a second each."""
    arguments = ["--config", str(ROOT / "configs/quickstart.yaml"), "--output-dir", str(folder), *TINY, *overrides]
    return [*arguments, "--resume"] if resume else arguments


def train_tiny(folder: Path, *overrides: str, resume: bool = False) -> int:
    """The train command on a tiny model and data set, in this process."""
    return train.main(tiny_arguments(folder, *overrides, resume=resume))


def command(name: str, *arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A command of the package, in a process of its own."""
    return subprocess.run(
        [sys.executable, *flags, "-m", f"resnext_ignite.{name}", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def plain(value: Any, without: Collection[str] = ()) -> Any:
    """A state with its tensors as bytes, so that two can be compared; without some keys."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner, without) for key, inner in value.items() if key not in without}
    return [plain(inner, without) for inner in value] if isinstance(value, list | tuple) else value


def digest(folder: Path, name: str = "final.pt") -> dict[str, Any]:
    """All of a finished run's state that must not depend on where it was cut: tensors as bytes, and the records."""
    state = load_checkpoint(folder / "checkpoints" / name)
    names = ("model", "ema", "optimizer", "lr_scheduler", "scaler", "trainer", "generators", "statistics")
    timeless = [without_times(record) for record in RunFolder(folder).read_metrics()]
    return {**{name: plain(state[name]) for name in names}, "metrics": timeless}


def assert_newest_is_there(folder: Path, saved: int) -> None:
    """The newest resume point is at least of the iteration `saved`, and whatever has a name verifies."""
    point = newest_resume_point(folder / "checkpoints")
    assert (0 if point is None else point.state["trainer"]["iteration"]) >= saved
    for path in resume_candidates(folder / "checkpoints"):
        verify_checkpoint(path)


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl without what a clock says."""
    return {key: value for key, value in record.items() if key not in ("images_per_s", "evaluation_s", "wall_s")}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All TensorBoard points of a run, by tag, but for those that a clock makes."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = [n for n in events.Tags()["scalars"] if "images_per_s" not in n]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


class Payload:
    """Unpickled, it makes the folder that it names: the sentinel of a test that nothing is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def at_iteration(
    iteration: int | None, act: Callable[[Engine], None], monkeypatch: pytest.MonkeyPatch | None = None
) -> None:
    """Do something in a run right before its log point of an iteration (None: of each): as the first of its end."""
    create = engines.create_trainer

    def with_hook(*args: Any, **kwargs: Any) -> Engine:
        trainer = create(*args, **kwargs)

        def hook(engine: Engine) -> None:
            if iteration in (None, engine.state.iteration):
                act(engine)

        trainer.add_event_handler(Events.ITERATION_COMPLETED, hook)
        return trainer

    (monkeypatch or pytest.MonkeyPatch()).setattr(engines, "create_trainer", with_hook)


def rig_errors(monkeypatch: pytest.MonkeyPatch, error_of: Callable[[int], float]) -> None:
    """Give each epoch's evaluation an error: which of so small a network's is best is the processor's to say."""
    judge = BestRecord.__call__

    def of_a_given_error(self: BestRecord, engine: Engine) -> None:
        engine.state.record["top1_error"] = error_of(engine.state.epoch)
        judge(self, engine)

    monkeypatch.setattr(BestRecord, "__call__", of_a_given_error)


def tensors(value: Any) -> list[torch.Tensor]:
    """All float tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for item in inner for tensor in tensors(item)]


def rank() -> int:
    """The rank of this process in a run of several."""
    return int(os.environ.get("RANK", "0"))


def fork() -> int:
    """os.fork; the child's garbage collector leaves alone, and so does not copy, what it shares with this process."""
    gc.freeze()
    child = os.fork()
    if child:
        gc.unfreeze()
    return child


def fork_ranks() -> None:
    """Let ranks be forked from this process, in which torch is loaded, instead of spawned."""
    start = launch.mp.start_processes

    def start_forked(function: Callable[..., None], arguments: tuple[Any, ...], nprocs: int, join: bool) -> Any:
        reads, writes = os.pipe()

        def begin(*given: Any) -> None:
            # Once all are forked: the store's thread, which answers the first, may hold a lock of libc while the last
            # is forked, who would wait for it for ever.
            os.close(writes)
            os.read(reads, 1)
            function(*given)

        started = start(begin, arguments, nprocs=nprocs, join=join, start_method="fork")
        os.close(writes)
        return started

    pytest.MonkeyPatch().setattr(launch.mp, "start_processes", start_forked)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code (negative: by that signal), what it said, and which processes it left."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    left: list[int]

    @property
    def errors(self) -> list[str]:
        """The lines that tell an error."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Command:
    """The train command in a process of its own, forked from this one, in which torch is loaded; ranks fork from it.

    Args:
        patch: is called in that process first; its ranks inherit what it does.
    """

    all: ClassVar[list[Command]] = []

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        resume: bool = False,
        ranks: int = 1,
        patch: Callable[[], None] | None = None,
    ) -> None:
        self.outputs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - they are gone when closed
        self.began = time.monotonic()
        Command.all.append(self)
        self.pid = fork()
        if self.pid == 0:
            self._be_the_command(folder, overrides, resume, ranks, patch)

    def _be_the_command(
        self, folder: Path, overrides: tuple[str, ...], resume: bool, ranks: int, patch: Callable[[], None] | None
    ) -> None:
        code = 70
        try:
            os.setsid()
            for number, file in enumerate(self.outputs, start=1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            fork_ranks()
            if patch is not None:
                patch()
            sys.argv = ["train", *tiny_arguments(folder, *overrides, resume=resume)]
            if ranks > 1:
                sys.argv += ["--nproc-per-node", str(ranks), "--backend", "gloo"]
            install_exit_on_signals()
            run_command(train.main, prints_result=False)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 70
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def processes(self) -> list[int]:
        """All processes of this command that still run."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # pid (name) state parent group session ...
                state, _, _, session = status.read_text().rpartition(") ")[2].split()[:4]
                if int(session) == self.pid and state != "Z":
                    found.append(int(status.parent.name))
        return found

    def wait(self, seconds: float = 60) -> Outcome:
        """Wait for the end; a command that does not come to it is killed, and fails the test."""
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"no end after {seconds} s: {self._said()[1]}")
            time.sleep(0.02)
        took = time.monotonic() - self.began
        stdout, stderr = self._said()
        return Outcome(os.waitstatus_to_exitcode(ended[1]), stdout, stderr, took, self.processes())

    def _said(self) -> list[str]:
        for file in self.outputs:
            file.seek(0)
        return [file.read() for file in self.outputs]

    def wait_until_gone(self, seconds: float = 10) -> float:
        """Wait until none of its processes runs; the seconds it took."""
        began = time.monotonic()
        while self.processes():
            assert time.monotonic() - began < seconds, f"still there: {self.processes()}"
            time.sleep(0.05)
        return time.monotonic() - began


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that one process runs together first, so that the other process does not wait for it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(autouse=True)
def no_command_outlives_its_test() -> Iterator[None]:
    """Kill what a test that failed has left running."""
    yield
    for command in Command.all:
        for process in command.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    Command.all.clear()


@contextlib.contextmanager
def small_disk(folder: Path, size: int, *options: str) -> Iterator[Path]:
    """A file system of `size` bytes in memory; skips the test where this user may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room there is left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny run with TensorBoard and pictures."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train_tiny(folder, "logging.tensorboard=true", *DRAWN, "logging.histograms=true") == 0
    return folder


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of two classes that differ in brightness: 40 and 12 PNGs, 36x32 pixels."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(128 * label, 128 * label + 128, (32, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number:02}.png")
    return root


@pytest.fixture
def in_fork() -> Callable[[Callable[[], Any]], int]:
    """Run a function in a forked child; its wait status, as os.waitpid gives it."""

    def run(function: Callable[[], Any]) -> int:
        child = fork()
        if child == 0:
            code = 1
            try:
                function()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return os.waitpid(child, 0)[1]

    return run
