"""Augmentation: each function against slices and formulas written out, and the chain keyed by sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resnext_ignite.data.augment import chain as augment
from resnext_ignite.data.augment.chain import Augment

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.5)


def pictures(count: int = 6, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_crop_takes_the_window_at_its_corner() -> None:
    images = pictures(4, 10)
    positions, top, left = torch.tensor([2, 0, 3, 2]), torch.tensor([0, 1, 4, 2]), torch.tensor([3, 0, 4, 1])
    out = augment.crop(images, positions, top, left, 6)
    for k in range(4):
        assert torch.equal(out[k], images[positions[k], top[k] : top[k] + 6, left[k] : left[k] + 6])


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_pad_is_numpys(mode: str) -> None:
    images, fill = pictures(2, 5), torch.tensor([7, 8, 9], dtype=torch.uint8) if mode == "constant" else None
    out = augment.pad(images, 3, fill).numpy()
    for channel in range(3):
        kwargs = {} if fill is None else {"constant_values": int(fill[channel])}
        expected = np.pad(images[..., channel].numpy(), ((0, 0), (3, 3), (3, 3)), mode=mode, **kwargs)  # type: ignore[call-overload]
        np.testing.assert_array_equal(out[..., channel], expected)


@pytest.mark.parametrize("size", [8, 5])
def test_flip_mirrors_the_chosen(size: int) -> None:
    images = pictures(2, size)
    out = augment.flip(images, torch.tensor([True, False]))
    assert torch.equal(out[0], images[0].flip(1))
    assert torch.equal(out[1], images[1])


def test_cut_out_is_clipped_at_the_edges() -> None:
    out = augment.cut_out(torch.ones(2, 4, 4, 3), torch.tensor([-1, 2]), torch.tensor([0, 3]), 2, 2)
    first, second = torch.ones(4, 4), torch.ones(4, 4)
    first[0, :2] = 0
    second[2:, 3] = 0
    assert torch.equal(out[0], first[..., None].expand(4, 4, 3))
    assert torch.equal(out[1], second[..., None].expand(4, 4, 3))


def test_normalize_by_hand() -> None:
    out = augment.normalize(torch.full((1, 1, 1, 3), 51, dtype=torch.uint8), MEAN, STD)
    # 51 / 255 = 0.2; (0.2 - 0.5) / 0.25 = -1.2; (0.2 - 0.4) / 0.2 = -1; (0.2 - 0.3) / 0.5 = -0.2.
    torch.testing.assert_close(out.flatten(), torch.tensor([-1.2, -1.0, -0.2]))


def test_color_jitter_by_hand() -> None:
    # One row of two pixels: black, and pure red of 1. Luma: 0 and 0.299; its mean 0.1495.
    image = torch.tensor([[[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]])
    unchanged = torch.ones(1, 3)
    order = torch.tensor([0])
    assert torch.equal(augment.jitter_color(image, unchanged, order), image)
    darker = augment.jitter_color(image, torch.tensor([[0.6, 1.0, 1.0]]), order)
    torch.testing.assert_close(darker[0, 0, 1], torch.tensor([0.6, 0.0, 0.0]))
    flatter = augment.jitter_color(image, torch.tensor([[1.0, 0.6, 1.0]]), order)
    torch.testing.assert_close(flatter[0, 0], torch.tensor([[0.0598] * 3, [0.6598, 0.0598, 0.0598]]))
    paler = augment.jitter_color(image, torch.tensor([[1.0, 1.0, 0.6]]), order)
    torch.testing.assert_close(paler[0, 0, 1], torch.tensor([0.7196, 0.1196, 0.1196]))
    both = torch.tensor([[0.5, 0.5, 1.0]])
    # Blending with black first halves the mean luma that contrast then blends with; the other way round likewise: the
    # two commute, while saturation after a change of contrast sees another picture.
    assert not torch.allclose(
        augment.jitter_color(image, torch.tensor([[1.0, 0.5, 0.5]]), torch.tensor([1])),
        augment.jitter_color(image, both, torch.tensor([0])),
    )


def test_lighting_shifts_along_the_axes() -> None:
    out = augment.add_lighting(torch.zeros(1, 1, 1, 3), torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(out.flatten(), 0.2175 * torch.tensor([-0.5675, -0.5808, -0.5836]))


def augmented(chain: Augment, images: torch.Tensor, epoch: int, indices: torch.Tensor) -> torch.Tensor:
    return chain(chain.pad(images), torch.arange(len(images)), epoch, indices)


FULL = Augment(1, MEAN, STD, crop_padding=2, crop_fill="mean", flip="random", cutout=3, color=0.4, lighting=0.1)


def test_a_sample_is_augmented_alike_in_any_batch() -> None:
    images, indices = pictures(), torch.tensor([3, 99, 5, 2**33, 7, 0])
    whole = augmented(FULL, images, 4, indices)
    for part in (slice(0, 2), slice(2, 6), slice(5, 6)):
        assert torch.equal(augmented(FULL, images[part], 4, indices[part]), whole[part])
    order = torch.tensor([5, 0, 3])
    assert torch.equal(augmented(FULL, images[order], 4, indices[order]), whole[order])


def test_another_epoch_seed_or_index_changes_it() -> None:
    images, indices = pictures(), torch.arange(6)
    whole = augmented(FULL, images, 4, indices)
    other_seed = Augment(**{**FULL.__dict__, "seed": 2})
    for changed in (
        augmented(FULL, images, 5, indices),
        augmented(FULL, images, 4, indices + 6),
        augmented(other_seed, images, 4, indices),
    ):
        assert not torch.equal(changed, whole)


def test_alternating_flip_turns_every_image_every_epoch() -> None:
    chain = Augment(1, MEAN, STD, flip="alternating")
    images, indices = pictures(40), torch.arange(40)
    plain, mirrored = chain.plain(images), chain.plain(images.flip(2))
    flipped = []
    for epoch in (1, 2, 3):
        out = augmented(chain, images, epoch, indices)
        flipped.append([torch.equal(out[k], mirrored[k]) for k in range(40)])
        assert all(torch.equal(out[k], (mirrored if flipped[-1][k] else plain)[k]) for k in range(40))
    assert flipped[0] == flipped[2] == [not was for was in flipped[1]]
    assert 8 < sum(flipped[0]) < 32


def test_crops_by_chance_reach_every_offset_and_flips_are_even() -> None:
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8, 1).expand(4000, 8, 8, 3).contiguous()
    chain = Augment(1, (0, 0, 0), (1, 1, 1), crop_padding=1, flip="random")
    out = augmented(chain, image, 1, torch.arange(4000))
    # The middle pixel tells the offset (3 x 3) and the side.
    middle = (out[:, 0, 3, 3] * 255).round().long()
    assert len(middle.unique()) == 3 * 4
    sides = (out[:, 0, 3, 3] > out[:, 0, 3, 4]).float().mean().item()
    assert sides == pytest.approx(0.5, abs=0.03)


def test_normalised_pictures_come_back() -> None:
    images = pictures()
    chain = Augment(1, MEAN, STD)
    assert torch.equal(chain.unnormalize(chain.plain(images)), images.permute(0, 3, 1, 2))


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_format_is_the_one_asked_for(channels_last: bool) -> None:
    chain = Augment(1, MEAN, STD, crop_padding=1, cutout=2, channels_last=channels_last)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    for out in (augmented(chain, pictures(), 1, torch.arange(6)), chain.plain(pictures())):
        assert out.shape == (6, 3, 8, 8)
        assert out.is_contiguous(memory_format=wanted)


def test_a_few_pictures_at_a_time_are_normalised_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = torch.randint(0, 256, (7, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mirrored = torch.tensor([True, False, False, True, True, False, True])
    whole = augment.normalize(pictures, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), mirrored)
    by_hand = (pictures[0, 2, 7, 1] / 255 - 0.4) / 0.3
    assert torch.isclose(whole[0, 2, 0, 1], by_hand), "mirrored, the last column is the first"
    # Two pictures of 192 bytes: 2, 2, 2 and the last alone.
    monkeypatch.setattr(augment, "_CHUNK_BYTES", 400)
    assert torch.equal(augment.normalize(pictures, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), mirrored), whole)
