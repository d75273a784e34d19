"""Errors with mirror images, beside the plain ones: counted by hand, on two ranks, and never the headline."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Command, digest, scalars, train_tiny
from torch import Tensor, nn

from resnext_ignite import evaluate, report
from resnext_ignite.data.loaders import Batch
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.training.engines import create_evaluator
from resnext_ignite.training.metrics import FlipCounts

CPU = torch.device("cpu")
FLIP = ("correct_flip", "loss_flip", "top1_error_flip", "top5_error_flip")


def test_the_mean_of_probabilities_by_hand() -> None:
    plain = torch.tensor([[0.90, 0.0999, 0.0001], [0.2, 0.5, 0.3]])
    mirrored = torch.tensor([[0.01, 0.40, 0.59], [0.6, 0.1, 0.3]])
    counts = FlipCounts(3, Ranks(), CPU, lambda images: mirrored.log() + 7)
    # Logits are probabilities' logarithms, but for a shift of each image's own.
    counts.update((plain.log() - 3, Batch(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), torch.arange(2))))
    # Means: 0.455, 0.24995, 0.29505 (by the mean of logits class 1 would win, its product 0.04 above 0.009), and
    # 0.4, 0.3, 0.3: the first is right, the second wrong. Of three classes all are among the first five.
    figures = counts.compute()
    assert sorted(figures) == sorted(FLIP)
    assert (figures["correct_flip"], figures["top1_error_flip"], figures["top5_error_flip"]) == (1, 50.0, 0.0)
    assert figures["loss_flip"] == pytest.approx(-(math.log(0.455) + math.log(0.3)) / 2, rel=1e-6)


class BrighterHalf(nn.Module):
    """Takes an image for class 0 where its left half is the brighter one, for class 1 where the right one is."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([half.mean((1, 2, 3)) for half in images.chunk(2, dim=-1)], dim=1)


def test_the_evaluator_shows_the_network_the_mirror_images() -> None:
    images = torch.zeros(3, 3, 4, 4)
    images[0, :, :, :2], images[1, :, :, 2:] = 4.0, 2.0
    images[2, :, :, :1] = 2.0
    batch = Batch(images, torch.tensor([0, 0, 1]), torch.arange(3))
    evaluator = create_evaluator(BrighterHalf(), CPU, num_classes=2, flip_tta=True)
    # Twice: the second evaluation counts anew.
    for _ in range(2):
        metrics = evaluator.run([batch]).metrics
        # The first image's left is brighter, and its label says so.
        assert (metrics["correct"], metrics["images"]) == (1, 3)
        # With its mirror image each is as much of the one class as of the other, and the loss a half's.
        assert metrics["loss_flip"] == pytest.approx(math.log(2), rel=1e-6)
    assert "loss_flip" not in create_evaluator(BrighterHalf(), CPU, num_classes=2).run([batch]).metrics


def test_a_run_says_them_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, flipped = tmp_path / "plain", tmp_path / "flipped"
    values = ["data.val_size=20", "logging.tensorboard=true", "logging.images=0"]
    assert train_tiny(plain, *values) == 0
    capsys.readouterr()
    assert train_tiny(flipped, *values, "evaluation.flip_tta=true") == 0
    said = capsys.readouterr()
    # The headline, what is best and what is trained are as without.
    records, others = RunFolder(flipped).read_metrics(), RunFolder(plain).read_metrics()
    assert all(set(record) - set(other) == set(FLIP) for record, other in zip(records, others, strict=True))
    left_out = (*FLIP, "images_per_s", "evaluation_s", "wall_s")
    timeless = [{key: value for key, value in record.items() if key not in left_out} for record in records]
    assert timeless == digest(plain)["metrics"]
    assert digest(flipped)["model"] == digest(plain)["model"]
    status = RunFolder(flipped).read_status()
    assert status["last"] == records[-1]
    assert status["best"]["iteration"] == RunFolder(plain).read_status()["best"]["iteration"]
    for record in records:
        assert record["top1_error_flip"] == 100 * (record["images"] - record["correct_flip"]) / record["images"]
        assert 0 <= record["top5_error_flip"] <= record["top1_error_flip"]
    # Of a network that has learned something the two ways of counting differ.
    assert any(record["loss_flip"] != record["loss"] for record in records)
    last = f"(with mirror images {records[-1]['top1_error_flip']:.2f} %)"
    assert last in said.out
    assert said.err.count("(with mirror images ") == len(records)
    points = scalars(flipped)
    assert {name for name in points if name.endswith("_flip")} == {
        f"{split}/{name}" for split in ("val", "test") for name in FLIP[1:]
    }
    assert [step for step, _ in points["val/top1_error_flip"]] == [0, 3, 6, 9]
    assert not any(name.endswith("_flip") for name in scalars(plain))


@pytest.fixture(scope="module")
def flipped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that was asked for them when it went on: they change no iteration."""
    folder = tmp_path_factory.mktemp("runs") / "flipped"
    assert train_tiny(folder, "train.epochs=1") == 0
    assert train_tiny(folder, "train.epochs=2", "evaluation.flip_tta=true", resume=True) == 0
    assert [set(FLIP) <= set(record) for record in RunFolder(folder).read_metrics()] == [False, False, True]
    return folder


def test_evaluate_says_them_apart(flipped_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = RunFolder(flipped_run).read_metrics()[-1]
    arguments = ["--checkpoint", str(flipped_run), "--json"]
    assert evaluate.main(arguments) == 0
    counted = json.loads(capsys.readouterr().out)
    assert {key: counted[key] for key in FLIP} == {key: last[key] for key in FLIP}
    assert (counted["correct"], counted["loss"]) == (last["correct"], last["loss"])
    assert evaluate.main([*arguments, "evaluation.flip_tta=false"]) == 0
    assert not set(FLIP) & set(json.loads(capsys.readouterr().out))
    # Of a mean over views there is no other mean, and it is said.
    assert evaluate.main([*arguments, "--views", "flip"]) == 0
    said = capsys.readouterr()
    assert not set(FLIP) & set(json.loads(said.out))
    assert "evaluation.flip_tta: ignored" in said.err
    assert evaluate.main(arguments[:2]) == 0
    assert f"(evaluation.flip_tta): top-1 error {last['top1_error_flip']:.2f} %" in capsys.readouterr().out


def test_report_says_them_apart(
    flipped_run: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = RunFolder(flipped_run).read_metrics()[-1]
    page = ["--html", str(tmp_path / "page.html"), "--output", str(tmp_path / "curves.png")]
    assert report.main([str(finished_run), str(flipped_run), *page]) == 0
    head, *rows = capsys.readouterr().out.splitlines()[:3]
    assert head.rstrip().endswith("last error with flips %")
    assert [row.split()[-1] for row in rows] == ["-", f"{last['top1_error_flip']:.2f}"]
    shown = (tmp_path / "page.html").read_text()
    assert shown.count("With mirror images: ") == 1
    assert f"With mirror images: {last['top1_error_flip']:.2f} %" in shown
    assert report.main([str(finished_run), *page[2:]]) == 0
    assert "mirror" not in capsys.readouterr().out


def test_two_ranks_count_what_one_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    # 37 images in batches of 8: the ranks have 18 and 19 of them.
    outcome = Command(folder, "evaluation.flip_tta=true", "evaluation.batch_size=8", ranks=2).wait()
    assert outcome.code == 0, outcome.stderr
    last = RunFolder(folder).read_metrics()[-1]
    assert evaluate.main(["--checkpoint", str(folder), "--json", "evaluation.batch_size=37"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert (counted["images"], counted["correct_flip"]) == (37, last["correct_flip"])
    assert counted["loss_flip"] == pytest.approx(last["loss_flip"], rel=1e-6)
