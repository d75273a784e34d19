"""What takes over half a minute: `bash scripts/run_tests.sh -m slow`."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import ROOT, train_tiny

from resnext_ignite import benchmark_suites, train
from resnext_ignite.checkpoint import load_checkpoint
from resnext_ignite.models import create_model
from resnext_ignite.run_folder import RunFolder

pytestmark = pytest.mark.slow


def test_the_quickstart_learns_the_shapes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.main(["--config", str(ROOT / "configs/quickstart.yaml"), "--output-dir", str(run)]) == 0
    last = RunFolder(run).read_metrics()[-1]
    assert last["images"] == 2000
    assert last["top1_error"] < 5


def test_a_compiled_run_saves_plain_keys_and_learns_alike(tmp_path: Path) -> None:
    values = ["train.epochs=1", "train.ema_decay=0.9", "optimizer.lr=1e-3"]
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        assert train_tiny(tmp_path / name, *values, f"train.compile={compiled}") == 0
    states = [load_checkpoint(tmp_path / name / "checkpoints/final.pt") for name in ("plain", "compiled")]
    for part in ("model", "ema"):
        assert list(states[0][part]) == list(states[1][part])
        for key, value in states[0][part].items():
            torch.testing.assert_close(states[1][part][key], value, rtol=1e-3, atol=1e-4)


def test_the_benchmarks_measure_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = benchmark_suites.measure_data(rounds=1)
    assert set(data["samples"]) == {"torchvision, 0 workers", "torchvision, 2 workers", "resnext_ignite"}
    assert data["ratios"]["data_vs_torchvision"] > 1
    overhead = benchmark_suites.measure_overhead(ROOT / "configs/quickstart.yaml", rounds=2, iterations=2)
    assert all(len(values) == 2 and min(values) > 0 for values in overhead["samples"].values())
    assert -1 < overhead["ratios"]["trainer_overhead"] < 1
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text("model: {name: cifar_resnext11_2x8d, stem_channels: 8}\ntrain: {batch_size: 16}\n")
    monkeypatch.chdir(tmp_path)
    saves = benchmark_suites.measure_checkpoint([tiny], rounds=2, iterations=2)
    name = "cifar_resnext11_2x8d"
    contenders = ("torch.save", "torch.save and fsync", "save_checkpoint", "forward, backward, update")
    assert set(saves["samples"]) == {f"{name}, {contender}" for contender in contenders}
    assert all(len(values) == 2 and min(values) > 0 for values in saves["samples"].values())
    ours, plain = (median(saves["samples"][f"{name}, {save}"]) for save in ("save_checkpoint", "torch.save"))
    assert saves["ratios"][f"checkpoint_vs_torch_save, {name}"] == ours / plain
    epoch = 3125 * median(saves["samples"][f"{name}, forward, backward, update"])
    assert saves["ratios"][f"checkpoint_share, {name}"] == pytest.approx(ours / (ours + epoch))
    # Parameters and their momentum, in float32.
    parameters = sum(parameter.numel() for parameter in create_model(name, 10, stem_channels=8).parameters())
    assert saves["models"][name]["bytes"] > 8 * parameters
    assert not list(Path("runs").iterdir())
