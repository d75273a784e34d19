"""Progressive resizing: the size of each epoch, what is resized and how, and runs that are cut."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Command, at_iteration, digest, train_tiny
from ignite.engine import Engine
from torch import Tensor, nn
from torch.nn import functional

from resnext_ignite import evaluate
from resnext_ignite.config.files import load_config
from resnext_ignite.data import build_loaders, build_sizes
from resnext_ignite.data.augment.chain import Augment, normalize
from resnext_ignite.data.augment.progressive import GrowingSize
from resnext_ignite.data.images import Images
from resnext_ignite.data.loaders import TrainLoader
from resnext_ignite.data.sampling import TrainOrder
from resnext_ignite.distributed.ddp import wrap_for_ranks
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import ConfigError

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


@pytest.mark.parametrize(
    ("first", "full", "step", "epochs", "until", "sizes"),
    [
        # Over five epochs by 3.2 pixels each: 16, 19.2, 22.4, 25.6, 28.8, and whole from the sixth on.
        (16, 32, 4, 10, 0.5, [16, 16, 20, 24, 28, 32, 32, 32, 32, 32]),
        # By 24 each; 224 is no multiple of 16 below it, nor need it be.
        (128, 224, 16, 4, 1.0, [128, 144, 176, 192]),
        (128, 225, 16, 2, 0.5, [128, 225]),
        # Half an epoch of growth: the first epoch begins within it.
        (8, 32, 4, 1, 0.5, [8]),
        (8, 32, 4, 2, 0.0, [32, 32]),
        # Seven epochs of growth, though 0.7 * 10 is 7.000000000000001: by 8 each.
        (16, 72, 4, 10, 0.7, [16, 24, 32, 40, 48, 56, 64, 72, 72, 72]),
    ],
)
def test_sizes_by_hand(first: int, full: int, step: int, epochs: int, until: float, sizes: list[int]) -> None:
    growing = GrowingSize(first, full, step, epochs, until)
    assert [growing.at(epoch) for epoch in range(1, epochs + 1)] == sizes


def configured(*overrides: str) -> Any:
    return load_config(ROOT / "configs/quickstart.yaml", [*TINY, *overrides])


IMAGENET = ("data.name=imagefolder", "model.name=resnext50_32x4d", "model.stem_channels=64")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["augment.progressive_from=32"], "progressive_from: 32 pixels; a multiple of 4 below the image size 32"),
        (["augment.progressive_from=36"], "progressive_from: 36 pixels; a multiple of 4 below the image size 32"),
        (["augment.progressive_from=18"], "progressive_from: input should be a multiple of 4, not 18"),
        (["augment.progressive_from=4"], "progressive_from: input should be greater than or equal to 8, not 4"),
        ([*IMAGENET, "augment.progressive_from=100"], "100 pixels; a multiple of 16 below the image size 224"),
        (["augment.progressive_from=16", "augment.progressive_until=1.5"], "progressive_until: input should be less"),
        (["augment.progressive_from=16", "train.compile=cuda_graphs"], "CUDA graphs have one size; set train.comp"),
    ],
)
def test_what_cannot_grow_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(*overrides)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_full_size_is_what_stands_for_null() -> None:
    assert build_sizes(configured()) is None
    assert build_sizes(configured("augment.progressive_from=16")) == GrowingSize(16, 32, 4, 3, 0.5)
    grown = build_sizes(configured(*IMAGENET, "augment.progressive_from=128", "augment.progressive_until=0.8"))
    assert grown == GrowingSize(128, 224, 16, 3, 0.8)


def test_a_row_resized_by_hand() -> None:
    # Of four pixels two: triangles of two pixels' width, cut off at the edge. The first pixel takes 3/4, 3/4 and 1/4
    # of the first three, over 7/4: (0 + 0 + 7 / 4) / (7 / 4); the other one 1/4, 3/4 and 3/4 of the last three.
    row = torch.tensor([0.0, 0.0, 7.0, 7.0]).expand(1, 3, 4, 4)
    resized = Augment(1, MEAN, STD).resized(row, 2)
    torch.testing.assert_close(resized, torch.tensor([1.0, 6.0]).expand(1, 3, 2, 2))


def noise(count: int, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels_last", [True, False])
def test_resizing_goes_image_by_image_and_may_stand_before_the_normalisation(channels_last: bool) -> None:
    augment, pictures = Augment(1, MEAN, STD, channels_last=channels_last), noise(5)
    images = augment.plain(pictures)
    resized = augment.resized(images, 20)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert resized.is_contiguous(memory_format=wanted)
    # To the last bit: a rank's share of a batch must not matter.
    assert torch.equal(resized, torch.cat([augment.resized(image[None], 20) for image in images]))
    assert augment.resized(images, 32) is images
    before = functional.interpolate(pictures.permute(0, 3, 1, 2).float(), (20, 20), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(moment)[:, None, None] for moment in (MEAN, STD))
    torch.testing.assert_close(resized, (before / 255 - mean) / std, rtol=0, atol=1e-5)


def in_memory(rank: int = 0, world_size: int = 1) -> TrainLoader:
    split = Images(noise(12), torch.arange(12) % 10, torch.arange(12))
    order = TrainOrder(seed=1, count=12, batch_size=4, rank=rank, world_size=world_size)
    augment = Augment(1, MEAN, STD, crop_padding=4, flip="random", cutout=8)
    return TrainLoader(split, order, augment, CPU, sizes=GrowingSize(16, 32, 4, 4, 0.75))


def test_epochs_in_memory_are_the_augmented_ones_resized() -> None:
    grown, whole = in_memory(), in_memory()
    whole.sizes = None
    sizes = []
    for small, full, _ in zip(grown, whole, range(12), strict=False):
        size = small.images.shape[-1]
        sizes.append(size)
        assert torch.equal(small.images, grown.augment.resized(full.images, size))
        assert torch.equal(small.indices, full.indices)
    # By 16/3 pixels an epoch, three batches each: 16, 21.3, 26.7, 32.
    assert sizes == [16] * 3 + [20] * 3 + [24] * 3 + [32] * 3


def test_ranks_and_resumed_runs_see_the_same_sizes_and_pixels() -> None:
    whole = [batch.images for batch, _ in zip(in_memory(), range(12), strict=False)]
    for number, halves in enumerate(zip(in_memory(0, 2), in_memory(1, 2), range(12), strict=False)):
        assert torch.equal(torch.cat([half.images for half in halves[:2]]), whole[number])
    # The fifth iteration is the second one of the second epoch.
    resumed = in_memory()
    resumed.start_iteration = 4
    assert torch.equal(next(iter(resumed)).images, whole[4])


def test_files_are_decoded_to_the_size_of_the_epoch(picture_folder: Path) -> None:
    values = [
        "data.name=imagefolder",
        f"data.root={picture_folder}",
        "data.train_size=null",
        "data.test_size=null",
        "augment.random_resized_crop=true",
        "augment.flip=none",
        "augment.cutout=8",
        "augment.progressive_from=16",
        "augment.progressive_until=1.0",
        "train.batch_size=20",
    ]
    batches = {}
    for workers in (0, 2):
        loaders = build_loaders(configured(*values, f"data.workers={workers}"), CPU, Ranks())
        batches[workers] = [batch for batch, _ in zip(loaders.train, range(6), strict=False)]
        assert next(iter(loaders.evaluation["test"])).images.shape[-2:] == (32, 32)
    # By 16/3 an epoch of two batches: 16, 21.3, 26.7.
    assert [batch.images.shape[-1] for batch in batches[0]] == [16, 16, 20, 20, 24, 24]
    assert all(torch.equal(a.images, b.images) for a, b in zip(*batches.values(), strict=True))
    files, batch = loaders.data.splits["train"], batches[0][2]
    assert not isinstance(files, Images)
    crops = replace(files, size=20).read(batch.indices, (loaders.train.augment.seed, 2))[0]
    exact = normalize(crops, loaders.data.mean, loaders.data.std).permute(0, 3, 1, 2)
    cut = (batch.images == 0).all(1)
    torch.testing.assert_close(batch.images, torch.where(cut[:, None], 0.0, exact), rtol=0, atol=0)
    # Its square scaled as the pictures are, 8 * 20 / 32, from the centre, which no edge cuts off by more than half.
    sides = [max(int(image.any(0).sum()), int(image.any(1).sum())) for image in cut]
    assert max(sides) == 5
    assert min(sides) >= 2


GROWING = ("augment.progressive_from=16", "augment.progressive_until=1.0", "train.ema_decay=0.9")


def test_a_run_cut_inside_an_epoch_goes_on_bit_for_bit(tmp_path: Path) -> None:
    sizes: list[tuple[int, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        at_iteration(None, lambda engine: sizes.append(tuple(engine.state.batch.images.shape)), patch)
        assert train_tiny(tmp_path / "whole", *GROWING) == 0
    # Three epochs of four iterations: 16, 21.3 and 26.7 pixels, rounded down.
    assert sizes == [(16, 3, size, size) for size in (16, 20, 24) for _ in range(4)]

    def kill(engine: Engine) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    often = (*GROWING, "checkpoint.every_iterations=1")
    cut = Command(tmp_path / "cut", *often, patch=lambda: at_iteration(7, kill)).wait()
    assert cut.code == -signal.SIGKILL
    again = Command(tmp_path / "cut", *often, resume=True).wait()
    assert again.code == 0, again.stderr
    assert "iteration 6" in again.stderr
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_run_that_grew_is_evaluated_at_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert train_tiny(folder, "train.epochs=1", "augment.progressive_from=20") == 0
    last = RunFolder(folder).read_metrics()[-1]
    counted = {}
    # Its own; one below the first epoch's; and one of steps of 16 pixels, which 20 is none of.
    for size in (32, 16, 128):
        capsys.readouterr()
        assert evaluate.main(["--checkpoint", str(folder), "--json", f"data.image_size={size}"]) == 0
        counted[size] = json.loads(capsys.readouterr().out)
    assert (counted[32]["correct"], counted[32]["loss"]) == (last["correct"], last["loss"])
    assert len({figures["loss"] for figures in counted.values()}) == 3


def test_a_run_of_two_ranks_grows_with_its_first_sheet_drawn(tmp_path: Path) -> None:
    # Mixed, and on TensorBoard's sheet of augmented images: whatever takes the images for 32 pixels would fail.
    values = [*GROWING, "augment.mixup=0.2", "augment.cutmix=1.0", "logging.tensorboard=true", "logging.images=4"]
    outcome = Command(tmp_path / "run", *values, ranks=2).wait()
    assert (outcome.code, outcome.left) == (0, []), outcome.stderr


class Doubled(nn.Module):
    """A network of our own: torch compiles none of its own modules alone."""

    def forward(self, images: Tensor) -> Tensor:
        return 2 * images


def test_each_size_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by = nn.Module.compile
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def compile_traced(model: nn.Module, *, dynamic: bool, mode: str | None) -> None:
        compile_by(model, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", compile_traced)
    model = Doubled()
    wrap_for_ranks(model, CPU, Ranks(), sync_bn=False, compiled=True)
    # Twelve sizes; torch gives up after eight, and would go on uncompiled.
    for size in range(8, 56, 4):
        model(torch.zeros(1, 3, size, size))
    assert len(graphs) == 12
