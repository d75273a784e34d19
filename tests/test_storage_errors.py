"""Error numbers of the system, injected at the calls by which a run's folder is read, written and locked."""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import io
import os
import random
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, assert_newest_is_there, at_iteration, digest, train_tiny
from ignite.engine import Engine

from resnext_ignite.config.files import load_config
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import StorageError, as_resnext_error
from resnext_ignite.training.handlers import plots

DIED = 86
ERRNOS = (
    *("EPERM", "EIO", "ENXIO", "ENOMEM", "EACCES", "EBUSY", "ENODEV", "EINVAL", "ENFILE", "EMFILE", "EFBIG", "ENOSPC"),
    *("EROFS", "EPIPE", "ENOLCK", "ENOSYS", "EOPNOTSUPP", "ESTALE", "EDQUOT", "EUCLEAN", "EREMOTEIO", "ETIMEDOUT"),
    *("ENOTCONN", "ESHUTDOWN", "EHOSTDOWN"),
)
CHANCES = {"ever_after": 0.5, "cut": 0.15, "resume": 0.2}
VALUES = ["train.epochs=2", "data.train_size=40", "data.test_size=11", "checkpoint.every_iterations=1"]


class Calls:
    """Counts the calls by which this process changes or reads a folder, and lets one of them fail.

    Args:
        folder: only what lies in it.
        log: a line is added for each call, and for each resume point that has its name.
        fail: the number of the call that fails, from 1; 0: none. Or a part of the name of the first call that fails.
        number: of the error.
        ever_after: all calls after it fail too, as of a disk that is gone.
    """

    def __init__(
        self, folder: Path, log: Path, fail: int | str = 0, number: int = errno.EIO, *, ever_after: bool = False
    ) -> None:
        self.folder, self.log, self.fail, self.number, self.ever_after = str(folder), log, fail, number, ever_after
        self.count = 0
        self.failed = False

    def _called(self, name: str, path: object) -> None:
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else str(path)
        if not text.startswith(self.folder):
            return
        call = f"{name} {Path(text).name}"
        self.count += 1
        with self.open(self.log, "a") as log:
            log.write(call + "\n")
        due = self.count == self.fail if isinstance(self.fail, int) else self.fail in call and not self.failed
        if due or (self.failed and self.ever_after):
            self.failed = True
            # As the system does: what fails on an open file does not know its name.
            names = [] if name in ("write", "flush", "fsync", "flock") else [text]
            raise OSError(self.number, os.strerror(self.number), *names)

    def install(self) -> None:
        """Hook the functions."""
        self.open = io.open
        calls = self

        class Counted:
            """An open file whose first writes, and flushes, are counted."""

            def __init__(self, file: Any, path: object) -> None:
                self._file, self._path, self._writes = file, path, 0

            def write(self, data: Any) -> Any:
                self._writes += 1
                if self._writes <= 2:
                    calls._called("write", self._path)
                return self._file.write(data)

            def flush(self) -> None:
                calls._called("flush", self._path)
                self._file.flush()

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                self._file.close()

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            calls._called("open", path)
            file = calls.open(path, mode, *args, **kwargs)
            writes = str(path).startswith(calls.folder) and not mode.startswith("r")
            return Counted(file, path) if writes else file

        io.open = builtins.open = opened  # type: ignore[assignment]
        for name in ("fsync", "open", "replace", "rename", "unlink", "mkdir"):
            setattr(os, name, self._hooked(name, getattr(os, name)))
        fcntl.flock = self._hooked("flock", fcntl.flock)
        plots.Curves.draw = lambda self: None  # type: ignore[method-assign]
        plots.MistakesPlot.__call__ = lambda self, engine: None  # type: ignore[method-assign]

    def _hooked(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(what: Any, *args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else what
            self._called(name, path)
            result = call(what, *args, **kwargs)
            if name == "replace" and Path(args[0]).match("iteration_*.pt"):
                with self.open(self.log, "a") as log:
                    log.write(f"saved {int(Path(args[0]).stem.partition('_')[2])}\n")
            return result

        return hooked

    def saved(self) -> int:
        """The iteration of the newest resume point that has had its name."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return max((int(line.split()[1]) for line in lines if line.startswith("saved ")), default=0)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_tiny(folder, *VALUES) == 0
    return digest(folder)


@pytest.mark.parametrize("name", ERRNOS)
def test_every_error_number_is_one_of_storage(name: str) -> None:
    number = getattr(errno, name)
    for path in ("runs/a/checkpoints/iteration_00000001.pt", None):
        known = as_resnext_error(OSError(number, os.strerror(number), path))
        assert isinstance(known, StorageError)
        assert os.strerror(number) in str(known)
        assert str(known).startswith(path or "a file: ")


@pytest.mark.parametrize(
    ("call", "name", "code"),
    [
        ("flock .lock", "ENOLCK", 6),
        ("flock .lock", "ENOSYS", 6),
        ("mkdir checkpoints", "ESTALE", 6),
        ("write .config.yaml.tmp", "EUCLEAN", 6),
        ("write metrics.jsonl", "ENOTCONN", 6),
        ("fsync metrics.jsonl", "ETIMEDOUT", 6),
        # A BrokenPipeError to Python.
        ("fsync .iteration_00000002.pt.tmp", "ESHUTDOWN", 6),
        ("fsync checkpoints", "EREMOTEIO", 6),
        ("open .iteration_00000003.pt.sha256.tmp", "EMFILE", 6),
        ("replace .iteration_00000002.pt.tmp", "EPIPE", 6),
        ("unlink iteration_00000001.pt", "ENODEV", 6),
        ("write .final.pt.tmp", "EFBIG", 6),
        # What a run can do without.
        ("write .best.pt.tmp", "EFBIG", 0),
        ("fsync .status.json.tmp", "ESTALE", 0),
        ("open .evaluation.json.tmp", "ENFILE", 0),
    ],
)
def test_an_error_of_storage_ends_a_run_with_6_and_loses_nothing(
    tmp_path: Path, expected: dict[str, Any], call: str, name: str, code: int
) -> None:
    folder = tmp_path / "run"
    calls = Calls(folder, tmp_path / "calls", call, getattr(errno, name))
    outcome = Command(folder, *VALUES, patch=calls.install).wait()
    assert outcome.code == code, outcome.stderr
    assert "Traceback" not in outcome.stderr
    reason = os.strerror(getattr(errno, name))
    if code:
        (line,) = outcome.errors
        assert reason in line
        assert str(folder) in line
        assert RunFolder(folder).read_status().get("state") in (None, "failed")
    else:
        assert f"could not be written ({reason}); training continues" in outcome.stderr
    assert_newest_is_there(folder, calls.saved())
    assert train_tiny(folder, *VALUES, resume=True) == 0
    assert digest(folder) == expected


def test_the_last_status_is_written_or_the_run_has_failed(tmp_path: Path) -> None:
    def patch() -> None:
        write = RunFolder.write_status

        def failing(folder: RunFolder, state: str, **fields: Any) -> None:
            if state == "completed":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder.path / "status.json"))
            write(folder, state, **fields)

        RunFolder.write_status = failing  # type: ignore[method-assign, assignment]

    folder = tmp_path / "run"
    outcome = Command(folder, *VALUES, patch=patch).wait()
    assert outcome.code == 6
    assert "status.json: Input/output error" in outcome.errors[0]
    assert RunFolder(folder).read_status()["state"] == "failed"
    assert train_tiny(folder, *VALUES, resume=True) == 0
    assert RunFolder(folder).read_status()["state"] == "completed"


def test_a_run_that_can_open_no_file_writes_down_why_it_failed(tmp_path: Path, expected: dict[str, Any]) -> None:
    def open_all(engine: Engine) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        with contextlib.suppress(OSError):
            while True:
                os.open(os.devnull, os.O_RDONLY)

    folder = tmp_path / "run"
    outcome = Command(folder, *VALUES, patch=lambda: at_iteration(3, open_all)).wait()
    assert outcome.code == 6
    (line,) = outcome.errors
    assert "iteration_00000003.pt" in line
    assert line.endswith(": Too many open files; raise `ulimit -n` or lower data.workers")
    status = RunFolder(folder).read_status()
    assert (status["state"], status["exit_code"]) == ("failed", 6)
    assert train_tiny(folder, *VALUES, resume=True) == 0
    assert digest(folder) == expected


def test_a_config_on_failing_storage_is_no_wrong_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1")

    def gone(*args: object, **options: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "open", gone)
    with pytest.raises(OSError, match="Stale file handle") as caught:
        load_config(path)
    known = as_resnext_error(caught.value)
    assert isinstance(known, StorageError)
    assert str(known) == f"{path}: Stale file handle; check that storage, then run the command again"


def try_error(
    folder: Path, fail: int, number: int, expected: dict[str, Any], *, ever_after: bool, cut: bool, resume: bool
) -> str:
    """One error in a run (or, `cut`, in the resumed second half of one); what came of it.

    Args:
        resume: see that the run goes on to the same end once the storage is well again.
    """
    if cut:
        die = Command(folder, *VALUES, patch=lambda: at_iteration(3, lambda engine: os._exit(DIED)))
        assert die.wait().code == DIED
    calls = Calls(folder, folder.parent / "calls", fail, number, ever_after=ever_after)
    outcome = Command(folder, *VALUES, patch=calls.install, resume=cut).wait()
    lines = calls.log.read_text().splitlines()
    said = f"{errno.errorcode[number]} at call {fail}, {lines[fail - 1] if fail <= len(lines) else 'none'}"
    said += f", ever after: {ever_after}, resumed: {cut}: {outcome.code}"
    assert "Traceback" not in outcome.stderr, f"{said}\n{outcome.stderr}"
    if outcome.code == 0:
        # Only what a run can do without, which then is told, or what it could undo.
        assert digest(folder) == expected, said
    else:
        # 7: some file systems answer so where another process has a lock. 4: no checkpoint can be read.
        allowed = {6, 7} if "flock" in said else {6, 4} if cut else {6}
        assert outcome.code in allowed, f"{said}\n{outcome.stderr}"
        assert len(outcome.errors) == 1, f"{said}\n{outcome.stderr}"
    assert_newest_is_there(folder, calls.saved())
    # What could not be read this time is not taken for damaged.
    assert not list(folder.rglob("*.damaged")), said
    if resume:
        outcome = Command(folder, *VALUES, resume=True).wait()
        assert outcome.code == 0, f"{said}\n{outcome.stderr}"
        assert digest(folder) == expected, said
    calls.log.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    return f"exit {said.rpartition(' ')[2]}"


@pytest.mark.soak
@pytest.mark.parametrize("part", range(5))
def test_every_error_number_at_every_call(
    tmp_path: Path, expected: dict[str, Any], part: int, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = Calls(tmp_path / "run", tmp_path / "calls")
    assert Command(tmp_path / "run", *VALUES, patch=counted.install).wait().code == 0
    count = len(counted.log.read_text().splitlines())
    counted.log.unlink()
    shutil.rmtree(tmp_path / "run")
    assert count >= 100
    draw, tally = random.Random(part), Counter[str]()
    share = float(os.environ.get("SOAK_SHARE", "1"))
    for fail in range(1, count + 1):
        # Each part takes five of the numbers; every call meets all twenty-five.
        for number in (getattr(errno, name) for name in ERRNOS[part::5]):
            if draw.random() < share:
                options = {name: draw.random() < chance for name, chance in CHANCES.items()}
                tally[try_error(tmp_path / "run", fail, number, expected, **options)] += 1
    with capsys.disabled():
        sys.stdout.write(f"\n{count} calls, part {part}: {tally.total()} errors, {dict(tally)}, all held ")
