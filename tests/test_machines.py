"""Several machines: network namespaces of this one, joined by a bridge, each with a torchrun and a host name.

They need a user who may make namespaces; elsewhere these tests are skipped with the reason.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Command, digest, tiny_arguments
from test_launchers import OFTEN, RANK_ENVIRONMENT, patched_train

from resnext_ignite.runs.folder import RunFolder

pytestmark = pytest.mark.slow
NAMES = ("alpha", "beta", "gamma")
HUB = "resnext-hub"
# What each rank was told at the end, beside the run folder.
RECORD = """
from resnext_ignite.training.handlers.session import AttachedRun
inner = AttachedRun.train
def train_and_tell(self, *arguments):
    record = inner(self, *arguments)
    Path(os.environ["RECORDS"], os.environ["RANK"]).write_text(repr(record["top1_error"]))
    return record
AttachedRun.train = train_and_tell
"""
# Whether its own torchrun or another's starts a rank again, it is killed once.
KILL_ONCE = """
def kill_once(engine):
    killed = Path(os.environ["RECORDS"]).with_name("killed")
    if rank() == 1 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
at_iteration(6, kill_once)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Machine:
    """A namespace with one network interface, `eth0`."""

    def __init__(self, number: int) -> None:
        self.name, self.namespace = NAMES[number], f"resnext-{NAMES[number]}"
        self.address = f"10.77.0.{number + 1}"
        self.output = Path()
        self._process: subprocess.Popen[str] | None = None

    def connect(self) -> None:
        """Make the namespace and plug it into the hub."""
        ip("netns", "add", self.namespace)
        ip("link", "add", "eth0", "netns", self.namespace, "type", "veth", "peer", "name", self.name, "netns", HUB)
        ip("-n", HUB, "link", "set", self.name, "master", "bridge", "up")
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            ip("-n", self.namespace, "link", "set", interface, "up")

    def unplug(self) -> None:
        """Pull the cable."""
        ip("-n", HUB, "link", "set", self.name, "down")

    def start(self, command: list[str], output: Path, records: Path, hidden: Path | None) -> None:
        """Start a command there; what lies in the folder `hidden` it does not see, and cannot write."""
        setup = f"hostname {self.name}"
        if hidden is not None:
            setup += f" && mount -t tmpfs -o ro,size=4k tmpfs {hidden}"
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "sh", "-c"]
        self.output = output
        environment = {**os.environ, **RANK_ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0", "RECORDS": str(records)}
        with output.open("w") as file:
            self._process = subprocess.Popen(
                [*inside, f'{setup} && exec "$@"', "sh", *command], stdout=file, stderr=file, env=environment, text=True
            )

    def die(self) -> None:
        """Kill all that runs there, at once."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        return [int(number) for number in found.stdout.split()]

    def wait(self, seconds: float = 120) -> tuple[int, str]:
        """Exit code and output of the command, once it has ended."""
        assert self._process is not None
        code = self._process.wait(seconds)
        return code, self.output.read_text()

    def remove(self) -> None:
        self.die()
        if self._process is not None:
            self._process.wait(10)
        ip("netns", "del", self.namespace)


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Three of them."""
    made: list[Machine] = []
    try:
        ip("netns", "add", HUB)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
    try:
        ip("-n", HUB, "link", "add", "bridge", "type", "bridge")
        ip("-n", HUB, "link", "set", "bridge", "up")
        for number in range(len(NAMES)):
            made.append(Machine(number))
            made[-1].connect()
        yield made
    finally:
        for machine in made:
            machine.remove()
        ip("netns", "del", HUB)


def start(
    machines: list[Machine], folder: Path, *values: str, patch: str = "", restarts: int = 0, least: int | None = None
) -> None:
    """One run with a rank on each of some machines, of which only the first sees the run folder."""
    script = patched_train(folder.parent.parent / "train.py", RECORD + patch)
    records = script.parent / "records"
    records.mkdir()
    folder.parent.mkdir()
    # Who is gone is missed after three seconds, and those who are left wait no longer than two for others.
    patience = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2"
    for machine in machines:
        first = machine is machines[0]
        command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-id=run"]
        command += [f"--nnodes={least or len(machines)}:{len(machines)}", "--nproc-per-node=1"]
        command += [f"--rdzv-endpoint={machines[0].address}:29400", f"--local-addr={machine.address}"]
        command += [f"--rdzv-conf=is_host={int(first)},{patience}", f"--max-restarts={restarts}", str(script)]
        command += tiny_arguments(folder, *values, resume=True)
        machine.start(command, script.parent / f"{machine.name}.log", records, None if first else folder.parent)


def errors_told(folder: Path) -> list[str]:
    """The last error that each rank was given."""
    return [path.read_text() for path in sorted((folder.parent.parent / "records").iterdir())]


def wait_for(what: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def trains(folder: Path) -> Callable[[], bool]:
    return lambda: (RunFolder(folder).read_status().get("iteration") or 0) > 0


def test_two_machines_train_one_run_and_survive_a_killed_rank(tmp_path: Path, machines: list[Machine]) -> None:
    folder = tmp_path / "runs/run"
    start(machines[:2], folder, *OFTEN, patch=KILL_ONCE, restarts=2)
    ends = [machine.wait() for machine in machines[:2]]
    assert [code for code, _ in ends] == [0, 0], ends
    log = ends[0][1]
    assert log.count("2 ranks (alpha: 1, beta: 1; gloo), 8 images per rank and iteration") == 2
    assert "rank 1 is gone" in log
    assert "resuming" in log
    told = errors_told(folder)
    assert len(told) == 2
    assert told[0] == told[1]
    assert Command(tmp_path / "here", *OFTEN, ranks=2).wait().code == 0
    assert digest(folder) == digest(tmp_path / "here")


def test_a_cut_link_ends_all_machines(tmp_path: Path, machines: list[Machine]) -> None:
    folder, timeout = tmp_path / "runs/run", 5
    start(machines[:2], folder, "train.epochs=100000", *OFTEN, f"distributed.timeout_s={timeout}")
    wait_for(trains(folder))
    machines[1].unplug()
    wait_for(lambda: "error: " in machines[0].output.read_text(), timeout + 10)
    wait_for(lambda: "error: " in machines[1].output.read_text(), timeout + 10)
    code, log = machines[0].wait(30)
    assert code == 1
    assert "error: rank 1 hangs (no answer within distributed.timeout_s); continue with --resume" in log
    assert "exitcode  : 8 " in log
    assert RunFolder(folder).read_status()["exit_code"] == 8
    # Of the machine behind the cut only the rank ends by itself: its torchrun waits for an answer of the other's.
    wait_for(lambda: len(machines[1].processes()) == 1, 10)
    lost = "lost contact with the other ranks: rank 0, its launcher or the link to it is gone"
    assert f"error: {lost}" in machines[1].output.read_text()


def test_two_of_three_machines_go_on_without_the_third(tmp_path: Path, machines: list[Machine]) -> None:
    folder = tmp_path / "runs/run"
    values = [*OFTEN, "train.batch_size=12", "train.epochs=40", "distributed.timeout_s=5"]
    start(machines, folder, *values, restarts=3, least=2)
    wait_for(trains(folder))
    machines[2].die()
    ends = [machine.wait() for machine in machines[:2]]
    assert [code for code, _ in ends] == [0, 0], ends
    log = ends[0][1]
    assert "3 ranks (alpha: 1, beta: 1, gamma: 1; gloo), 4 images per rank and iteration" in log
    assert "2 ranks (alpha: 1, beta: 1; gloo), 6 images per rank and iteration" in log
    assert "resuming" in log
    assert RunFolder(folder).read_status()["state"] == "completed"
    told = errors_told(folder)
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("patch", "code", "line"),
    [
        (
            "at_iteration(6, lambda engine: engine.state.sums.check(torch.tensor(rank() != 1), 6))",
            5,
            "iteration 6: the loss or gradient is not finite",
        ),
        (
            "at_iteration(6, lambda engine: rank() == 1 and os.kill(os.getpid(), signal.SIGUSR1))",
            75,
            "stopped by SIGUSR1 and saved at iteration",
        ),
        (
            "from resnext_ignite.runtime.errors import DataError\n"
            "def fail(engine):\n"
            "    if rank() == 1:\n"
            "        raise DataError('cat.jpg: not a picture')\n"
            "at_iteration(6, fail)",
            3,
            "rank 1: cat.jpg: not a picture",
        ),
    ],
    ids=["number", "preemption", "data"],
)
def test_what_a_restart_does_not_cure_is_repeated_on_no_machine(
    tmp_path: Path, machines: list[Machine], patch: str, code: int, line: str
) -> None:
    folder = tmp_path / "runs/run"
    start(machines[:2], folder, *OFTEN, patch=patch, restarts=3)
    ends = [machine.wait() for machine in machines[:2]]
    assert [code for code, _ in ends] == [1, 1], ends
    for _, log in ends:
        assert f"restart by torchrun refused: {line}" in log
    # torchrun's own summary, on the machine that ends first: the other may find store or rendezvous gone.
    assert any(f"exitcode  : {code} " in log for _, log in ends), ends
    assert ends[0][1].count("epoch 1/3 iteration 1 ") == 1
    # Only contact with the one whose data is bad was lost by rank 0.
    assert RunFolder(folder).read_status()["exit_code"] == (8 if code == 3 else code)
