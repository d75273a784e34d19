"""What is measured is chosen once, written down, and kept by a resumed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import train_tiny

from resnext_ignite import evaluate
from resnext_ignite.models import create_model
from resnext_ignite.models.inference import Inference, fold_batch_norm
from resnext_ignite.runs.checkpoint import load_checkpoint, load_model
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import ConfigError
from resnext_ignite.training import tuning
from resnext_ignite.training.engines import create_evaluator


def trained_network(name: str = "cifar_resnext11_2x8d") -> torch.nn.Module:
    """A network whose statistics are not those it began with."""
    torch.manual_seed(0)
    model = create_model(name, 10, stem_channels=8)
    for _ in range(3):
        model(torch.randn(16, 3, 16, 16))
    return model.eval()


@pytest.mark.parametrize("name", ["cifar_resnext11_2x8d", "resnext50_2x8d"])
def test_folding_leaves_no_batch_norm_and_the_same_logits(name: str) -> None:
    model = trained_network(name).double()
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-10, atol=1e-10)


def test_inference_follows_the_network() -> None:
    model, images = trained_network(), torch.randn(4, 3, 16, 16)
    folded = Inference(model, way="folded")
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)
    model.train()
    model(5 * images)
    with torch.no_grad():
        model.fc.bias += 1  # type: ignore[operator, union-attr]
    stale = folded(images)
    folded.refresh()
    assert not model.training
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)
    assert (stale - folded(images)).abs().max() > 0.1


def test_synchronised_statistics_are_folded_too() -> None:
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(trained_network()).eval()
    folded, images = Inference(model, way="folded"), torch.randn(4, 3, 16, 16)
    model.bn1.running_var.mul_(9)
    folded.refresh()
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)
    lonely = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="0: no convolution before it to fold it into"):
        fold_batch_norm(lonely)


def test_bf16_folded_is_as_far_from_fp32_as_bf16_is() -> None:
    model, images = trained_network(), torch.randn(64, 3, 16, 16)
    exact = Inference(model)(images)
    errors = [(Inference(model, torch.bfloat16, way)(images) - exact).norm() for way in ("plain", "folded")]
    assert 0 < errors[1] < 2 * errors[0]


def test_the_evaluator_counts_alike_in_either_way() -> None:
    from resnext_ignite.data.loaders import Batch

    model = trained_network()
    labels = torch.arange(40) % 10
    batches = [Batch(torch.randn(20, 3, 16, 16), labels[:20], torch.arange(20)) for _ in range(2)]
    counted = [
        create_evaluator(model, torch.device("cpu"), num_classes=10, inference=way).run(batches).metrics
        for way in ("plain", "folded")
    ]
    assert counted[0]["correct"] == counted[1]["correct"]
    assert counted[0]["loss"] == pytest.approx(counted[1]["loss"], rel=1e-5)


def test_the_fastest_is_chosen_and_the_hopeless_is_tried_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"a": [3.0, 3.0, 2.9, 3.0], "b": [2.0, 2.0, 9.0, 2.0], "c": [4.0]}
    calls = []

    def timed(device: torch.device, way: object) -> float:
        name = str(way())  # type: ignore[operator]
        return seconds[name].pop(0) if len(seconds[name]) > 1 else seconds[name][0]

    monkeypatch.setattr(tuning, "timed", timed)
    monkeypatch.setattr(tuning, "kernel_timer", lambda device, way: lambda: timed(device, way))

    def contender(name: str) -> object:
        def run() -> str:
            calls.append(name)
            return name

        return run

    ways = {name: contender(name) for name in seconds}
    assert tuning.fastest(ways, torch.device("cpu")) == "b"  # type: ignore[arg-type]
    # To warm up, and once.
    assert calls.count("c") == 2


def test_a_run_writes_down_what_it_measured_and_a_resumed_one_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = ["train.grouped_conv=auto", "evaluation.inference=auto"]
    answers = iter(["split", "grouped", "merged2", "folded"])
    monkeypatch.setattr(tuning, "fastest", lambda ways, device: next(answers))
    assert train_tiny(tmp_path / "run", "train.epochs=1", *values) == 0
    saved = load_checkpoint(tmp_path / "run/checkpoints/final.pt")["config"]
    assert saved["train"]["grouped_conv"] == ["split", "grouped", "merged2"]
    assert saved["evaluation"]["inference"] == "folded"
    assert "inference: folded" in (tmp_path / "run/config.yaml").read_text()
    # Nothing is measured again: there is no further answer.
    assert train_tiny(tmp_path / "run", "train.epochs=2", *values, resume=True) == 0
    model, metadata = load_model(tmp_path / "run")
    assert metadata.config.train.grouped_conv == ("split", "grouped", "merged2")
    assert [m.way for m in model.modules() if hasattr(m, "way")] == ["split", "grouped", "merged2"]


def test_measuring_changes_no_random_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "fastest", lambda ways, device: next(iter(ways)))
    runs = {"plain": [], "measured": ["train.grouped_conv=auto", "evaluation.inference=auto"]}
    for name, values in runs.items():
        assert train_tiny(tmp_path / name, "train.epochs=1", *values) == 0
    plain, measured = (load_checkpoint(tmp_path / name / "checkpoints/final.pt")["model"] for name in runs)
    assert all(torch.equal(plain[key], measured[key]) for key in plain)


def test_compiling_is_tried_only_for_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[str]] = []

    def fastest(ways: dict[str, object], device: torch.device) -> str:
        tried.append(list(ways))
        return "plain"

    monkeypatch.setattr(tuning, "fastest", fastest)
    monkeypatch.setattr(tuning, "timed", lambda device, way: 0.8)
    arithmetic = tuning.ComputeSettings(torch.device("cpu"), torch.float32, True)
    # A tenth of a second an image: 3,000 take five minutes.
    for images in (2_999, 3_001):
        tuning.choose_inference(trained_network(), 16, 500, images, arithmetic)
    assert tried == [["plain", "folded"], ["plain", "folded", "compiled"]]


def test_evaluate_can_be_asked_for_a_faster_way(tmp_path: Path) -> None:
    assert train_tiny(tmp_path / "run", "train.epochs=1") == 0
    last = RunFolder(tmp_path / "run").read_metrics()[-1]
    for way in ("folded", "auto"):
        metrics, _ = evaluate.evaluate(tmp_path / "run", "test", [f"evaluation.inference={way}"])
        assert (metrics["images"], metrics["loss"]) == (last["images"], pytest.approx(last["loss"], rel=1e-4))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            ["train.compile=cuda_graphs", "train.accumulate=2"],
            "cuda_graphs does not accumulate gradients over 2 micro-",
        ),
        (["train.compile=cuda_graphs"], "train.compile: cuda_graphs is for GPUs only"),
        (["train.compile=1"], "train.compile: 1: false, true or cuda_graphs"),
    ],
)
def test_compiling_that_cannot_be_is_refused(tmp_path: Path, values: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train_tiny(tmp_path / "run", *values)
    assert line in str(caught.value)
    # Only what the device decides is found out later.
    assert (tmp_path / "run").exists() == (values == ["train.compile=cuda_graphs"])
