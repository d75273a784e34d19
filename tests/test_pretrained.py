"""Starting from weights that there are already: which, how fast each part goes on learning, and what stays."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, TINY, Command, Payload, digest, train_tiny

from resnext_ignite import train
from resnext_ignite.config.files import load_config
from resnext_ignite.config.schema import Config, with_values
from resnext_ignite.models import build_model, create_model
from resnext_ignite.optim import build_lr_scheduler, build_optimizer
from resnext_ignite.runs.checkpoint import load_checkpoint, load_model
from resnext_ignite.runtime.errors import CheckpointError, ConfigError
from resnext_ignite.weights.pretrained import load_pretrained, with_normalisation

TINY_NAME = "cifar_resnext11_2x8d"


def test_pretrained_weights_start_a_model(finished_run: Path) -> None:
    weights = load_checkpoint(finished_run / "checkpoints/final.pt")["model"]
    same = create_model(TINY_NAME, 10, stem_channels=8)
    load_pretrained(same, TINY_NAME, str(finished_run))
    assert all(torch.equal(value, weights[key]) for key, value in same.state_dict().items())
    fewer = create_model(TINY_NAME, 3, stem_channels=8)
    classifier = fewer.fc.weight.detach().clone()
    load_pretrained(fewer, TINY_NAME, str(finished_run))
    assert torch.equal(fewer.fc.weight, classifier)
    assert torch.equal(fewer.conv1.weight, weights["conv1.weight"])
    advice = (
        r"does not fit cifar_resnext11_2x16d: set model\.name=cifar_resnext11_2x8d model\.stem_channels=8, the network"
    )
    with pytest.raises(CheckpointError, match=advice):
        load_pretrained(
            create_model("cifar_resnext11_2x16d", 10, stem_channels=8), "cifar_resnext11_2x16d", str(finished_run)
        )
    for source, line in [
        ("ResNeXt999", "'ResNeXt999' is not a file or run folder; weights of torchvision are named as in torchvision:"),
        ("torchvision:IMAGENET1K_V2", "torchvision has no cifar_resnext11_2x8d"),
    ]:
        with pytest.raises(CheckpointError, match=line):
            load_pretrained(same, TINY_NAME, source)


def test_torchvisions_weights_are_loaded_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source, name = "torchvision:IMAGENET1K_V2", "resnext50_32x4d"
    model = create_model(name, 10)
    with pytest.raises(CheckpointError, match="are torchvision:IMAGENET1K_V1 or torchvision:IMAGENET1K_V2"):
        load_pretrained(model, name, "torchvision:V9")
    cached = tmp_path / "hub/checkpoints/resnext50_32x4d-1a0047aa.pth"
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(model, name, source)
    line = f"model.pretrained: {source}: {cached} is not there, and cannot be downloaded (no network); put it there"
    assert str(caught.value) == line
    cached.parent.mkdir(parents=True, exist_ok=True)
    sentinel = tmp_path / "payload ran"
    for content in (pickle.dumps(Payload(sentinel)), b"nonsense"):
        cached.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is no file of weights .*; remove it"):
            load_pretrained(model, name, source)
    torch.save({"conv1.weight": Payload(sentinel)}, cached)
    with pytest.raises(CheckpointError, match=r"is no file of weights"):
        load_pretrained(model, name, source)
    assert not sentinel.exists()
    torch.save(torchvision.models.resnext50_32x4d(num_classes=1000).state_dict(), cached)
    load_pretrained(model, name, source)
    assert torch.equal(model.conv1.weight, torch.load(cached, weights_only=True)["conv1.weight"])
    assert model.fc.out_features == 10


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_checkpoint(run / "checkpoints/final.pt")["model"]
    return weights


STEM = ("conv1.", "bn1.")


@pytest.mark.parametrize(
    ("part", "kept", "ranks"), [("stem", STEM, 1), ("backbone", (*STEM, "layer"), 1), ("backbone", (*STEM, "layer"), 2)]
)
def test_what_is_frozen_stays_to_the_last_bit(
    finished_run: Path, tmp_path: Path, part: str, kept: tuple[str, ...], ranks: int
) -> None:
    run = tmp_path / "run"
    keys = [f"model.pretrained={finished_run}", f"train.freeze={part}", "train.epochs=1", "train.ema_decay=0.5"]
    assert Command(run, *keys, ranks=ranks).wait().code == 0
    before, after = weights_of(finished_run), weights_of(run)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(kept)}
    # What is evaluated is the average, in which as much stays.
    average = load_checkpoint(run / "checkpoints/final.pt")["ema"]
    assert all(torch.equal(before[name], average[name]) for name in same)


def test_a_frozen_run_that_is_cut_ends_the_same(finished_run: Path, tmp_path: Path) -> None:
    keys = [f"model.pretrained={finished_run}", "train.freeze=stem", "optimizer.backbone_lr_factor=0.5"]
    keys += ["schedule.name=constant", "schedule.warmup_epochs=0"]
    assert train_tiny(tmp_path / "whole", *keys, "train.epochs=2") == 0
    assert train_tiny(tmp_path / "cut", *keys, "train.epochs=1") == 0
    assert train_tiny(tmp_path / "cut", *keys, "train.epochs=2", resume=True) == 0
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")


def test_the_backbone_learns_slower_by_its_factor() -> None:
    values = {"optimizer.backbone_lr_factor": 0.1, "optimizer.decay_norm_and_bias": False, "optimizer.lr": 0.4}
    config = with_values(Config(), {"model.num_classes": 10, "model.stem_channels": 8, **values})
    model = build_model(config)
    optimizer = build_optimizer(config, model)
    scheduler = build_lr_scheduler(with_values(config, {"schedule.name": "cosine", "train.epochs": 2}), optimizer, 2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for rate in (0.4, 0.4 * 0.8535534):
        scheduler(None)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                expected = rate if names[id(parameter)].startswith("fc.") else 0.1 * rate
                assert group["lr"] == pytest.approx(expected)
                assert group["weight_decay"] == (5e-4 if parameter.ndim > 1 else 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_frozen_weights_are_not_in_the_optimizer() -> None:
    values = {"model.num_classes": 10, "train.freeze": "backbone", "model.pretrained": "x"}
    model = build_model(with_values(Config(), values))
    (group,) = build_optimizer(Config(), model).param_groups
    assert [tuple(parameter.shape) for parameter in group["params"]] == [(10, 1024), (10,)]
    model.train()
    assert not model.get_submodule("layer3").training
    assert model.fc.training


def test_normalisation_and_classes_travel_with_the_weights(
    finished_run: Path, picture_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    keys = ["data.name=imagefolder", f"data.root={picture_folder}", "data.image_size=16", "train.batch_size=4"]
    keys += ["data.train_size=null", "data.test_size=null", "train.epochs=1", f"model.pretrained={finished_run}"]
    assert train_tiny(run, *keys) == 0
    before, after = load_model(finished_run)[1], load_model(run)[1]
    assert (after.mean, after.std) == (before.mean, before.std)
    assert after.classes == ("dark", "light")
    own = with_values(
        Config(),
        {"model.pretrained": str(finished_run), "data.mean": [0.1, 0.2, 0.3], "data.std": [1.0, 1.0, 1.0]},
    )
    assert with_normalisation(own) == own
    imagenet = with_normalisation(with_values(Config(), {"model.pretrained": "torchvision:IMAGENET1K_V2"}))
    assert imagenet.data.mean == (0.485, 0.456, 0.406)


def test_freezing_random_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.freeze: stem would freeze random weights; set model.pretrained"):
        load_config(ROOT / "configs/quickstart.yaml", ["train.freeze=stem", *TINY])


def test_the_preset_fine_tunes_a_folder(tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, on a narrow network: with torchvision's weights where they would be found."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints/resnext50_32x4d-1a0047aa.pth"
    cached.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnext50_32x4d(num_classes=1000).state_dict(), cached)
    config, run = ROOT / "configs/finetune_imagefolder.yaml", tmp_path / "run"
    keys = [f"data.root={picture_folder}", "data.image_size=32", "data.workers=0", "train.epochs=1"]
    keys += ["train.batch_size=8", "train.freeze=backbone", "logging.tensorboard=false", "schedule.warmup_epochs=0"]
    assert train.main(["--config", str(config), "--output-dir", str(run), *keys]) == 0
    weights, metadata = weights_of(run), load_model(run)[1]
    assert metadata.classes == ("dark", "light")
    kept = torch.load(cached, weights_only=True)
    assert torch.equal(weights["conv1.weight"], kept["conv1.weight"])
    assert len(weights["fc.weight"]) == 2
