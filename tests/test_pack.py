"""Folders packed into shards: what is in them, that it is always the same, and that damage is found."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from conftest import small_disk
from PIL import Image

from resnext_ignite import pack
from resnext_ignite.data.sampling import Purpose, permutation
from resnext_ignite.packing import options, shards
from resnext_ignite.runtime.errors import ConfigError, DataError, RunFolderError, StorageError

TRAIN, VAL = 14, 4


def draw(path: Path, width: int, height: int, seed: int, **how: Any) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes: 7 training and 2 validation pictures each, JPEG and PNG, 20 to 38 pixels wide and 30 high."""
    root = tmp_path / "source"
    for split, count in (("train", TRAIN // 2), ("val", VAL // 2)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                suffix = "JPEG" if number % 3 else "png"
                draw(root / split / name / f"{number}.{suffix}", 20 + 3 * number, 30, 100 * label + number)
    return root


def packed(source: Path, output: Path, *more: str) -> Path:
    assert pack.main([str(source), "--output", str(output), "--workers", "0", *more]) == 0
    return output


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path) -> list[dict[str, Any]]:
    """What WebDataset itself reads in a split."""
    names = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(names, shardshuffle=False, empty_check=False))


def in_order(source: Path, split: str) -> list[Path]:
    return sorted(path for path in (source / split).rglob("*") if path.is_file())


def test_shards_hold_the_files_as_they_are(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = packed(source, tmp_path / "out", "--images-per-shard", "5")
    lines = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in (output / "train").glob("*.tar"))
    assert lines[0].startswith(f"{output / 'train'}: 14 images, 2 classes, 3 shards, {size} bytes, ")
    assert lines[1].startswith(f"{output / 'val'}: 4 images, 2 classes, 1 shards, ")
    for split, count in (("train", TRAIN), ("val", VAL)):
        paths = in_order(source, split)
        order = permutation(0, 0, count, Purpose.PACKED).tolist() if split == "train" else list(range(count))
        read = samples(output / split)
        assert [sample["__key__"] for sample in read] == [f"{number:08d}" for number in range(count)]
        for sample, position in zip(read, order, strict=True):
            path = paths[position]
            suffix = path.suffix[1:].lower()
            assert set(sample) - {"__key__", "__url__", "__local_path__"} == {"cls", suffix}
            assert sample[suffix] == path.read_bytes()
            assert sample["cls"] == (b"0" if path.parent.name == "cat" else b"1")


def test_the_manifest_says_what_is_there(source: Path, tmp_path: Path) -> None:
    output = packed(source, tmp_path / "out", "--images-per-shard", "5")
    manifest = json.loads((output / "train/shards.json").read_text())
    assert sorted(manifest) == ["classes", "format", "shards"]
    assert (manifest["format"], manifest["classes"]) == (1, ["cat", "dog"])
    assert [shard["images"] for shard in manifest["shards"]] == [5, 5, 4]
    for number, shard in enumerate(manifest["shards"]):
        content = (output / "train" / f"{number:06d}.tar").read_bytes()
        assert shard == {
            "name": f"{number:06d}.tar",
            "bytes": len(content),
            "images": (5, 5, 4)[number],
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert sorted(os.listdir(output / "val")) == ["000000.tar", "shards.json"]


def test_a_shard_is_a_plain_tar_file(source: Path, tmp_path: Path) -> None:
    output = packed(source, tmp_path / "out")
    content = (output / "val/000000.tar").read_bytes()
    # POSIX.1-1988 (ustar): magic at byte 257 of each header, type 0 at 156.
    assert content[257:265] == b"ustar\x0000"
    with tarfile.open(output / "val/000000.tar") as archive:
        for member in archive:
            assert content[member.offset + 156 : member.offset + 157] == b"0"
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.pax_headers == {}


def test_packing_again_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    first = packed(source, tmp_path / "a", "--short-side", "25")
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    second = tmp_path / "b"
    assert pack.main([str(copy), "--output", str(second), "--short-side", "25", "--workers", "2"]) == 0
    assert files_below(first) == files_below(second)


def test_a_shards_size_is_kept(source: Path, tmp_path: Path) -> None:
    """A tar file ends in two blocks of zeros, and is filled up to whole records of 10,240 bytes."""
    pictures = [shards._Sample("0", 1, bytes(length), "jpg") for length in (3000, 1, 3000, 9000, 20_000, 1)]
    # 512 + 512 + 512 + 3,072 bytes for 3,000: 4,608. Two and the end: 10,240; three of them would be 15,360.
    numbers = [number for number, _ in shards._numbered(iter(pictures), shards.Limit(size=10_240))]
    # 4,608 + 2,048 + 1,024 = 7,680; 4,608 more is too much. 4,608 + 10,752 + 1,024 too. The fifth is too large alone.
    assert numbers == [0, 0, 1, 2, 3, 4]
    assert [number for number, _ in shards._numbered(iter(pictures), shards.Limit(images=4))] == [0, 0, 0, 0, 1, 1]
    output = tmp_path / "out"
    shards.pack_folder(source, output, shards.Limit(size=10_240), options.Encoding(), 0)
    sizes = [path.stat().st_size for path in (output / "train").glob("*.tar")]
    assert len(sizes) > 1
    assert set(sizes) == {10_240}


def test_the_short_side_is_exact(source: Path, tmp_path: Path) -> None:
    turned = source / "val/cat/turned.jpg"
    draw(turned, 60, 40, 5, exif=(exif := Image.Exif()))
    exif[0x0112] = 6
    draw(turned, 60, 40, 5, exif=exif, quality=95)
    output = packed(source, tmp_path / "out", "--short-side", "25", "--quality", "90")
    read = {int(sample["__key__"]): sample for sample in samples(output / "val")}
    # cat: 0 (20x30 PNG: short enough, as it is), 1 (23x30 JPEG: too), turned (60x40 on its side: 40x60 to 25x38).
    assert read[0]["png"] == (source / "val/cat/0.png").read_bytes()
    assert read[1]["jpeg"] == (source / "val/cat/1.JPEG").read_bytes()
    with Image.open(io.BytesIO(read[2]["jpg"])) as picture, Image.open(turned) as original:
        assert (picture.format, picture.size, dict(picture.getexif())) == ("JPEG", (25, 38), {})
        expected = original.transpose(Image.Transpose.ROTATE_270).resize((25, 38), Image.Resampling.LANCZOS)
        difference = np.abs(np.asarray(picture, np.int16) - np.asarray(expected, np.int16))
        # As far as a JPEG of quality 90 goes.
        assert difference.mean() < 12
    # 26, 29, 32, 35 and 38 pixels wide and 30 high: 25 on the shorter side, and a PNG becomes a JPEG.
    sizes = set()
    for sample in samples(output / "train"):
        (suffix,) = set(sample) - {"__key__", "__url__", "__local_path__", "cls"}
        with Image.open(io.BytesIO(sample[suffix])) as picture:
            assert (picture.format == "PNG") == (suffix == "png")
            sizes.add((suffix, picture.size))
    assert sizes == {
        ("png", (20, 30)),
        ("jpeg", (23, 30)),
        ("jpeg", (25, 29)),
        ("jpg", (25, 26)),
        ("jpeg", (27, 25)),
        ("jpeg", (29, 25)),
        ("jpg", (32, 25)),
    }


def test_a_shard_mixes_the_classes(tmp_path: Path) -> None:
    order = permutation(0, 0, 1000, Purpose.PACKED)
    # 100 of 1,000 pictures, half of them of the first class: 50, give or take 4.7 (hypergeometric).
    assert 30 < int((order[:100] < 500).sum()) < 70
    assert torch.equal(order.sort().values, torch.arange(1000))


def damage_a_byte(folder: Path) -> None:
    path = folder / "train/000001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    os.truncate(folder / "train/000001.tar", 5000)


def lose(folder: Path) -> None:
    (folder / "train/000001.tar").unlink()


def miscount(folder: Path) -> None:
    path = folder / "train/shards.json"
    path.write_text(path.read_text().replace('"images": 5', '"images": 6', 1))


def lose_the_manifest(folder: Path) -> None:
    (folder / "val/shards.json").unlink()


def break_the_manifest(folder: Path) -> None:
    (folder / "val/shards.json").write_text('{"format": 1, "classes": []}')


def of_another_format(folder: Path) -> None:
    (folder / "val/shards.json").write_text('{"format": 2}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_a_byte, r"train/000001.tar: is damaged: its sha256 is not that of shards.json"),
        (cut, r"train/000001.tar: cut short: 5000 bytes, but shards.json lists \d+"),
        (lose, r"train/000001.tar: No such file or directory; shards.json lists it"),
        (miscount, r"train/000000.tar: holds 5 images, but shards.json lists 6"),
        (lose_the_manifest, r"val/shards.json: missing: .*its packing was interrupted"),
        (break_the_manifest, r"val/shards.json: classes: .*at least 1"),
        (of_another_format, r"val/shards.json: format: Input should be 1"),
    ],
)
def test_check_finds_damage(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], words: str
) -> None:
    output = packed(source, tmp_path / "out", "--images-per-shard", "5")
    capsys.readouterr()
    assert pack.main(["--check", str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"{output / 'train'}: 14 images, 2 classes, 3 shards, ")
    damage(output)
    with pytest.raises(DataError, match=words):
        pack.main(["--check", str(output)])


def test_a_picture_that_cannot_be_read_is_named(source: Path, tmp_path: Path) -> None:
    bad = source / "train/dog/1.JPEG"
    bad.write_bytes(bad.read_bytes()[:-200])
    # Its bytes are copied where nothing is decoded, whole or not.
    packed(source, tmp_path / "copied")
    for workers in ("0", "2"):
        # Short enough to be copied, and looked at all the same.
        with pytest.raises(DataError, match=r"train/dog/1.JPEG: cannot be read: .*; remove or replace it"):
            packed(source, tmp_path / "out", "--short-side", "29", "--workers", workers)
        assert not list((tmp_path / "out").rglob("shards.json"))
    bad.write_bytes(b"")
    with pytest.raises(DataError, match=r"train/dog/1.JPEG: is empty"):
        packed(source, tmp_path / "empty")


def test_what_is_packed_is_not_packed_over(source: Path, tmp_path: Path) -> None:
    output = packed(source, tmp_path / "out")
    before = files_below(output)
    with pytest.raises(RunFolderError, match=r"out/train: is packed already; choose another --output, or remove it"):
        packed(source, output)
    assert files_below(output) == before
    with pytest.raises(RunFolderError, match=r"train/cat: is not a shard of an interrupted packing"):
        packed(source, source)
    with pytest.raises(ConfigError, match=r"lies in .*train, among its classes"):
        packed(source, source / "train/shards")
    assert not (source / "train/shards").exists()


def test_killed_half_way_it_begins_anew(
    source: Path, tmp_path: Path, in_fork: Callable[[Callable[[], Any]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def killed() -> None:
        read, count = shards.read_image, 0

        def read_eleven(*values: Any) -> Any:
            nonlocal count
            count += 1
            if count > 11:
                # The eleventh ended the second of three shards.
                while not (output / "train/000001.tar").exists():
                    time.sleep(0.01)
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60)
            return read(*values)

        monkeypatch.setattr(shards, "read_image", read_eleven)
        pack.main([str(source), "--output", str(output), "--workers", "1", "--images-per-shard", "5"])

    assert in_fork(killed) == signal.SIGKILL
    assert sorted(os.listdir(output / "train"))[-2:] == ["000000.tar", "000001.tar"]
    with pytest.raises(DataError, match=r"train/shards.json: missing: .*its packing was interrupted"):
        pack.main(["--check", str(output)])
    # With larger shards, of which fewer are needed: none of the old ones may stay.
    packed(source, output, "--images-per-shard", "10")
    assert files_below(output) == files_below(packed(source, tmp_path / "whole", "--images-per-shard", "10"))


def test_a_full_disk_is_told(source: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 6 * 4096) as disk:
        with pytest.raises(StorageError, match=r"train/00000\d.tar: No space left on device; free some space"):
            packed(source, disk / "out", "--images-per-shard", "5")
        assert not list(disk.rglob("shards.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of the two"),
        (["x"], "both are needed to pack"),
        (["x", "--output", "y", "--check", "z"], "give one of the two"),
        (["--output", "y", "--check", "z"], "neither to check"),
        (["x", "--output", "y", "--images-per-shard", "0"], "--images-per-shard 0: at least 1"),
        (["x", "--output", "y", "--shard-mb", "0"], "--shard-mb 0: at least 1"),
        (["x", "--output", "y", "--short-side", "0"], "--short-side 0: at least 1"),
        (["x", "--output", "y", "--workers", "-1"], "--workers -1: at least 0"),
        (["x", "--output", "y", "--quality", "90"], "--quality 90: files are copied as they are"),
        (["x", "--output", "y", "--quality", "0", "--short-side", "9"], "--quality 0: 1 to 100"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pack.main(arguments)


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="neither train/, val/ nor test/ is there"):
        packed(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="holds no packed split"):
        pack.main(["--check", str(tmp_path)])
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"webdataset is missing; pip install 'resnext-ignite\[imagenet\]'"):
        pack.main(["--check", str(tmp_path)])


def test_a_class_whose_name_is_no_text_is_refused_before_anything_is_packed(source: Path, tmp_path: Path) -> None:
    # A latin-1 name, as old archives have them: shards.json is UTF-8, and so is what reads it.
    (source / "train/dog").rename(os.fsdecode(os.fsencode(source / "train") + b"/h\xfcnd"))
    (source / "val/dog").rename(os.fsdecode(os.fsencode(source / "val") + b"/h\xfcnd"))
    with pytest.raises(DataError, match=r"the class 'h\\udcfcnd' is not valid text; rename its folder"):
        pack.main([str(source), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
