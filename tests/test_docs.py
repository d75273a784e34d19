"""Every command that the README and the pages of docs/ show is run here, with less data and smaller networks.

A command is run as it is shown, in a folder that holds what the pages speak of (runs, images, shards). Only keys that
make it small are added. The test fails for a command that it does not know how to run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, TINY, train_tiny
from tensorboard import program
from test_imagenet import SIZES, archives  # noqa: F401 - a fixture

from resnext_ignite import convert, pack, train
from resnext_ignite.distributed import launch

pytestmark = pytest.mark.xdist_group("docs")

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What makes any training small. Of two values for a key the last one wins, so that these come after the shown ones.
SMALL = ["train.epochs=1", "train.batch_size=8", *(line for line in TINY if line.startswith(("model", "logging")))]
ON_SHAPES = ["data.name=shapes", "data.train_size=16", "data.test_size=8"]
ON_FILES = ["data.image_size=16", "data.workers=0"]


def shown() -> list[str]:
    """The commands in the code blocks of all pages, each once; continued lines are joined, comments cut off."""
    found: dict[str, None] = {}
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            for line in [] if language else block.replace("\\\n", " ").splitlines():
                command = " ".join(line.split("  #")[0].split())
                if re.match(r"(python|bash|sbatch|tensorboard|mkdir|\.|[A-Z]+=\S+) ", command):
                    found[command] = None
                elif page.name != "architecture.md":
                    # The layout of a folder, or nothing: a command of another kind must be added above.
                    assert command == "" or command.startswith("IMAGES/"), f"{page.name}: {command}"
    return list(found)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """A folder with two runs, images, shards of them, and a checkpoint of ResNeXt.pytorch."""
    folder = tmp_path_factory.mktemp("shown")
    for name, rate in (("first", 0.1), ("second", 0.2)):
        values = [f"optimizer.lr={rate}", "train.epochs=1", "logging.tensorboard=true"]
        assert train_tiny(folder / "runs" / name, *values) == 0
    shutil.copytree(picture_folder, folder / "IMAGES")
    shutil.copy(picture_folder / "test/dark/00.png", folder / "image.jpg")
    for output in ("packed", "imagenet/shards"):
        assert pack.main([str(picture_folder), "--output", str(folder / output), "--workers", "0"]) == 0
    on_images = ["data.name=imagefolder", f"data.root={picture_folder}", "data.train_size=null", "data.test_size=null"]
    assert train_tiny(folder / "runs/own", *on_images, *ON_FILES, "train.epochs=1") == 0
    for run, system, name in (("first", "resnext.pytorch", "model.pytorch"), ("own", "timm", "timm.pth")):
        to = ["--to", system, "--output", str(folder / name)]
        assert convert.main(["--checkpoint", str(folder / "runs" / run), *to]) == 0
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, as the working directory, with the folders that the pages make."""
    shutil.copytree(made, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    for command in shown():
        if command.startswith("mkdir "):
            subprocess.run(shlex.split(command), check=True)
    return tmp_path / "here"


def run_train(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = " ".join(arguments)
    if "--help-config" in given:
        assert train.main(arguments) == 0
        return
    small = [*SMALL]
    if "--resume" not in given:
        on_files = "imagefolder" in given or "data.name=shards" in given
        small += ON_FILES if on_files else ON_SHAPES
        small += [] if "model.pretrained" in given else ["model.pretrained=null"]
        output = re.search(r"--output-dir (\S+)", given)
        if output is not None:
            # The run that the command makes, which is there already for the other commands.
            shutil.rmtree(output[1], ignore_errors=True)
    else:
        # Those of the run: what is small already stays as it is.
        small = []
    spawned: list[int] = []

    def spawn(function: Callable[..., None], args: tuple[object, ...], count: int, *rest: object) -> int:
        spawned.append(count)
        return 0

    monkeypatch.setattr(launch, "_spawn_and_wait", spawn)
    assert train.main([*arguments, *small]) == 0
    # Ranks in processes of their own are tests/test_ranks.py's and tests/test_launchers.py's.
    assert spawned == [int(count) for count in re.findall(r"--nproc-per-node (\d+)", given)]


def run_module(name: str, arguments: list[str]) -> None:
    main: Callable[[list[str]], int] = import_module(f"resnext_ignite.{name}").main
    on_files = "data.name=imagefolder" in arguments
    # The largest group of BatchNorm in a plan is of 32 images.
    more = {"imagenet": SIZES, "ablate": [*SMALL, *(ON_FILES if on_files else ON_SHAPES)]}.get(name, [])
    more += ["train.batch_size=32"] if on_files and name == "ablate" else []
    if name in ("pack", "convert") and "--output" in arguments:
        # What the command makes is there already for the other commands.
        made = Path(arguments[arguments.index("--output") + 1])
        shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
    assert main([*arguments, *more]) == 0


def run_launcher(command: str, here: Path) -> None:
    """Run a script with stand-ins for Slurm, GPUs and Python; the command that it starts must be a valid one."""
    stubs = here / "stubs"
    stubs.mkdir()
    words = here / "words"
    for name, lines in {
        "python": f'printf "%s\\n" "$@" >{words}',
        "srun": f'printf "%s\\n" "$@" >{words}',
        "sbatch": 'while [[ "$1" != *.sh ]]; do shift; done; SLURM_JOB_ID=7 exec bash "$@"',
        "nvidia-smi": 'printf "GPU\\nGPU\\n"',
    }.items():
        (stubs / name).write_text(f"#!/bin/bash\n{lines}\n")
        (stubs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{stubs}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], check=True, env=environment)
    started = words.read_text().splitlines()
    parsed = train.parse_arguments(started[started.index("resnext_ignite.train") + 1 :])
    assert parsed.config.startswith("configs/")
    assert parsed.resume or parsed.nproc_per_node == 2


def run_quickstart(here: Path) -> None:
    """The script itself, in the environment of the tests, which it takes for the one that it has made."""
    environment = here / "environment"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    installed = b"".join((ROOT / name).read_bytes() for name in ("setup.cfg", "constraints.txt"))
    (environment / ".installed").write_text(f"{hashlib.sha256(installed).hexdigest()} {ROOT}\n")
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/run_quickstart.sh"), *SMALL, *ON_SHAPES, "logging.curves=true"],
        env={**os.environ, "RESNEXT_VENV": str(environment)},
        capture_output=True,
        text=True,
        check=True,
    )
    (run,) = re.findall(r"^run folder: (\S+)$", done.stdout, flags=re.MULTILINE)
    try:
        assert f"curve: {run}/curves.png" in done.stdout.splitlines()
        assert (ROOT / run / "curves.png").exists()
    finally:
        shutil.rmtree(ROOT / run)


# Commands that something else runs.
RUN_ELSEWHERE = {
    ". scripts/setup_env.sh": "sourced by `bash scripts/run_tests.sh`",
    '. scripts/setup_env.sh "[export]"': "sourced with these extras by `bash scripts/run_tests.sh`",
    ". .venv/bin/activate": "made by Python's venv",
    "bash scripts/run_tests.sh": "runs this test",
}


def run_timed(command: str, here: Path) -> None:
    """One seed instead of three, and small."""
    environment = {**os.environ, "PYTHON": sys.executable, "SEEDS": "1", "OUT": str(here / "timed")}
    small = [
        *SMALL,
        *(ON_FILES if "imagefolder" in command else ON_SHAPES),
        "augment.progressive_from=null",
        "train.compile=false",
    ]
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/time_to_error.sh"), *shlex.split(command)[2:], *small],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"^ +1 +[\d.]+ = ", done.stdout, flags=re.MULTILINE), done.stdout


def each_with_its_marks() -> list[object]:
    # The exports are those of tests/test_export.py.
    long = ("scripts/time_to_error.sh", "configs/ablations/cifar10_resnext11_small.yaml", "torch-export", "onnx")
    return [
        pytest.param(command, marks=pytest.mark.slow if any(word in command for word in long) else ())
        for command in shown()
    ]


@pytest.mark.parametrize("command", each_with_its_marks())
def test_a_shown_command_runs(
    command: str, here: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch = request.getfixturevalue("monkeypatch")
    words = shlex.split(command)
    if words[0] == "mkdir":
        assert all(Path(word).is_dir() for word in words[2:])
    elif command in RUN_ELSEWHERE:
        assert Path(ROOT / words[1]).exists() or words[1].startswith(".venv")
    elif words[:2] == ["python", "-m"] and words[2] == "resnext_ignite.train":
        run_train(words[3:], monkeypatch)
    elif words[:2] == ["python", "-m"] and words[2].startswith("resnext_ignite."):
        run_module(words[2].removeprefix("resnext_ignite."), words[3:])
    elif words[:2] == ["bash", "scripts/prepare_imagenet.sh"]:
        for path in request.getfixturevalue("archives").iterdir():
            shutil.copy(path, here)
        shutil.rmtree("imagenet")
        run_module("imagenet", words[2:])
    elif words[:2] == ["bash", "scripts/run_quickstart.sh"]:
        run_quickstart(here)
    elif words[:2] == ["bash", "scripts/time_to_error.sh"]:
        run_timed(command, here)
    elif words[0] == "tensorboard":
        board = program.TensorBoard()
        board.configure(argv=[*words, "--inspect"])
        assert board.main() == 0
        # What it would show, of both runs.
        assert capsys.readouterr().out.count("test/top1_error") == 2
    elif any(word.startswith("scripts/train_") for word in words):
        run_launcher(command, here)
    else:
        raise AssertionError(f"teach this test to run: {command}")


def test_an_installation_that_fails_is_tried_again(tmp_path: Path) -> None:
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    for status in (1, 1, 0):
        python.write_text(f'#!/bin/sh\ncase "$*" in *--version) exit 0 ;; esac\nexit {status}\n')
        python.chmod(0o755)
        command = ["bash", "-c", f"set -euo pipefail; . {ROOT}/scripts/setup_env.sh '[x]'; echo $python"]
        done = subprocess.run(
            command, env={**os.environ, "RESNEXT_VENV": str(tmp_path)}, capture_output=True, text=True
        )
        assert done.returncode == status
        assert ("the installation failed" in done.stderr) == bool(status)
        assert (tmp_path / ".installed[x]").exists() == (not status)
    assert done.stdout == f"{python}\n"


def test_pages_link_to_what_is_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short_and_the_index_lists_every_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    index = (ROOT / "docs/index.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "index.md" or f"({page.name})" in index
