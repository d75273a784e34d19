"""TrivialAugment: torchvision's operations and strengths, drawn evenly, by the picture's key alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import digest, train_tiny
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional

from resnext_ignite.config.schema import Config, with_values
from resnext_ignite.data import build_train_loader, load_data
from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.augment.trivial import OPERATIONS, choices, trivial_augment
from resnext_ignite.data.images import Images
from resnext_ignite.distributed.ranks import Ranks

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
BILINEAR = InterpolationMode.BILINEAR
# Ours, and what torchvision calls it.
NAMES = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}


def pictures(count: int, size: int = 24) -> Tensor:
    """Smooth ones and noise, by turns: uint8 (count, size, size, 3)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").permute(0, 2, 3, 1) * 255
    noise = torch.randint(0, 256, (count, size, size, 3), generator=generator)
    return torch.where((torch.arange(count) % 2 == 0)[:, None, None, None], smooth, noise).to(torch.uint8)


def planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchvisions(name: str) -> None:
    """In every bin and with either sign, of a batch at once as of each picture alone."""
    reference = transforms.TrivialAugmentWide(interpolation=BILINEAR)
    magnitudes_of, signed = reference._AUGMENTATION_SPACE[NAMES[name]]
    magnitudes = magnitudes_of(31, 24, 24)
    batch = planes(pictures(3))
    for bin_ in range(31) if magnitudes is not None else (0,):
        for negative in (False, True):
            magnitude = 0.0 if magnitudes is None else float(magnitudes[bin_])
            magnitude = -magnitude if signed and negative else magnitude
            strength = OPERATIONS[name].strength(bin_, negative)
            assert strength == magnitude
            ours = OPERATIONS[name].apply(batch, strength)
            for one, out in zip(batch, ours, strict=True):
                theirs = reference._apply_image_or_video_transform(
                    one.contiguous(), NAMES[name], magnitude, reference.interpolation, reference._fill
                )
                assert torch.equal(out, theirs)


def test_strengths_by_hand() -> None:
    """Bin 15 of 31 is half of the way: 67.5 degrees, 5 bits, half of the levels; 16 pixels, less a rounding: 15."""
    batch = planes(pictures(2))
    moved = OPERATIONS["translate_x"].apply(batch, OPERATIONS["translate_x"].strength(15, False))
    assert torch.equal(moved[..., 15:], batch[..., :9])
    assert not moved[..., :15].any()
    turned = functional.rotate(batch, 67.5, BILINEAR)
    assert torch.equal(OPERATIONS["rotate"].apply(batch, OPERATIONS["rotate"].strength(15, False)), turned)
    posterized = OPERATIONS["posterize"].apply(batch, OPERATIONS["posterize"].strength(15, True))
    assert torch.equal(posterized, batch & 0b11111000)
    solarized = OPERATIONS["solarize"].apply(batch, OPERATIONS["solarize"].strength(15, True))
    assert torch.equal(solarized, torch.where(batch >= 128, 255 - batch, batch))
    # The last bin of brightness leaves a hundredth.
    dark = OPERATIONS["brightness"].apply(batch, OPERATIONS["brightness"].strength(30, True))
    assert int(dark.max()) == 2


def test_what_is_drawn_is_uniform() -> None:
    """Chi-square against even shares; the thousandth part of such tests would fail (13, 30 and 1 degrees)."""
    drawn = choices(7, 3, torch.arange(140_000))
    counts = torch.tensor([sum(name == operation for operation, _ in drawn) for name in OPERATIONS]).double()
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 34.5
    degrees = torch.tensor([strength for operation, strength in drawn if operation == "rotate"])
    bins = (degrees.abs() / 4.5).round().long().bincount(minlength=31).double()
    expected = len(degrees) / 31
    assert float(((bins - expected) ** 2 / expected).sum()) < 59.7
    turned = degrees[degrees != 0]
    assert abs(int((turned < 0).sum()) * 2 - len(turned)) < 3.3 * len(turned) ** 0.5


def test_only_the_picture_and_its_key_matter() -> None:
    whole, indices = pictures(200), torch.arange(200) * 3
    out = trivial_augment(whole, 5, 2, indices)
    assert torch.equal(trivial_augment(whole, 5, 2, indices), out)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    for part in order.split(7):
        assert torch.equal(trivial_augment(whole[part], 5, 2, indices[part]), out[part])
    for seed, epoch in ((6, 2), (5, 3)):
        assert not torch.equal(trivial_augment(whole, seed, epoch, indices), out)


def test_each_picture_has_its_own_operation() -> None:
    whole, indices = pictures(64), torch.arange(64)
    out = trivial_augment(whole, 1, 1, indices)
    for number, (name, strength) in enumerate(choices(1, 1, indices)):
        alone = OPERATIONS[name].apply(planes(whole[number : number + 1]), strength)
        assert torch.equal(planes(out[number : number + 1]), alone)


def test_the_sum_of_the_greys_is_exact_in_large_pictures() -> None:
    # 512 x 512 greys of 255 are more than float32 can count: the mean must not be rounded on the way.
    batch = torch.full((2, 3, 512, 512), 255, dtype=torch.uint8)
    batch[1, :, ::2] = 254
    out = OPERATIONS["contrast"].apply(batch, -0.99)
    assert out[0].unique().tolist() == [254]
    for one, alone in zip(batch, out, strict=True):
        assert torch.equal(OPERATIONS["contrast"].apply(one[None], -0.99)[0], alone)


def test_it_comes_after_crop_and_flip() -> None:
    whole, indices = pictures(32), torch.arange(32)
    before = Augment(seed=3, mean=MEAN, std=STD, crop_padding=4, flip="random")
    with_it = Augment(seed=3, mean=MEAN, std=STD, crop_padding=4, flip="random", trivial=True)
    flipped = before.on_pixels(before.pad(whole), indices, 1, indices)
    assert not torch.equal(flipped, whole)
    expected = before.on_images(trivial_augment(flipped, 3, 1, indices), 1, indices)
    assert torch.equal(with_it(with_it.pad(whole), indices, 1, indices), expected)


def folder_config(root: Path, **values: object) -> Config:
    named = {"data.name": "imagefolder", "data.root": str(root), "train.batch_size": 8, "data.workers": 0}
    return with_values(Config(), {**named, "augment.trivial": True, **values})


def taken(config: Config, ranks: Ranks, start: int, count: int) -> list[Tensor]:
    loader = build_train_loader(config, load_data(config, ranks), CPU, ranks)
    loader.start_iteration = start
    source = iter(loader)
    return [next(source).images for _ in range(count)]


@pytest.mark.parametrize("crops", [False, True])
def test_batches_do_not_depend_on_workers_ranks_or_cuts(picture_folder: Path, crops: bool) -> None:
    config = folder_config(picture_folder, **{"data.image_size": 24, "augment.random_resized_crop": crops})
    whole = taken(config, Ranks(), 0, 7)
    in_workers = taken(with_values(config, {"data.workers": 2}), Ranks(), 0, 7)
    assert all(torch.equal(mine, other) for mine, other in zip(in_workers, whole, strict=True))
    cut = taken(config, Ranks(), 4, 3)
    assert all(torch.equal(mine, other) for mine, other in zip(cut, whole[4:], strict=True))
    halves = [taken(config, Ranks(rank, 2), 0, 7) for rank in range(2)]
    assert all(torch.equal(torch.cat(pair), other) for *pair, other in zip(*halves, whole, strict=True))
    # And it does something.
    plain = taken(with_values(config, {"augment.trivial": False}), Ranks(), 0, 1)
    assert not torch.equal(plain[0], whole[0])


def test_memory_and_files_give_the_same_batches(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number, picture in enumerate(pictures(12, 32)):
            Image.fromarray(np.asarray(picture)).save(tmp_path / split / "a" / f"{number:02}.png")
    batches = []
    for in_memory in (True, False):
        config = folder_config(tmp_path, **{"data.in_memory": in_memory, "data.image_size": 32, "train.batch_size": 4})
        assert isinstance(load_data(config, Ranks()).splits["train"], Images) == in_memory
        batches.append(taken(config, Ranks(), 0, 5))
    assert all(torch.equal(mine, other) for mine, other in zip(*batches, strict=True))


def test_a_run_that_is_cut_ends_as_if_it_were_not(tmp_path: Path) -> None:
    keys = ("augment.trivial=true", "augment.erasing=0.5", "data.train_size=32", "data.test_size=8", "train.epochs=2")
    assert train_tiny(tmp_path / "whole", *keys) == 0
    assert train_tiny(tmp_path / "cut", *keys, "train.epochs=1") == 0
    assert train_tiny(tmp_path / "cut", *keys, resume=True) == 0
    assert digest(tmp_path / "cut")["model"] == digest(tmp_path / "whole")["model"]
