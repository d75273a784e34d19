"""JPEG files decoded past PIL: to PIL's own pixels, at other scales close to them, and refused as PIL refuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNeXt50_32X4D_Weights

from resnext_ignite.data.reading import decoding
from resnext_ignite.data.reading.cropping import random_crop, square_crop
from resnext_ignite.data.reading.decoding import _PlainJpeg, crop_and_resize, open_rgb, read_crop, resized
from resnext_ignite.runtime.errors import DataError


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise: as much detail as a photograph has."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    coarse = coarse.resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


KINDS: dict[str, dict[str, Any]] = {
    "usual": {"quality": 85},
    "coarse": {"quality": 30},
    "no subsampling": {"quality": 95, "subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
}


@pytest.mark.parametrize("kind", [*KINDS, "grey"])
@pytest.mark.parametrize("size", [(333, 217), (64, 64), (32, 32)])
def test_pixels_are_pils(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    path = str(tmp_path / "x.jpg")
    picture = photograph(*size)
    (picture.convert("L") if kind == "grey" else picture).save(path, **KINDS.get(kind, {}))
    assert _PlainJpeg.of(path) is not None
    whole = open_rgb(path)
    for side, crop in [(32, square_crop(32)), (48, square_crop(48, 0.875)), (20, random_crop([[0.4, 0.7, 0.2, 0.9]]))]:
        expected = resized(np.array(whole), side, crop(*whole.size))
        assert np.array_equal(read_crop(path, side, crop), expected)
    crop = random_crop([[0.4, 0.7, 0.2, 0.9]])
    box = crop(*whole.size)
    # At most as large as asked for: no fraction of it.
    side = int(min(box[2] - box[0], box[3] - box[1]))
    assert np.array_equal(read_crop(path, side, crop, training=True), crop_and_resize(np.array(whole), side, box))


@pytest.mark.parametrize("box", [(0, 0, 80, 60), (10, 7, 74, 51), (3, 3, 27, 33)])
def test_the_two_ways_to_resize_are_torchvisions(box: tuple[int, int, int, int]) -> None:
    picture = photograph(80, 60)
    cut = picture.crop(box).resize((32, 32), Image.Resampling.BILINEAR)
    ours = crop_and_resize(np.array(picture), 32, box).astype(int)
    assert np.abs(ours - np.asarray(cut)).max() <= 1
    # Resize, then CenterCrop.
    whole = picture.resize((40, 30), Image.Resampling.BILINEAR).crop((8, 3, 32, 27))
    assert np.abs(resized(np.array(picture), 24, (16, 6, 64, 54)).astype(int) - np.asarray(whole)).max() <= 1


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_turned_pictures_are_pils(tmp_path: Path, orientation: int) -> None:
    path = str(tmp_path / "x.jpg")
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(90, 61).save(path, exif=exif)
    whole = open_rgb(path)
    plain = _PlainJpeg.of(path)
    assert plain is not None
    assert (plain.width, plain.height) == whole.size
    crop = random_crop([[0.4, 0.7, 0.2, 0.9]])
    assert np.array_equal(read_crop(path, 20, crop), resized(np.array(whole), 20, crop(*whole.size)))
    scaled = read_crop(path, 12, crop, training=True).astype(int)
    unscaled = crop_and_resize(np.array(whole), 12, crop(*whole.size))
    assert 0 < np.abs(scaled - unscaled).mean() < 6


def test_an_orientation_is_found_wherever_it_stands(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    late, xmp = tmp_path / "late.jpg", tmp_path / "xmp.jpg"
    photograph(40, 30).save(late, exif=exif)
    content = late.read_bytes()
    comment = b"\xff\xfe" + (60_002).to_bytes(2, "big") + bytes(60_000)
    late.write_bytes(content[:2] + 3 * comment + content[2:])
    photograph(40, 30).save(xmp, xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>')
    for path in (str(late), str(xmp)):
        whole = open_rgb(path)
        assert whole.size == (30, 40)
        assert np.array_equal(
            read_crop(path, 16, square_crop(16)), resized(np.array(whole), 16, square_crop(16)(30, 40))
        )


def test_what_is_not_plain_is_pils(tmp_path: Path) -> None:
    cmyk, png = (str(tmp_path / name) for name in ("cmyk.jpg", "x.png"))
    photograph(40, 30).convert("CMYK").save(cmyk)
    photograph(40, 30).save(png)
    for path in (cmyk, png):
        assert _PlainJpeg.of(path) is None
        whole = open_rgb(path)
        expected = resized(np.array(whole), 16, square_crop(16)(*whole.size))
        assert np.array_equal(read_crop(path, 16, square_crop(16)), expected)


@pytest.mark.parametrize(("side", "halvings"), [(300, 0), (200, 1), (120, 1), (100, 2), (50, 3), (10, 3)])
def test_a_large_picture_is_decoded_at_a_fraction(tmp_path: Path, side: int, halvings: int) -> None:
    """Of 400 rows: never below the size that is asked for, and close to what the whole picture gives."""
    path = str(tmp_path / "x.jpg")
    photograph(600, 400).save(path, quality=90)
    seen = []
    decode = _PlainJpeg.decode

    def noted(plain: _PlainJpeg, times: int) -> Any:
        seen.append(times)
        return decode(plain, times)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_PlainJpeg, "decode", noted)
        scaled = read_crop(path, side, square_crop(side), training=True)
        seen.append(-1)
        whole = resized(np.array(open_rgb(path)), side, square_crop(side)(600, 400))
    assert seen == [halvings, -1]
    difference = np.abs(scaled.astype(int) - whole)
    assert difference.mean() < 2.5


def test_a_scaled_crop_lies_where_the_whole_one_does(tmp_path: Path) -> None:
    """An edge in the middle of odd numbers of pixels stays in the middle."""
    path = str(tmp_path / "x.jpg")
    pixels = np.zeros((401, 603, 3), np.uint8)
    pixels[:, 301:] = 255
    Image.fromarray(pixels).save(path, quality=95)
    for side in (100, 50, 25):
        crop = read_crop(path, side, lambda width, height: (101, 0, 502, height), training=True)
        bright = crop[..., 0].mean() / 255 * side
        assert bright == pytest.approx((502 - 301) / 401 * side, abs=0.6)


@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "empty", "missing", "bomb"])
def test_a_damaged_jpeg_is_answered_as_pil_answers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = tmp_path / "x.jpg"
    photograph(80, 60).save(path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2 :: 7] = bytes(len(content[len(content) // 2 :: 7]))
    elif damage == "header":
        content[4:40] = bytes(36)
    elif damage == "empty":
        content = bytearray()
    elif damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    path.write_bytes(content)
    if damage == "missing":
        path.unlink()

    def answer(work: Any) -> Any:
        try:
            return work().tobytes()
        except DataError as error:
            return str(error)

    with decoding.no_warnings():
        ours = answer(lambda: read_crop(str(path), 16, square_crop(16)))
        pils = answer(lambda: resized(np.array(open_rgb(str(path))), 16, square_crop(16)(80, 60)))
    assert ours == pils
    assert damage == "flipped" or isinstance(ours, str)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (231, 640), (224, 224), (100, 90), (1031, 257)])
@pytest.mark.parametrize("weights", list(ResNeXt50_32X4D_Weights))
def test_evaluation_sees_what_torchvisions_weights_were_evaluated_on(
    tmp_path: Path, size: tuple[int, int], weights: ResNeXt50_32X4D_Weights
) -> None:
    path = str(tmp_path / "x.png")
    photograph(*size).save(path)
    transforms = weights.transforms()
    mean, std = (torch.tensor(values)[:, None, None] for values in (transforms.mean, transforms.std))
    theirs = (transforms(Image.open(path)) * std + mean) * 255
    ours = read_crop(path, 224, square_crop(224, 224 / transforms.resize_size[0]))
    difference = np.abs(theirs.round().permute(1, 2, 0).numpy() - ours)
    assert difference.max() <= 2
    assert difference.mean() < 0.3
