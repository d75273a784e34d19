"""What is wrong with shards is named; where pictures lie in them is remembered only while they have not changed."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, train_tiny
from test_shards import Samples, batches, describe, on, pack, shard_config, write_shard

from resnext_ignite.data import load_data
from resnext_ignite.data.images import UNREADABLE
from resnext_ignite.data.reading.image_files import ImageFiles
from resnext_ignite.data.sources import disk_cache
from resnext_ignite.data.sources.shards import Members, index, index_shards
from resnext_ignite.data.sources.shards.tar import Tar
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runtime.errors import DataError


@pytest.fixture
def root(tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 and 12 pictures in shards of 5 to break."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return pack(picture_folder, tmp_path / "shards")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first_shard(content: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = content["shards"][0]
    return shard


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda path: path.unlink(), r"shards\.json: missing"),
        (lambda path: path.write_text('{"format": 1, "cla'), r"shards\.json: Invalid JSON"),
        (lambda path: path.write_text("[]"), r"shards\.json: .*object"),
        (lambda path: edit(path, lambda c: c.update(format=2)), r"shards\.json: format: Input should be 1"),
        (lambda path: edit(path, lambda c: c.pop("classes")), r"shards\.json: classes: Field required"),
        (lambda path: edit(path, lambda c: c.update(classes=["a", "a"])), r"shards\.json: classes: 'a' is listed 2"),
        (lambda path: edit(path, lambda c: c.update(shards=[])), r"shards\.json: shards: Tuple should have at least 1"),
        (
            lambda path: edit(path, lambda c: c["shards"].append(c["shards"][0])),
            r"shards: '000000\.tar' is listed 2",
        ),
        (lambda path: edit(path, lambda c: first_shard(c).pop("bytes")), r"shards\.json: shards\.0\.bytes: Field req"),
        (lambda path: edit(path, lambda c: first_shard(c).update(bytes="9")), r"shards\.json: shards\.0\.bytes: .*int"),
        (lambda path: edit(path, lambda c: first_shard(c).update(name="../0.tar")), r"shards\.json: shards\.0\.name"),
        (
            lambda path: edit(path, lambda c: c["shards"].reverse()),
            r"000007\.tar:00000035\.\w+: expected 00000000\.cls",
        ),
        (
            lambda path: edit(path, lambda c: first_shard(c).update(images=6)),
            r"000000\.tar: holds 5 images, .* lists 6",
        ),
        (lambda path: (path.parent / "000003.tar").unlink(), r"000003\.tar: No such file .*; shards\.json lists it"),
        (lambda path: os.truncate(path.parent / "000003.tar", 512), r"000003\.tar: cut short: 512 bytes, but"),
        (lambda path: os.truncate(path.parent / "000003.tar", 10**6), r"000003\.tar: too long: 1000000 bytes, but"),
    ],
)
def test_a_damaged_list_is_named(root: Path, change: Callable[[Path], object], line: str) -> None:
    change(root / "train/shards.json")
    with pytest.raises(DataError, match=line) as caught:
        load_data(shard_config(root), Ranks())
    assert str(caught.value).startswith(str(root / "train"))
    assert "\n" not in str(caught.value)


def rewrite(root: Path, change: Callable[[bytearray], object], shard: int = 3) -> None:
    """Change a shard's bytes, and its size in shards.json with them."""
    path = root / f"train/{shard:06}.tar"
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    edit(root / "train/shards.json", lambda listed: listed["shards"][shard].update(bytes=len(content)))


def put(place: int, new: bytes) -> Callable[[bytearray], object]:
    return lambda content: content.__setitem__(slice(place, place + len(new)), new)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        # A header's letter, its checksum, its size and its kind; the picture lies first, at byte 512.
        (put(0, b"1"), r"000003\.tar: damaged: no header at byte 0"),
        (put(148, b"zz"), r"000003\.tar: damaged: no header at byte 0"),
        (put(124, b"77777777777"), r"000003\.tar: damaged: no header at byte 0"),
        (put(156, b"1"), r"000003\.tar: damaged: no header at byte 0"),
        # Without its two last blocks of zeros and what fills up the record: cut where a member ends, or inside one.
        (lambda content: content.__delitem__(slice(len(content.rstrip(b"\0")) // 512 * 512 + 512, None)), "cut short"),
        (lambda content: content.__delitem__(slice(5000, None)), r"000003\.tar: cut short: ends at byte 5000"),
    ],
)
def test_a_damaged_header_is_named(root: Path, change: Callable[[bytearray], object], line: str) -> None:
    rewrite(root, change)
    with pytest.raises(DataError, match=line):
        load_data(shard_config(root), Ranks())


@pytest.mark.parametrize(
    ("samples", "line"),
    [
        ([("png", b"", b"2")], r":00000000\.cls: b'2' is no class from 0 to 1"),
        ([("png", b"", b"-1")], r":00000000\.cls: b'-1' is no class"),
        ([("png", b"", b"")], r":00000000\.cls: b'' is no class"),
        ([("png", b"", b"0" * 21)], r":00000000\.cls: b'0{21}' is no class"),
        ([("txt", b"", b"0")], r":00000000\.txt: expected 00000000\.cls and its image"),
        ([("cls", b"0", b"0")], r":00000000\.cls: expected 00000000\.cls and its image"),
    ],
)
def test_a_member_that_is_not_due_is_named(tmp_path: Path, samples: Samples, line: str) -> None:
    write_shard(tmp_path / "000000.tar", 0, samples)
    describe(tmp_path, ["a", "b"], [1])
    with pytest.raises(DataError, match=r"000000\.tar" + line):
        index_shards(tmp_path.parent, tmp_path.name)


def test_a_link_is_no_picture(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("00000000.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with Tar(tmp_path / "x.tar") as tar_file, pytest.raises(DataError, match=r"x\.tar:00000000\.jpg: not a plain file"):
        list(tar_file.members())


@pytest.mark.parametrize("long", ["00000000." + "x" * 150, "f/" + "x" * 120 + "/00000000.jpg"])
def test_names_are_read_as_the_standard_library_writes_them(tmp_path: Path, long: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(long)
        if len(long.rpartition("/")[2]) > 100:
            with pytest.raises(ValueError, match="too long"):
                tar.addfile(member)
            return
        tar.addfile(member)
    with Tar(tmp_path / "x.tar") as tar_file:
        assert [member.name for member in tar_file.members()] == [long]


def test_webdatasets_own_shards_are_read(tmp_path: Path, picture_folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pictures = [path.read_bytes() for path in sorted(picture_folder.glob("test/*/*"))]
    with webdataset.TarWriter(str(tmp_path / "000000.tar")) as writer:
        for number, picture in enumerate(pictures):
            writer.write({"__key__": f"{number:08}", "PNG": picture, "cls": number % 2})
    describe(tmp_path, ["a", "b"], [12])
    index = index_shards(tmp_path.parent, tmp_path.name)
    assert index.labels.tolist() == [0, 1] * 6
    assert [source.open().read() for source in map(index.paths.__getitem__, range(12))] == pictures


def test_classes_of_another_split_are_the_trainings(root: Path) -> None:
    listed = root / "test/shards.json"
    # Labels stand for this list's names: 0 for light, here.
    edit(listed, lambda content: content.update(classes=["light", "dark"]))
    data = load_data(shard_config(root), Ranks())
    assert data.classes == ("dark", "light")
    assert data.splits["test"].labels.tolist() == [1] * 6 + [0] * 6
    edit(listed, lambda content: content.update(classes=["light", "twilight"]))
    with pytest.raises(DataError, match=r"test/shards\.json: classes: 'twilight' is not a class of the training"):
        load_data(shard_config(root), Ranks())


def test_an_evaluation_asks_for_no_training_shard(root: Path) -> None:
    for path in (root / "train").glob("*.tar"):
        path.unlink()
    data = load_data(shard_config(root), Ranks(), ("test",))
    assert data.classes == ("dark", "light")
    assert len(data.splits["test"]) == 12


def blot(root: Path) -> str:
    """Damage the bytes of picture 17, the third of shard 3; its name."""
    members = index_shards(root, "train").paths
    rewrite(root, put(int(members.offsets[17]) + 40, bytes(400)))
    return f"{root}/train/000003.tar:00000017.png"


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_damaged_picture_ends_a_run_or_is_skipped(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str], in_memory: bool
) -> None:
    name = blot(root)
    values = on(root, f"data.in_memory={in_memory}".lower(), "train.epochs=1")
    with pytest.raises(DataError) as caught:
        train_tiny(tmp_path / "fails", *values)
    assert str(caught.value).startswith(f"{name}: ")
    assert train_tiny(tmp_path / "skips", *values, "data.on_error=skip") == 0
    assert capsys.readouterr().err.count(f"skipped: {name}: ") == 1
    config = shard_config(root, **{"data.in_memory": in_memory, "data.on_error": "skip"})
    epoch = batches(config, 5)
    indices, labels = (torch.cat([getattr(batch, part) for batch in epoch]) for part in ("indices", "labels"))
    assert indices[labels == UNREADABLE].tolist() == [17]


def test_a_shard_that_goes_while_it_is_read_is_named(root: Path) -> None:
    files = ImageFiles(index_shards(root, "train").paths, torch.zeros(40), torch.arange(40), 16)
    os.truncate(root / "train/000003.tar", 6000)
    with pytest.raises(DataError, match=r"000003\.tar:\w+.*: cannot be read: the shard ends at byte 6000"):
        files.load(torch.arange(15, 20))
    (root / "train/000004.tar").unlink()
    with pytest.raises(DataError, match=r"000004\.tar:byte \d+: cannot be read: No such file or directory"):
        files.load(torch.arange(20, 25))


def test_damage_ends_the_command_with_3(tmp_path: Path, root: Path) -> None:
    os.truncate(root / "train/000006.tar", 700)
    outcome = Command(tmp_path / "run", *on(root)).wait()
    assert outcome.code == 3
    assert len(outcome.errors) == 1
    assert f"{root}/train/000006.tar: cut short" in outcome.errors[0]


# What is kept of where they lie.


def test_the_walk_is_kept_until_a_shard_changes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    real = index._walk

    def noted(*given: Any) -> Any:
        walks.append(given)
        return real(*given)

    monkeypatch.setattr(index, "_walk", noted)
    monkeypatch.setattr(index, "_WORTH_KEEPING", 40)
    first = index_shards(root, "train")
    # Young shards may change within a tick of the clock.
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(disk_cache, "UNCHANGED_S", -1.0)
    index_shards(root, "train")
    assert len(walks) == 2
    again = index_shards(root, "train")
    assert len(walks) == 2
    assert again.labels.tolist() == first.labels.tolist()
    assert [str(again.paths[place]) for place in range(40)] == [str(first.paths[place]) for place in range(40)]

    def touch() -> None:
        os.utime(root / "train/000002.tar", (1, 1))

    def another_hash() -> None:
        edit(root / "train/shards.json", lambda content: first_shard(content).update(sha256="0" * 64))

    def another_order_of_classes() -> None:
        edit(root / "train/shards.json", lambda content: content["classes"].reverse())

    for number, change in enumerate((touch, another_hash, another_order_of_classes), start=3):
        change()
        for _ in range(2):
            index_shards(root, "train")
        assert len(walks) == number, change


def test_a_taken_part_of_a_part_is_of_the_whole(root: Path) -> None:
    members = index_shards(root, "train").paths
    part = members.take(torch.tensor([30, 2, 11]).numpy()).take(torch.tensor([2, 0]).numpy())
    assert [str(part[place]).rpartition(":")[2] for place in range(2)] == ["00000011.png", "00000030.png"]
    assert part.shards().tolist() == [2, 6]
    assert isinstance(part, Members)
    assert part.offsets is members.offsets
    assert part.identity() != members.identity()
