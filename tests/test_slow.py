"""What takes over half a minute: `bash scripts/run_tests.sh -m slow`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT, train_tiny

from resnext_ignite import train
from resnext_ignite.runs.checkpoint import load_checkpoint
from resnext_ignite.runs.folder import RunFolder

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
