"""Ablations: what a plan may say, real ones of tiny runs that are cut and go on, and their statistics by hand."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINY, at_iteration, command, digest, rig_errors, train_tiny
from ignite.engine import Engine
from PIL import Image

from resnext_ignite import ablate, data, models
from resnext_ignite.ablation import runs
from resnext_ignite.ablation.plan import load_plan, slug
from resnext_ignite.ablation.results import Result, Row, compare, standard_error, table
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import ConfigError, PreemptedError, RunFolderError
from resnext_ignite.runtime.signals import install_exit_during_start

# One epoch of 4 iterations, 10 test pictures.
SHORT = [
    *TINY,
    "train.epochs=1",
    "data.test_size=10",
    "checkpoint.every_iterations=1",
    "logging.every_iterations=1",
    "logging.images=0",
]
PLAN = f"""
config: {ROOT / "configs/quickstart.yaml"}
overrides: {{optimizer.lr: 0.05}}
seeds: [1, 2]
variants:
  as it is: {{}}
  Smoothed, 0.1: {{train.label_smoothing: 0.1}}
"""
FOLDERS = ["as-it-is/seed_1", "smoothed-0-1/seed_1", "as-it-is/seed_2", "smoothed-0-1/seed_2"]


def write_plan(folder: Path, text: str = PLAN) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


def ablate_tiny(folder: Path, *options: str, text: str = PLAN) -> int:
    """The command on tiny runs, in this process."""
    return ablate.main([str(write_plan(folder, text)), "--output-dir", str(folder / "out"), *SHORT, *options])


def results_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out/ablation.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ablation of two variants and two seeds that nothing cut."""
    folder = tmp_path_factory.mktemp("whole")
    assert ablate_tiny(folder) == 0
    return folder


def test_an_ablation_is_ordinary_runs_by_seed_first(whole: Path, tmp_path: Path) -> None:
    finals = [(whole / "out" / folder / "checkpoints/final.pt").stat().st_mtime_ns for folder in FOLDERS]
    assert finals == sorted(finals)
    # As the train command would have made it, whatever ran before it in the same process.
    own = [*SHORT[len(TINY) :], "optimizer.lr=0.05", "train.label_smoothing=0.1", "seed=2"]
    assert train_tiny(tmp_path / "run", *own) == 0
    assert digest(tmp_path / "run") == digest(whole / "out" / FOLDERS[3])


def test_its_results_are_the_runs(whole: Path) -> None:
    found = results_in(whole)
    lasts = [RunFolder(whole / "out" / folder).read_metrics()[-1] for folder in FOLDERS]
    assert [run["error"] for run in found["runs"]] == [last["top1_error"] for last in lasts]
    assert [run["seconds"] for run in found["runs"]] == [last["wall_s"] for last in lasts]
    for run in found["runs"]:
        assert (run["state"], run["epochs"]) == ("completed", 1)
        assert 0 < run["evaluation_seconds"] < run["seconds"]
    base, other = found["variants"]
    assert found["baseline"] == base["variant"] == "as it is"
    assert base["error"] == pytest.approx((lasts[0]["top1_error"] + lasts[2]["top1_error"]) / 2)
    pairs = [lasts[1]["top1_error"] - lasts[0]["top1_error"], lasts[3]["top1_error"] - lasts[2]["top1_error"]]
    assert other["difference"] == pytest.approx(sum(pairs) / 2)
    # Of two values: half their distance.
    assert other["difference_standard_error"] == pytest.approx(abs(pairs[0] - pairs[1]) / 2)
    page = (whole / "out/ablation.md").read_text()
    assert page.startswith("# plan\n\n| variant ")
    assert "| Smoothed, 0.1 | 2 " in page
    with Image.open(whole / "out/ablation.png") as image:
        assert min(image.size) > 200


def test_the_same_command_again_only_tells(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [(whole / "out" / folder / "metrics.jsonl").stat() for folder in FOLDERS]
    assert ablate_tiny(whole, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == results_in(whole)
    assert captured.err == "4 of 4 runs are already finished\n"
    assert [(whole / "out" / folder / "metrics.jsonl").stat() for folder in FOLDERS] == before


def test_another_plan_is_not_mixed_with_what_is_there(whole: Path) -> None:
    changed = PLAN.replace("label_smoothing: 0.1", "label_smoothing: 0.2")
    with pytest.raises(RunFolderError, match=r"smoothed-0-1/seed_1: .*: train.label_smoothing 0.1 -> 0.2; choose"):
        ablate_tiny(whole, text=changed)
    with pytest.raises(RunFolderError, match=r"as-it-is/seed_1: .*: train.epochs 1 -> 2;"):
        ablate_tiny(whole, "train.epochs=2")
    # What changes no run may change; another seed is only another run.
    assert ablate_tiny(whole, "logging.every_iterations=3") == 0


def test_progress_is_a_line_a_run_and_the_data_is_loaded_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, networks = [], []
    load, build = data.load_data, models.build_model

    def counted(*args: Any) -> Any:
        loads.append(args)
        return load(*args)

    def remembered(*args: Any) -> Any:
        network = build(*args)
        networks.append(weakref.ref(network))
        return network

    monkeypatch.setattr(data, "load_data", counted)
    monkeypatch.setattr(models, "build_model", remembered)
    rig_errors(monkeypatch, lambda epoch: 20.0)
    assert ablate_tiny(tmp_path) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("run 2 of 4: Smoothed, 0.1, seed 1: test error 20.00 % in ")
    assert captured.out.startswith("| variant ")
    assert len(loads) == 1
    # Nothing of a run is left when the next begins.
    assert [network() for network in networks] == [None] * 4
    # Outside of an ablation whoever loads reads what is there now.
    assert train_tiny(tmp_path / "run", *SHORT[len(TINY) :]) == 0
    assert len(loads) == 2


def test_data_of_another_config_is_loaded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    load = data.load_data

    def counted(*args: Any) -> Any:
        loaded = load(*args)
        sizes.append(len(loaded.splits["train"]))
        return loaded

    monkeypatch.setattr(data, "load_data", counted)
    fewer = PLAN.replace("train.label_smoothing: 0.1", "data.val_size: 20").replace("[1, 2]", "[1]")
    assert ablate_tiny(tmp_path, text=fewer) == 0
    assert sizes == [70, 50]


@pytest.mark.parametrize("where", ["inside a run", "between runs"])
def test_a_killed_ablation_goes_on_and_ends_the_same(
    where: str, whole: Path, tmp_path: Path, in_fork: Callable[..., int]
) -> None:
    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def first_then_die() -> None:
        iterations = []

        def count(engine: Engine) -> None:
            iterations.append(engine.state.iteration)
            if len(iterations) == 6:
                die()

        if where == "inside a run":
            # At the second iteration of the second run; the first is saved.
            at_iteration(None, count)
        else:
            pytest.MonkeyPatch().setattr(runs, "write_results", die)
        ablate_tiny(tmp_path)

    assert os.WTERMSIG(in_fork(first_then_die)) == signal.SIGKILL
    first = tmp_path / "out" / FOLDERS[0]
    kept = (first / "checkpoints/final.pt").stat()
    assert (tmp_path / "out" / FOLDERS[1]).exists() == (where == "inside a run")
    assert ablate_tiny(tmp_path) == 0
    assert (first / "checkpoints/final.pt").stat() == kept
    for folder in FOLDERS:
        assert digest(tmp_path / "out" / folder) == digest(whole / "out" / folder)
    assert [run["error"] for run in results_in(tmp_path)["runs"]] == [run["error"] for run in results_in(whole)["runs"]]


def test_a_signal_saves_the_run_and_the_command_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def stop(engine: Engine) -> None:
        seen.append(engine.state.iteration)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        at_iteration(None, stop, patch)
        with pytest.raises(
            PreemptedError, match=r"stopped by SIGTERM: 1 of 4 runs are done, .*run the same command again"
        ):
            ablate_tiny(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert RunFolder(tmp_path / "out" / FOLDERS[1]).read_status()["state"] == "preempted"
    # What there is can be seen already.
    assert [run["state"] for run in results_in(tmp_path)["runs"]] == ["completed"] + ["unfinished"] * 3
    assert ablate_tiny(tmp_path) == 0
    assert digest(tmp_path / "out" / FOLDERS[1]) == digest(whole / "out" / FOLDERS[1])


@pytest.mark.parametrize(
    ("moment", "made"), [("after the last iteration", 1), ("while results are written", 1), ("before a run begins", 0)]
)
def test_a_signal_that_no_run_answers_ends_the_ablation(
    moment: str, made: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    if moment == "after the last iteration":
        # The last picture is drawn when all is trained and evaluated: the run completes.
        monkeypatch.setattr("resnext_ignite.training.handlers.plots.MistakesPlot.__call__", stop)
    elif moment == "while results are written":
        monkeypatch.setattr(runs, "write_results", stop)
    else:

        def begin() -> None:
            install_exit_during_start()
            stop()

        monkeypatch.setattr(ablate, "install_exit_during_start", begin)
    with pytest.raises(PreemptedError, match=f"stopped by SIGTERM: {made} of 4"):
        ablate_tiny(tmp_path)
    assert not (tmp_path / "out" / FOLDERS[1]).exists()


def test_a_run_that_diverges_counts_as_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Each update multiplies all weights by 1 - 100 * 1, and the momentum adds to it: 190^9 squared is no fp32 number.
    text = PLAN.replace("train.label_smoothing: 0.1", "optimizer.lr: 100, optimizer.weight_decay: 1")
    assert ablate_tiny(tmp_path, "train.epochs=3", text=text) == 0
    captured = capsys.readouterr()
    base, other = results_in(tmp_path)["variants"]
    assert (base["completed"], base["failed"]) == (2, 0)
    assert (other["completed"], other["failed"], other["error"], other["difference"]) == (0, 2, None, None)
    assert "run 2 of 4: Smoothed, 0.1, seed 1: failed\n" in captured.err
    assert re.search(r"out/smoothed-0-1/seed_1: failed: iteration \d+: ", captured.err)
    assert "| Smoothed, 0.1 | 0 (2 failed) |" in captured.out
    # It would fail again: it is not begun again.
    assert ablate_tiny(tmp_path, "train.epochs=3", text=text) == 0
    assert capsys.readouterr().err == "4 of 4 runs are already finished\n"


def completed(variant: str, **errors: float) -> list[Result]:
    """Results of a variant; s1=10.0 is an error of 10 % with seed 1."""
    return [Result(variant, int(seed[1:]), "completed", error=error, seconds=60.0) for seed, error in errors.items()]


def test_statistics_by_hand() -> None:
    results = [
        *completed("base", s1=10.0, s2=12.0, s3=14.0),
        *completed("better", s1=9.0, s2=11.5, s3=12.5),
        *completed("same", s1=13.0, s3=15.0),
        Result("same", 2, "failed"),
        *completed("later", s4=8.0),
        Result("none", 1, "unfinished"),
    ]
    base, better, same, later, none = compare(results, ["base", "better", "same", "later", "none"], "base")
    # Deviations -2, 0, 2: variance 8 / 2 = 4, over three runs.
    assert (base.completed, base.error, base.standard_error) == (3, 12.0, pytest.approx(2 / math.sqrt(3)))
    assert (base.pairs, base.difference, base.exceeds) == (0, None, False)
    # Differences -1, -0.5, -1.5: their deviation is 0.5; the errors themselves scatter by more than three times that.
    assert (better.pairs, better.difference) == (3, -1.0)
    assert better.difference_standard_error == pytest.approx(0.5 / math.sqrt(3))
    assert better.exceeds
    # Differences 3 and 1: mean 2, deviation sqrt(2), over two pairs 1: twice that is not exceeded.
    assert (same.completed, same.failed, same.pairs, same.difference) == (2, 1, 2, 2.0)
    assert same.difference_standard_error == pytest.approx(1.0)
    assert not same.exceeds
    # No seed in common; nothing at all.
    assert (later.error, later.standard_error, later.pairs, later.difference) == (8.0, None, 0, None)
    assert none == Row("none", 0, 0, None, None, None, 0, None, None, exceeds=False, seconds=None)
    assert standard_error([5.0]) is None


def test_the_table_by_hand() -> None:
    results = [
        *completed("a | b", s1=10.0, s2=12.0),
        *completed("c", s1=12.0, s2=14.0, s3=9.0),
        Result("d", 1, "failed"),
    ]
    rows = compare(results, ["a | b", "c", "d"], "a | b")
    lines = table(rows, "a | b").splitlines()
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines[:5]]
    assert cells[0][0] == "| variant"
    assert cells[0][1:4] == ["seeds", "error at epoch 0 %", "last-epoch error %"]
    assert cells[0][4:] == ["against the baseline", "seconds a run |"]
    # A bar in a name does not end its cell.
    assert lines[2].startswith("| a \\| b  | 2            | -                  | 11.00 ± 1.00       | baseline   ")
    assert cells[3] == ["| c", "3", "-", "11.67 ± 1.45", "+2.00 ± 0.00 * (2 pairs)", "60.0          |"]
    assert cells[4] == ["| d", "0 (1 failed)", "-", "-", "-", "-             |"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5:] == [
        "",
        "± is the standard error of the mean over seeds; differences are taken seed by seed.",
        "`*`: a difference of more than twice its standard error; with few seeds a hint, not a proof.",
    ]


def test_one_seed_shows_no_standard_error() -> None:
    results = [*completed("a", s1=10.0), *completed("b", s1=12.0)]
    row = table(compare(results, ["a", "b"], "a"), "a").splitlines()[3]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["b", "1", "-", "12.00", "+2.00", "60.0"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (PLAN.replace("seeds", "seedz"), ":4: seedz: unknown key (did you mean 'seeds'?)"),
        (PLAN.replace("[1, 2]", "[]"), ":4: seeds: []; at least one seed, as [1, 2, 3]"),
        (PLAN.replace("seeds: [1, 2]", ""), ": seeds: None; at least one seed, as [1, 2, 3]"),
        (PLAN.replace("[1, 2]", "[1, true]"), ":4: seeds.1: True; an integer from 0 to 2147483647"),
        (PLAN.replace("[1, 2]", "[1, 1]"), ":4: seeds.1: 1 is listed twice; remove one"),
        (PLAN.replace("{optimizer.lr: 0.05}", "{seed: 3}"), ":3: overrides.seed: the plan sets the seeds"),
        (
            PLAN.replace("train.label_smoothing: 0.1", "seed: 3"),
            ":7: variants.Smoothed, 0.1.seed: the plan sets the seeds",
        ),
        (PLAN.replace("optimizer.lr", "optimizer.rl"), ":3: optimizer.rl: unknown key (did you mean 'optimizer.lr'?)"),
        (PLAN.replace("smoothing: 0.1", "smoothing: 1.5"), ":7: train.label_smoothing: input should be less than 1"),
        (
            PLAN.replace("train.label_smoothing: 0.1", "train: {epochs: 2}"),
            ":7: variants.Smoothed, 0.1.train: write a config key",
        ),
        (PLAN.replace("smoothing: 0.1", "smoothing: 0"), ":7: variants.Smoothed, 0.1: has the same config as "),
        (PLAN.replace("{train.label_smoothing: 0.1}", "3"), ":7: variants.Smoothed, 0.1: 3; keys with values"),
        (
            PLAN.replace("Smoothed, 0.1", "As-it IS"),
            ":7: variants.As-it IS: has the same run folder as-it-is as 'as",
        ),
        (PLAN.replace("Smoothed, 0.1", "(+)"), ":7: variants.(+): use letters and digits"),
        (PLAN.replace("Smoothed, 0.1", "as it is"), ":7: variants.as it is: duplicate key"),
        (
            PLAN.replace("variants:", "baseline: x\nvariants:"),
            ":5: baseline: 'x' is not a variant; choose one of as it is, Smooth",
        ),
        (PLAN.replace("quickstart", "none"), "configs/none.yaml: No such file or directory"),
        (PLAN.replace("config:", "overridez:"), ":2: overridez: unknown key (did you mean 'overrides'?)"),
        (
            PLAN.replace("label_smoothing: 0.1", "batch_size: 7, augment.mixup: 1"),
            "train.batch_size: 7 cannot be shared",
        ),
        (PLAN.replace("label_smoothing: 0.1", "max_hours: 1"), ":7: variants.Smoothed, 0.1: train.max_hours may end"),
        (
            PLAN.replace("train.label_smoothing: 0.1", "evaluation.patience: 3"),
            ":7: variants.Smoothed, 0.1: evaluation.patience may end",
        ),
        ("seeds: [1]\nvariants: {a: {}}\n", ": config: None; a config file, relative to the plan's folder"),
        (f"config: {ROOT / 'configs/quickstart.yaml'}\nseeds: [1]\n", ": variants: name at least one variant, as in "),
        ("- 1\n", ": a config is a mapping of keys to values, not [1]"),
    ],
)
def test_a_wrong_plan_is_one_line_and_nothing_is_written(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ablate_tiny(tmp_path, text=text)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_wrong_command_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"command line: seed: the plan sets the seeds"):
        ablate_tiny(tmp_path, "seed=4")
    with pytest.raises(ConfigError, match=r"command line: train.epocs: unknown key \(did you mean 'train.epochs'"):
        ablate_tiny(tmp_path, "train.epocs=4")
    with pytest.raises(ConfigError, match=r"none.yaml: No such file or directory; PLAN takes a YAML file"):
        ablate.main([str(tmp_path / "none.yaml"), "--output-dir", str(tmp_path / "out")])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 ranks: an ablation is one process"):
        ablate_tiny(tmp_path)


def test_an_abandoned_run_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # As it is written in a config, with numbers for keys.
    text = PLAN.replace("train.label_smoothing: 0.1", "evaluation.abandon: {1: 0}").replace("[1, 2]", "[1]")
    assert ablate_tiny(tmp_path, "train.epochs=2", text=text) == 0
    row = results_in(tmp_path)["variants"][1]
    assert (row["completed"], row["failed"], row["error"], row["pairs"]) == (0, 1, None, 0)
    # Once is enough.
    capsys.readouterr()
    assert ablate_tiny(tmp_path, "train.epochs=2", text=text) == 0
    assert "2 of 2 runs are already finished" in capsys.readouterr().err


def test_runs_on_other_data_are_not_compared(whole: Path) -> None:
    with pytest.raises(RunFolderError, match=r"the plan has changed since this run: data.root data -> elsewhere"):
        ablate_tiny(whole, "data.root=elsewhere")


def test_a_wrong_plan_is_refused_before_torch(tmp_path: Path) -> None:
    path = write_plan(tmp_path, PLAN.replace("seeds", "seedz"))
    result = command("ablate", str(path), "--output-dir", str(tmp_path / "out"), flags=("-X", "importtime"))
    assert result.returncode == 2
    assert f"error: {path}:4: seedz: unknown key (did you mean 'seeds'?)\n" in result.stderr
    assert " torch\n" not in result.stderr


def test_what_wins_over_what(tmp_path: Path) -> None:
    path = write_plan(tmp_path, PLAN.replace("train.label_smoothing: 0.1", "optimizer.momentum: 0.5"))
    plan = load_plan(path, ["optimizer.lr=0.07", "optimizer.momentum=0.6"])
    first, second = plan.runs[:2]
    # The recipe says 0.1, the plan 0.05, the command line 0.07; and a variant's own value is what it is about.
    assert (first.config.optimizer.lr, first.config.optimizer.momentum) == (0.07, 0.6)
    assert (second.config.optimizer.lr, second.config.optimizer.momentum) == (0.07, 0.5)
    assert [(run.seed, run.config.seed) for run in plan.runs] == [(1, 1), (1, 1), (2, 2), (2, 2)]
    assert slug("Mixup: 0.2 (all) ") == "mixup-0-2-all"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/ablations").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_plan_loads(path: Path) -> None:
    plan = load_plan(path, ["model.pretrained=RUN"] if path.stem == "finetuning" else [])
    assert len(plan.runs) == len(plan.variants) * len(plan.seeds) >= 8


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_time_to_error_tells_start_training_and_evaluation_apart(tmp_path: Path) -> None:
    values = ["train.device=cpu", "data.name=shapes", "train.compile=false", *SHORT]
    result = script("time_to_error.sh", *values, OUT=str(tmp_path / "out"), SEEDS="1 2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[2].startswith("| recipe  | 2 ")
    for line, seed in zip(lines[-2:], (1, 2), strict=True):
        found = re.fullmatch(r" +(\d+) +([\d.]+) = +([\d.]+) \+ +([\d.]+) \+ +([\d.]+) +1 +([\d.]+)", line)
        assert found is not None, line
        whole, start, training, evaluation, error = map(float, found.groups()[1:])
        assert int(found[1]) == seed
        assert whole == pytest.approx(start + training + evaluation, abs=0.2)
        assert start > training > 0
        assert error == RunFolder(tmp_path / f"out/recipe/seed_{seed}").read_metrics()[-1]["top1_error"]


@pytest.mark.slow
def test_finetuning_is_measured_on_two_classes_that_the_base_never_saw(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog", "frog", "truck"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    small = "train.batch_size=4 train.epochs=1 schedule.warmup_epochs=0 model.stem_channels=8"
    out = tmp_path / "out"
    result = script("measure_finetuning.sh", str(tmp_path / "pictures"), str(out), BASE=small, TUNE=small)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (out / "eight/train").iterdir()) == ["dog", "frog"]
    assert sorted(path.name for path in (out / "two/test").iterdir()) == ["cat", "truck"]
    assert [line.split("|")[2].strip() for line in result.stdout.splitlines() if line.startswith("| f")] == ["5"] * 3
    resolve_auto = RunFolder(out / "tuned/fine-tuned-all-layers/seed_1")
    saved = resolve_auto.saved_config()
    assert saved is not None
    assert saved.model.pretrained == str(out / "base")
    assert resolve_auto.read_metrics()[-1]["images"] == 6
    nothing = RunFolder(out / "tuned/from-nothing/seed_1").saved_config()
    assert nothing is not None
    assert nothing.model.pretrained is None
