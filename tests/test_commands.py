"""The commands as a user meets them: what they print, how they leave, and what they do not import."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Command, command, train_tiny
from PIL import Image
from test_imports import COMMANDS

from resnext_ignite import convert, evaluate, predict, report
from resnext_ignite.config.resume import SAFE_ON_RESUME
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ResnextError,
    RunFolderError,
    as_resnext_error,
)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_comes_before_torch(name: str) -> None:
    result = command(name, "--help", flags=("-X", "importtime"))
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: python -m resnext_ignite.{name}")
    for heavy in ("torch", "matplotlib", "pydantic", "numpy"):
        assert f" {heavy}\n" not in result.stderr


def test_a_wrong_config_is_one_line_before_torch(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("train:\n  epocs: 3\n")
    arguments = ("--config", str(config), "--output-dir", str(tmp_path / "run"))
    result = command("train", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"error: {config}:2: train.epocs: unknown key (did you mean 'train.epochs'?)\n"
    assert not (tmp_path / "run").exists()
    timed = command("train", *arguments, flags=("-X", "importtime"))
    assert " torch\n" not in timed.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "--config FILE: missing"),
        (("--resume",), "--resume: name the run with --output-dir RUN"),
        (("--config", "configs/quickstart.yaml", "--nproc-per-node", "0"), "--nproc-per-node: 0; at least 1"),
        (
            ("--config", "configs/quickstart.yaml", "--nproc-per-node", "3"),
            "train.batch_size: 64 cannot be shared by 3 ranks of 1 micro-batches; 63 or 66 can",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    from resnext_ignite import train

    with pytest.raises(ConfigError) as caught:
        train.main([str(ROOT / a) if a.startswith("configs/") else a for a in arguments])
    assert str(caught.value).startswith(line)


def test_the_whole_command_in_its_own_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["--config", str(ROOT / "configs/quickstart.yaml"), "--output-dir", str(folder), *TINY]
    result = command("train", *arguments, "train.epochs=1")
    assert result.returncode == 0
    assert "test error" in result.stdout.splitlines()[0]
    assert result.stdout.splitlines()[1] == f"run folder: {folder}"
    assert "epoch 1/1 iteration 4 loss" in result.stderr
    again = Command(folder).wait()
    assert (again.code, again.stdout) == (7, "")
    assert again.stderr == (f"error: {folder}: holds a run already; add --resume, or choose another --output-dir\n")


def test_evaluate_repeats_the_runs_figures(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = RunFolder(finished_run).read_metrics()[-1]
    assert evaluate.main(["--checkpoint", str(finished_run), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    counts = {"images", "correct", "correct_top5", "top1_error", "top5_error", "loss", "calibration_error"}
    assert set(counted) == {"checkpoint", "split"} | counts
    for key in ("images", "correct", "top1_error", "top5_error", "loss"):
        assert counted[key] == last[key]


def test_evaluate_prints_a_table_and_draws(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "confusion.png"
    arguments = ["--checkpoint", str(finished_run), "--split", "train", "--confusion", str(picture)]
    assert evaluate.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "images", "error", "%", "mostly", "taken", "for"]
    assert sum(int(line.split()[1]) for line in lines[1:11]) == 70
    assert lines[11].startswith("train: 70 images")
    with Image.open(picture) as image:
        assert min(image.size) > 300


def test_per_class_table_by_hand() -> None:
    import torch

    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 3, 5]])
    assert evaluate.per_class_table(confusion, ("cat", "yak", "elk")).splitlines() == [
        "class  images  error %  mostly taken for",
        "cat         4    25.00  yak (1)",
        "yak         0        -  -",
        "elk        10    50.00  yak (3)",
    ]


def test_evaluate_refuses_what_would_not_be_that_model(finished_run: Path, picture_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.name=x: cannot be overridden in an evaluation"):
        evaluate.main(["--checkpoint", str(finished_run), "model.name=x"])
    other = ["data.name=imagefolder", f"data.root={picture_folder}", "data.test_size=null"]
    with pytest.raises(CheckpointError, match=r"has the classes disk, .* \(10\), but the data has dark, light"):
        evaluate.main(["--checkpoint", str(finished_run), *other])
    with pytest.raises(DataError, match="no val split"):
        evaluate.main(["--checkpoint", str(finished_run), "--split", "val"])
    with pytest.raises(CheckpointError, match="No such file"):
        evaluate.main(["--checkpoint", "none.pt"])


def test_report_of_one_and_of_several(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    train_tiny(other, "optimizer.lr=0.2")
    capsys.readouterr()
    picture = tmp_path / "both.png"
    assert report.main([str(finished_run), str(other), "--output", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "completed" in out.splitlines()[1]
    assert "  optimizer.lr: 0.1 | 0.2" in out.splitlines()
    with Image.open(picture) as image:
        assert min(image.size) > 500
    assert report.main([str(other), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    last = RunFolder(other).read_metrics()[-1]
    assert (run["last_error"], run["epoch"], run["images"]) == (last["top1_error"], 3, 37)
    with pytest.raises(RunFolderError, match="not a run folder"):
        report.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "/x/y"), 6, "/x/y: No space left on device"),
        (PermissionError(13, "Permission denied", "/x"), 6, "/x: Permission denied"),
        (KeyboardInterrupt(), 75, "Ctrl-C"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 2, "train.batch_size"),
    ],
)
def test_errors_of_the_machine_have_their_codes(error: BaseException, code: int, words: str) -> None:
    known = as_resnext_error(error)
    assert isinstance(known, ResnextError)
    assert known.exit_code == code
    assert words in str(known)


def test_a_bug_keeps_its_traceback() -> None:
    assert as_resnext_error(KeyError("x")) is None
    assert as_resnext_error(OSError("without a number")) is None
    assert as_resnext_error(OSError(9, "Bad file descriptor")) is None
    assert as_resnext_error(ProcessLookupError(3, "No such process")) is None
    assert as_resnext_error(socket.gaierror(-2, "Name or service not known")) is None


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (5, False)])
def test_the_slurm_script_queues_again_what_was_preempted(tmp_path: Path, code: int, requeued: bool) -> None:
    (tmp_path / "bin").mkdir()
    for name, result in (("srun", code), ("scontrol", 0)):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/{name}\nexit {result}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = ["bash", str(ROOT / "scripts/train_slurm.sh"), "--config", "c.yaml", "seed=2"]
    assert subprocess.run(command, env=environment, check=False).returncode == code
    expected = "--wait=120 python -m resnext_ignite.train --config c.yaml seed=2 --output-dir runs/slurm-7 --resume\n"
    assert (tmp_path / "srun").read_text() == expected
    assert (tmp_path / "scontrol").exists() == requeued
    assert not requeued or (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_the_page_on_performance_holds_the_floors() -> None:
    table = runpy.run_path(str(ROOT / "docs/benchmarks.py"))["table"]()
    assert "`cifar_resnext29_8x64d`, 32 | 32.3 |" in table
    assert table in (ROOT / "docs/benchmarks.md").read_text()


def test_the_page_on_scaling_holds_what_its_script_computes() -> None:
    tables = runpy.run_path(str(ROOT / "docs/scaling.py"))["tables"](0.4)
    assert tables.count("\n| 1024 |") == 2
    assert tables in (ROOT / "docs/scaling.md").read_text()


def test_the_docs_tell_what_a_resumed_run_may_change() -> None:
    text = (ROOT / "docs/recovery.md").read_text()
    for key in SAFE_ON_RESUME:
        assert f"`{key}`" in text or f"`{key.partition('.')[0]}.*`" in text, key


@pytest.mark.parametrize("place", ["nowhere/x.png", "folder", "pipe", "long" * 100 + ".png"])
def test_a_place_where_nothing_can_be_written_is_told_at_once(finished_run: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    path, run = str(tmp_path / place), str(finished_run)
    for main, arguments in [
        (evaluate.main, ["--checkpoint", run, "--confusion", path]),
        (predict.main, ["--checkpoint", run, "--save-sheet", path, "x.png"]),
        (report.main, [run, "--output", path]),
        (report.main, [run, "--html", path]),
        (convert.main, ["--checkpoint", run, "--to", "timm", "--output", path]),
    ]:
        with pytest.raises(ConfigError, match="--"):
            main(arguments)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_names_that_are_no_text_are_drawn_and_printed(tmp_path: Path, picture_folder: Path) -> None:
    """A class and a picture whose names are bytes that are no UTF-8, under a locale that minds."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(picture_folder, data)
    for split in ("train", "test"):
        (data / split / "dark").rename(data / split / os.fsdecode(b"caf\xe9 \x01"))
    keys = ["data.name=imagefolder", f"data.root={data}", "data.image_size=16", "data.train_size=null"]
    keys += ["data.test_size=null", "train.batch_size=4", "train.epochs=1", "logging.tensorboard=true"]
    assert train_tiny(run, *keys) == 0
    picture = tmp_path / os.fsdecode(b"bad\xff.png")
    shutil.copy(data / "test/light/00.png", picture)
    sheet = str(tmp_path / "sheet.png")
    arguments = ["-m", "resnext_ignite.predict", "--checkpoint", str(run), str(picture), "--save-sheet", sheet]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"bad\xff.png" in done.stdout
    assert b"caf\xe9" in done.stdout
