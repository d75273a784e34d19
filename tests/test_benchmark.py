"""The benchmark: what it counts by hand, its peers, and each suite on a tiny network."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from conftest import ROOT
from PIL import Image

from resnext_ignite.benchmark import __main__ as benchmark
from resnext_ignite.benchmark import (
    checkpoints,
    data,
    evaluation,
    growth,
    kernels,
    peers,
    photographs,
    startup,
    training,
)
from resnext_ignite.benchmark.folders import measure_folders
from resnext_ignite.benchmark.limits import Limits
from resnext_ignite.benchmark.plot import draw_benchmark
from resnext_ignite.benchmark.processes import in_processes, peak_bytes
from resnext_ignite.benchmark.training import Workload
from resnext_ignite.models import create_model
from resnext_ignite.models.cost import cost_of
from resnext_ignite.models.grouped_conv import GroupedConv2d, grouped_shapes
from resnext_ignite.plots.figures import save_figure
from resnext_ignite.runtime.errors import ConfigError, DataError
from resnext_ignite.runtime.timing import in_turns, medians
from resnext_ignite.training.tuning import ComputeSettings

TINY = "cifar_resnext11_2x8d"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of a tiny network; where its runs would lie is this test's folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(f"model: {{name: {TINY}, stem_channels: 8}}\ntrain: {{batch_size: 16, precision: bf16}}\n")
    monkeypatch.chdir(tmp_path)
    return path


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    values = {"a": iter([9.0, 1.0, 3.0, 2.0]), "b": iter([9.0, 4.0, 4.0, 4.0])}

    def contender(name: str) -> float:
        calls.append(name)
        return next(values[name])

    samples = in_turns({name: partial(contender, name) for name in values}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert samples == {"a": [1.0, 3.0, 2.0], "b": [4.0, 4.0, 4.0]}
    assert medians(samples) == {"a": 2.0, "b": 4.0}


def test_the_cost_of_a_network_is_the_published_one() -> None:
    # ResNeXt-50 32x4d at 224 pixels: 4.2 billion multiply-adds and 25.0 million parameters (paper, table 1).
    cost = cost_of(create_model("resnext50_32x4d", 1000), 224)
    assert cost.forward_flop == pytest.approx(2 * 4.23e9, rel=0.01)
    assert cost.parameters == 25_028_904
    assert (cost.training_flop, cost.training_bytes(2)) == (3 * cost.forward_flop, 10 * cost.activations)
    # BatchNorm's outputs, as many as the convolutions', can be fused with them; the pooled ones and the classes remain.
    assert (cost.least_training_bytes(2), cost.least_forward_bytes(4)) == (10 * cost.convolved, 8 * cost.convolved)
    assert 0.49 < cost.convolved / cost.activations < 0.51


def test_the_least_time_is_the_larger_bound() -> None:
    cost = cost_of(create_model(TINY, 10, stem_channels=8), 32)
    # One bound at a time: the other rate is as good as endless.
    by_flop, by_bytes = Limits(1e9, 1e30, 2), Limits(1e30, 1e9, 2)
    assert by_flop.training_s(cost, 4) == pytest.approx(4 * 3 * cost.forward_flop / 1e9)
    assert by_bytes.training_s(cost, 4) == pytest.approx(4 * 10 * cost.convolved / 1e9)
    assert by_flop.forward_s(cost, 4) == pytest.approx(4 * cost.forward_flop / 1e9)


@pytest.mark.parametrize("name", ["cifar_resnext29_8x64d", "resnext50_32x4d"])
def test_the_peers_train_the_same_network(name: str) -> None:
    ours = create_model(name, 10)
    networks = [peers.torchvision_network(name, 10)]
    if peers.has_timm():
        networks.append(peers.timm_network(name, 10))
    for network in networks:
        shapes = sorted(tuple(p.shape) for p in network.parameters())
        assert shapes == sorted(tuple(p.shape) for p in ours.parameters())
        assert cost_of(network, 64).forward_flop == cost_of(create_model(name, 10), 64).forward_flop
    with pytest.raises(ValueError, match="not the same network"):
        peers._same_size(ours, name, 11)


@pytest.mark.parametrize(
    "way", [peers.resnext_pytorch_loop, peers.torchvision_loop, partial(peers.amp_loop, peers.torchvision_network)]
)
def test_the_peers_learn(way: Any) -> None:
    torch.manual_seed(0)
    peer = way("cifar_resnext11_2x8d", 10, torch.device("cpu"))
    for group in peer.optimizer.param_groups:
        group["lr"] = 0.05
    batch = training.random_batch(8, 16, 10, torch.device("cpu"), channels_last=False)
    losses = []
    for _ in range(8):
        peer.iterate(batch)
        with torch.no_grad():
            losses.append(float(torch.nn.functional.cross_entropy(peer.model(batch.images), batch.labels)))
    assert losses[-1] < 0.5 * losses[0]


def test_the_least_time_of_a_grouped_convolution_is_counted_by_hand() -> None:
    shape = grouped_shapes(create_model("cifar_resnext29_8x64d", 10), 32)[1]
    assert kernels.describe(shape) == "8 groups of 128, 32x32 / 2"
    flop = 2 * 9 * 1024 * 128 * 16 * 16 * 3
    assert kernels._least_seconds(shape, 3, 1e9, 1e30) == pytest.approx(flop / 1e9)
    numbers = 3 * 1024 * (32 * 32 + 16 * 16) + 1024 * 128 * 9
    assert kernels._least_seconds(shape, 3, 1e30, 1e9) == pytest.approx(2 * numbers / 1e9)


def test_a_way_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = grouped_shapes(create_model("cifar_resnext11_4x16d", 10, stem_channels=16), 16)[1]
    arithmetic = ComputeSettings(torch.device("cpu"), torch.bfloat16, True)
    errors = kernels.check(shape, arithmetic)
    assert set(errors) == {"grouped", "split", "merged2", "merged4"}
    assert all(0 < error < 0.01 for error in errors.values())
    merged = GroupedConv2d._merged_weight
    monkeypatch.setattr(GroupedConv2d, "_merged_weight", lambda self: merged(self) * 1.05)
    with pytest.raises(ValueError, match=r"4 groups of 8, 16x16 / 2, merged2: relative error 0\.0"):
        kernels.check(shape, arithmetic)


def test_growth_is_the_slope_between_the_two_largest() -> None:
    assert growth.exponent([1, 2, 4], [100, 3, 6]) == pytest.approx(1)
    assert growth.exponent([1, 2, 4], [100, 3, 12]) == pytest.approx(2)
    assert growth.exponent([10, 20], [5, 5]) == 0


def _turn_of(value: float) -> Any:
    return partial(_answer, value)


def _answer(value: float) -> float:
    return value


def _broken() -> Any:
    raise ValueError("cannot be built")


def test_each_contender_has_a_process_of_its_own_and_its_error_is_told() -> None:
    with in_processes({"a": partial(_turn_of, 1.5), "b": partial(_turn_of, 2.5)}) as contenders:
        assert [contenders[name]() for name in ("a", "b", "a")] == [1.5, 2.5, 1.5]
        assert all(contender.peak_bytes() > 1e6 for contender in contenders.values())
    # Each its own memory: 2e8 bytes that this process had are none of theirs.
    held = bytearray(b"x" * 200_000_000)
    with in_processes({"a": partial(_turn_of, 1.5)}) as contenders:
        assert contenders["a"].peak_bytes() < peak_bytes() - len(held) // 2
    with in_processes({"a": partial(_turn_of, 1.5), "broken": _broken}) as contenders:
        assert list(contenders) == ["a"]
        assert contenders.failed == {"broken": "ValueError: cannot be built"}
    refused = pytest.raises(RuntimeError, match=r"all contenders failed: .*cannot be built")
    with refused, in_processes({"broken": _broken}):
        pass


def fake(name: str, calls: list[str]) -> Any:
    def measure() -> dict[str, Any]:
        calls.append(name)
        samples = {"resnext_ignite": [2.0, 4.0, 3.0], "other": [1.0, 1.0, 1.0]}
        return {"unit": "images/s", "samples": samples, "ratios": {f"{name}_vs_other": 3.0}}

    return measure


def test_a_measurement_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    names = ("data", "eval", "train", "train:other")
    monkeypatch.setattr(
        benchmark, "parts", lambda photographs: {name: fake(name.partition(":")[0], calls) for name in names}
    )
    file, picture = tmp_path / "b.json", tmp_path / "b.png"
    assert benchmark.main(["--suite", "data", "eval", "--json", str(file)]) == 0
    assert "data: resnext_ignite: 3 images/s (2 to 4)\n" in capsys.readouterr().out
    assert benchmark.main(["--json", str(file), "--continue"]) == 0
    assert calls == ["data", "eval", "train", "train"]
    results = json.loads(file.read_text())
    by_suite = {f"{suite}_vs_other": 3.0 for suite in ("data", "eval", "train")}
    assert results["ratios"] == {**by_suite, "train_vs_other, other": 3.0}
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert benchmark.main(["--suite", "data", "--json", str(file)]) == 0
    assert list(json.loads(file.read_text())["suites"]) == ["data"]
    # Nothing of another machine is gone on with.
    file.write_text(json.dumps({**results, "machine": {**results["machine"], "cpu": "another"}}))
    with pytest.raises(ConfigError, match=r"^--continue: .*b\.json: cpu was another, and is "):
        benchmark.main(["--json", str(file), "--continue"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--continue",), "--continue: name the file to continue with --json FILE.json"),
        (("--json", "b.txt"), "--json b.txt: the name must end in .json; the plot is written beside it"),
        (("--device", "cuda"), "--device cuda: this machine has no GPU that torch can use; leave it out"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: tuple[str, ...], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        benchmark.main(list(arguments))
    assert str(caught.value) == line


def test_every_contender_of_a_gpu_can_be_made(tiny: Path) -> None:
    work = Workload(tiny, "cifar_resnext11_2x16d", 8, 16, 10)
    makers = training.contenders(work, torch.device("cuda"))
    assert sum(name.startswith("resnext_ignite") for name in makers) == 5
    for name, make in makers.items():
        # CUDA graphs are refused here; what is compiled is so at its first turn.
        if "CUDA graphs" in name:
            with pytest.raises(ConfigError, match="cuda_graphs is for GPUs only"):
                make()
        else:
            assert callable(make())
    assert training.inductor.force_layout_optimization is False
    training.time_trainer(work, [], forced_layout=True)
    assert training.inductor.force_layout_optimization is True
    training.time_trainer(work, [])


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--continue", "--device", "cpu"], ["--what"]])
def test_the_script_for_gpus_reads_its_arguments(tmp_path: Path, arguments: list[str]) -> None:
    # A Python that only says how it is called, and fails: what follows must end with its exit code.
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    python.chmod(0o755)
    command = ["bash", str(ROOT / "scripts/measure_gpu.sh"), *arguments, str(tmp_path / "b.json")]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True, check=False
    )
    if arguments == ["--what"]:
        assert (ended.returncode, ended.stderr) == (
            2,
            "error: --what: unknown option; the options are --continue and --device cpu\n",
        )
        return
    assert ended.returncode == 7, ended.stderr
    last = ended.stdout.splitlines()[-1]
    goes_on = " --continue" if "--continue" in arguments else ""
    assert last == f"-m resnext_ignite.benchmark --device cpu --json {tmp_path / 'b.json'}{goes_on}"
    assert ("tests on the GPU: exit code 7" in ended.stdout) == (not goes_on)


@pytest.mark.slow
def test_every_suite_measures_what_it_says(tiny: Path) -> None:
    work = Workload(tiny, "cifar_resnext11_2x16d", 8, 16, 10)
    trained = training.measure_training(work, rounds=2)
    ours = max(median(v) for name, v in trained["samples"].items() if name.startswith("resnext_ignite"))
    theirs = median(trained["samples"]["ResNeXt.pytorch's loop"])
    assert trained["ratios"]["train_vs_resnext_pytorch"] == ours / theirs
    assert trained["failed"] == {}
    least = Limits(**trained["limits"], bytes_a_number=2).training_s(cost_of(create_model(work.model, 10), 16), 8)
    assert trained["ratios"]["train_of_limit"] == pytest.approx(ours * least / 8)
    assert ("train_vs_timm" in trained["ratios"]) == peers.has_timm()
    evaluated = evaluation.measure_evaluation(work, rounds=2)
    assert set(evaluated["differences"]) == {"plain", "folded", "compiled"}
    assert all(0 < difference < 0.05 for difference in evaluated["differences"].values())
    assert all(len(values) == 2 and min(values) > 0 for values in evaluated["samples"].values())
    overhead = training.measure_overhead(tiny, rounds=2, iterations=2)
    trainer, bare = (median(values) for values in overhead["samples"].values())
    assert overhead["ratios"]["trainer_overhead"] == 1 - bare / trainer
    assert data.measure_data(rounds=1)["ratios"]["data_vs_torchvision"] > 1
    started = startup.measure_startup(tiny, rounds=1)
    run, imports = (median(values) for values in started["samples"].values())
    assert started["ratios"]["startup_beyond_imports_s"] == run - imports
    assert imports > 0.5
    found = kernels.measure_kernels({"cifar_resnext11_4x16d": (2, 16)}, rounds=2)
    assert len(found["shapes"]) == 3
    assert len(found["samples"]) == 3 * len(("grouped", "split", "merged2", "merged4")) * len(kernels.PASSES)
    assert all(min(values) > 0 for values in found["samples"].values())


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        growth,
        "sizes",
        lambda path, large: {
            "batch": {size: partial(growth.train, path, TINY, 8, size) for size in (8, 16)},
            "images": {size: partial(growth.load, size) for size in (5_000, 10_000)},
        },
    )
    grown = growth.measure_growth(tiny, rounds=1)
    assert set(grown["tables"]) == {"batch", "images", "ranks"}
    assert list(grown["tables"]["ranks"]) == ["2", "4"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 1e6 for t in grown["tables"].values() for row in t.values())
    results = {"machine": benchmark.machine(), "suites": {"growth": grown}}
    save_figure(draw_benchmark(results), tiny.with_name("growth.png"))


@pytest.mark.slow
def test_a_save_is_measured_where_runs_lie(tiny: Path) -> None:
    saves = checkpoints.measure_checkpoint({tiny: 16}, rounds=2, iterations=2)
    contenders = ("torch.save", "torch.save and fsync", "save_checkpoint", "forward, backward, update")
    assert set(saves["samples"]) == {f"{TINY}, {contender}" for contender in contenders}
    assert all(len(values) == 2 and min(values) > 0 for values in saves["samples"].values())
    ours, plain = (median(saves["samples"][f"{TINY}, {save}"]) for save in ("save_checkpoint", "torch.save"))
    assert saves["ratios"]["checkpoint_vs_torch_save"] == ours / plain
    epoch = 3125 * median(saves["samples"][f"{TINY}, forward, backward, update"])
    assert saves["ratios"]["checkpoint_share"] == pytest.approx(ours / (ours + epoch))
    # Parameters and their momentum, in float32.
    parameters = sum(parameter.numel() for parameter in create_model(TINY, 10, stem_channels=8).parameters())
    assert saves["models"][TINY]["bytes"] > 8 * parameters
    assert not list(Path("runs").iterdir())


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel does not tell a process's memory")
def test_a_list_of_pictures_is_measured_and_stays_shared() -> None:
    result = measure_folders(images=25_000, classes=10, rounds=1)
    assert result["images"] == 25_000
    assert set(result["samples"]) >= {"torchvision's ImageFolder", "resnext_ignite, from its cache"}
    growth = result["worker_growth_bytes"]
    # Going through 25,000 tuples and strings writes into each of them.
    assert growth["torchvision's ImageFolder"] > 1_000_000 > growth["resnext_ignite, from its cache"]


def test_photographs_are_measured_beside_the_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        Image.effect_noise((60, 50), 40).convert("RGB").save(tmp_path / f"{number}.jpg")
    monkeypatch.setattr(photographs, "_IMAGES", 16)
    monkeypatch.setattr(photographs, "_BATCH", 8)
    result = photographs.measure_photographs(tmp_path, sizes=(24,), rounds=1)
    assert result["files"] == 3
    assert set(result["ratios"]) >= {"24 pixels, vs torchvision", "24 pixels, of the decode limit"}
    with pytest.raises(DataError, match="holds no"):
        photographs.measure_photographs(tmp_path / "empty")
    with pytest.raises(ConfigError, match="name a folder of JPEG files with --photographs FOLDER"):
        benchmark.main(["--suite", "photographs"])
