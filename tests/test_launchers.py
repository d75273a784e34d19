"""Under torchrun and srun: their environment, and what torchrun's restarts repeat and what not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, digest, tiny_arguments

from resnext_ignite.distributed import launch
from resnext_ignite.distributed.environment import (
    launched_by_srun,
    launched_by_torchrun,
    launched_on_this_machine,
    launched_world_size,
    record_exit_for_torchrun,
)
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    PreemptedError,
    RankError,
    ResnextError,
)

SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, 1),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 8),
        (SRUN, 4),
        # A batch script itself is no task of a step, though it sees their number.
        ({**SRUN, "SLURM_STEP_ID": None}, 1),
        # torchrun inside a step knows better.
        ({**SRUN, "RANK": "3", "WORLD_SIZE": "16"}, 16),
    ],
)
def test_the_launcher_says_how_many_ranks_there_are(environment: dict[str, str | None], size: int) -> None:
    known = {key: value for key, value in environment.items() if value is not None}
    assert launched_world_size(known) == size
    assert (launched_by_torchrun(known) or launched_by_srun(known)) == (size > 1)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}, 4),
        # Eight tasks on two machines each, four on a third.
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "1"}, 8),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "2"}, 4),
        (SRUN, 1),
    ],
)
def test_the_launcher_says_how_many_ranks_a_machine_has(environment: dict[str, str], count: int) -> None:
    assert launched_on_this_machine(environment) == count


def test_more_ranks_than_gpus_are_refused_before_any_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"^2 ranks on a machine where each sees 1 GPUs: start one rank per GPU"):
        launch.launch(print, nproc_per_node=2)


def test_a_rank_uses_the_cores_it_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    assert Ranks(3, 8, 3, 8).cores() == 1
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert Ranks(3, 8, 3, 8).cores() == 12


def end(attempt: Path, error: ResnextError, monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> None:
    """End a rank's attempt with an error, as torchrun would see it."""
    file = attempt / str(rank) / "error.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with record_exit_for_torchrun():
        raise error


@pytest.mark.parametrize("kind", [ConfigError, DataError, NonFiniteError, PreemptedError])
def test_an_end_that_a_restart_would_not_cure_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ResnextError]
) -> None:
    with pytest.raises(kind, match=r"^why$"):
        end(tmp_path / "attempt_0", kind("why"), monkeypatch, rank=1)
    word = json.loads((tmp_path / "attempt_0/1/error.json").read_text())
    assert (word["message"], word["exit_code"]) == ("why", kind.exit_code)
    for attempt in ("attempt_1", "attempt_2"):
        with pytest.raises(kind, match=r"^restart by torchrun refused: why$") as caught:
            end(tmp_path / attempt, RankError("was begun"), monkeypatch)
        assert not caught.value.quiet


def test_an_end_that_a_restart_may_cure_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankError, match="rank 1 is gone"):
        end(tmp_path / "attempt_0", RankError("rank 1 is gone"), monkeypatch)
    with pytest.raises(RankError, match="begun again"):
        end(tmp_path / "attempt_1", RankError("begun again"), monkeypatch)


def test_ranks_started_anew_in_the_same_attempt_may_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As torchrun does where a machine joins: it stops the others by SIGTERM, and counts no restart.
    with pytest.raises(PreemptedError):
        end(tmp_path / "attempt_1", PreemptedError("stopped by SIGTERM"), monkeypatch)
    with pytest.raises(RankError, match="begun again"):
        end(tmp_path / "attempt_1", RankError("begun again"), monkeypatch)


RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def patched_train(script: Path, patch: str) -> Path:
    """A script that is the train command after some lines of Python."""
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import os, signal, torch\n"
        "from pathlib import Path\n"
        "from conftest import at_iteration, rank\n"
        "from resnext_ignite import train\n"
        "from resnext_ignite.runtime.errors import run_command\n"
        f"{patch}\n"
        "run_command(train.main, prints_result=False)\n"
    )
    return script


def torchrun(folder: Path, *values: str, patch: str = "", ranks: int = 2, restarts: int = 0) -> Any:
    """The train command under torchrun on this machine, each rank after some lines of Python."""
    script = patched_train(folder.parent / "train.py", patch)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", str(script), *tiny_arguments(folder, *values, resume=True)]
    environment = {**os.environ, **RANK_ENVIRONMENT}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)


OFTEN = ["checkpoint.every_iterations=1", "logging.every_iterations=1"]
KILL = "at_iteration(6, lambda engine: rank() == 1 and FIRST and os.kill(os.getpid(), signal.SIGKILL))"
FIRST = "FIRST = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"


@pytest.mark.slow
def test_torchrun_brings_a_run_back_whose_rank_was_killed(tmp_path: Path) -> None:
    ended = torchrun(tmp_path / "run", *OFTEN, patch=FIRST + KILL, restarts=2)
    assert ended.returncode == 0, ended.stderr
    assert "rank 1 is gone" in ended.stderr
    assert "resuming" in ended.stderr
    whole = torchrun(tmp_path / "whole", *OFTEN)
    assert whole.returncode == 0, whole.stderr
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert "2 ranks (" in whole.stderr
    assert "8 images per rank and iteration" in whole.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "patch", "code", "line"),
    [
        (["train.batch_size=15"], "", 2, "train.batch_size: 15 cannot be shared by 2 ranks"),
        (
            [],
            "at_iteration(6, lambda engine: engine.state.sums.check(torch.tensor(False), 6))",
            5,
            "iteration 6: the loss or gradient is not finite",
        ),
        (
            [],
            "at_iteration(6, lambda engine: rank() == 1 and os.kill(os.getpid(), signal.SIGUSR1))",
            75,
            "stopped by SIGUSR1 and saved at iteration",
        ),
    ],
    ids=["config", "number", "preemption"],
)
def test_torchrun_does_not_repeat_what_a_restart_does_not_cure(
    tmp_path: Path, values: list[str], patch: str, code: int, line: str
) -> None:
    ended = torchrun(tmp_path / "run", *OFTEN, *values, patch=patch, restarts=2)
    assert ended.returncode == 1
    assert line in ended.stderr
    assert f"exitcode  : {code} " in ended.stderr
    if code != 2:
        assert ended.stderr.count("epoch 1/3 iteration 1 ") == 1
        assert f"restart by torchrun refused: {line}" in ended.stderr
        assert RunFolder(tmp_path / "run").read_status()["exit_code"] == code


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_spawned.sh", "train_torchrun.sh"])
def test_the_scripts_start_ranks(tmp_path: Path, script: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **RANK_ENVIRONMENT, "RANKS": "2", "PATH": path}
    command = ["bash", str(ROOT / "scripts" / script), *tiny_arguments(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "2 ranks (" in ended.stderr
    assert RunFolder(tmp_path / "run").read_status()["state"] == "completed"


@pytest.mark.slow
def test_srun_starts_ranks_by_its_environment(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1"}
    job |= {"SLURM_JOB_NODELIST": "localhost", **RANK_ENVIRONMENT}
    command = [sys.executable, "-m", "resnext_ignite.train", *tiny_arguments(tmp_path / "run")]
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, **job, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    said = [task.communicate(timeout=240)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "2 ranks (" in said[0]
    assert RunFolder(tmp_path / "run").read_status()["state"] == "completed"
