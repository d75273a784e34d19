"""Pictures in tar shards: the same as in folders, read a few shards at a time; and what is wrong with shards, named."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from conftest import Command, at_iteration, digest, rank, train_tiny
from test_data import folder_config
from torch import Tensor

from resnext_ignite.config import Config
from resnext_ignite.data import build_eval_loader, build_train_loader, load_data, shards
from resnext_ignite.data.imagefolder import ImageFiles
from resnext_ignite.data.images import UNREADABLE, Images
from resnext_ignite.data.loaders import Batch
from resnext_ignite.data.sampling import Purpose, TrainOrder, permutation
from resnext_ignite.data.shards import Members, OpenFiles, index_shards
from resnext_ignite.data.tar import Tar
from resnext_ignite.distributed import Ranks
from resnext_ignite.errors import ConfigError, DataError, RunFolderError

CPU = torch.device("cpu")
Samples = list[tuple[str, bytes, bytes]]


def write_shard(path: Path, first: int, samples: Samples, **options: Any) -> None:
    """Samples of (extension, picture, label), numbered on from `first`."""
    with tarfile.open(path, "w", **{"format": tarfile.USTAR_FORMAT, **options}) as tar:
        for number, (extension, picture, label) in enumerate(samples, start=first):
            for kind, content in ((extension, picture), ("cls", label)):
                member = tarfile.TarInfo(f"{number:08}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def describe(folder: Path, classes: list[str], counts: list[int]) -> None:
    """Write shards.json for the shards that lie there."""
    entries = [
        {
            "name": path.name,
            "bytes": path.stat().st_size,
            "images": count,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path, count in zip(sorted(folder.glob("*.tar")), counts, strict=True)
    ]
    (folder / "shards.json").write_text(json.dumps({"format": 1, "classes": classes, "shards": entries}))


def pack(source: Path, root: Path, each: int = 5) -> Path:
    """An imagefolder's pictures in shards of `each`, in the imagefolder's order."""
    for split in (path for path in source.iterdir() if path.is_dir()):
        folder = root / split.name
        folder.mkdir(parents=True)
        classes = sorted(path.name for path in split.iterdir())
        files = sorted(split.glob("*/*"))
        samples = [(path.suffix[1:], path.read_bytes(), b"%d" % classes.index(path.parent.name)) for path in files]
        parts = [samples[start : start + each] for start in range(0, len(samples), each)]
        for number, part in enumerate(parts):
            write_shard(folder / f"{number:06}.tar", number * each, part)
        describe(folder, classes, [len(part) for part in parts])
    return root


@pytest.fixture
def root(tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 and 12 pictures in shards of 5: 8 shards and 3."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return pack(picture_folder, tmp_path / "shards")


def shard_config(root: Path, **values: Any) -> Config:
    return folder_config(root, **{"data.name": "shards", "data.image_size": 16, **values})


def on(root: Path, *values: str) -> list[str]:
    """Overrides of a tiny run on shards: 3 epochs of 5 batches of 8, two shards at a time."""
    sizes = ["data.train_size=null", "data.test_size=null", "train.batch_size=8", "data.image_size=16"]
    return ["data.name=shards", f"data.root={root}", "data.workers=0", "data.shuffle_shards=2", *sizes, *values]


def batches(config: Config, count: int, ranks: Ranks | None = None, start: int = 0) -> list[Batch]:
    ranks = ranks or Ranks()
    loader = build_train_loader(config, load_data(config, ranks), CPU, ranks)
    loader.start_iteration = start
    return list(itertools.islice(loader, count))


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "labels", "indices"))


# The order of an epoch.

GROUPS = torch.arange(6).repeat_interleave(torch.tensor([4, 3, 5, 4, 2, 6]))


def order_of(window: int, groups: Tensor = GROUPS, **values: Any) -> TrainOrder:
    return TrainOrder(
        **{"seed": 3, "count": len(groups), "batch_size": 4, "groups": groups, "window": window, **values}
    )


def test_an_order_by_hand() -> None:
    # Three groups of two images. Their order and that of the images, sorted by the keyed hash, are taken as given.
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    by_group = permutation(3, 1, 3, Purpose.SHARDS).tolist()
    by_image = permutation(3, 1, 6, Purpose.ORDER).tolist()
    expected = []
    for window in ([by_group[0], by_group[1]], [by_group[2]]):
        expected += [image for image in by_image if image // 2 in window]
    assert order_of(2, groups).epoch_order(1).tolist() == expected


@pytest.mark.parametrize("window", [1, 2, 4, 5])
def test_an_epoch_holds_each_image_once_and_a_window_only_its_groups(window: int) -> None:
    order = order_of(window)
    seen = []
    for epoch in (1, 2, 3):
        images = order.epoch_order(epoch)
        assert sorted(images.tolist()) == list(range(24))
        by_group = permutation(3, epoch, 6, Purpose.SHARDS)
        start = 0
        for chosen in by_group.split(window):
            size = int(sum((group == GROUPS).sum() for group in chosen))
            assert set(GROUPS[images[start : start + size]].tolist()) == set(chosen.tolist())
            start += size
        seen.append(images.tolist())
    assert len({tuple(images) for images in seen}) == 3


@pytest.mark.parametrize("window", [6, 7, 1000])
def test_a_window_of_all_groups_shuffles_as_without_groups(window: int) -> None:
    assert torch.equal(order_of(window).epoch_order(2), permutation(3, 2, 24, Purpose.ORDER))


def test_images_in_a_window_are_shuffled_across_its_groups() -> None:
    groups = torch.arange(4).repeat_interleave(500)
    first = groups[order_of(2, groups).epoch_order(1)[:1000]]
    # Of 1000 places, half change the group if both are evenly mixed; 16 is the standard deviation, 1 in a sorted list.
    assert abs(int((first[1:] != first[:-1]).sum()) - 500) < 80


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_each_batch_and_a_cut_order_goes_on(ranks: int) -> None:
    def taken(start: int, **values: Any) -> list[list[int]]:
        return [
            positions.tolist() for _, positions in itertools.islice(order_of(2, **values).batches(start), 20 - start)
        ]

    whole = taken(0)
    parts = [taken(0, rank=rank, world_size=ranks) for rank in range(ranks)]
    for iteration, images in enumerate(whole):
        assert [image for part in parts for image in part[iteration]] == images
    for cut in range(20):
        assert taken(cut) == whole[cut:]


def test_groups_without_an_image_change_nothing_but_their_window() -> None:
    # As where a held-out split takes all of a shard: group 1 is empty, and its place in a window with it.
    groups = torch.tensor([0, 0, 2, 2, 2])
    assert sorted(order_of(1, groups).epoch_order(1).tolist()) == [0, 1, 2, 3, 4]


def test_groups_are_announced_once_an_epoch_before_they_are_needed() -> None:
    groups = torch.arange(40).repeat_interleave(10)
    order = order_of(4, groups, batch_size=5)
    announced = list(itertools.islice(order.announcements(0), 160))
    needed = [set(groups[positions].tolist()) for _, positions in itertools.islice(order.batches(0), 160)]
    assert max(map(len, announced)) <= 2
    for epoch in (announced[:80], announced[80:]):
        assert sorted(group for part in epoch for group in part) == list(range(40))
    late = 0
    told: set[int] = set()
    for soon, now in zip(announced[:80], needed[:80], strict=True):
        late += len(now - told)
        told |= set(soon)
        # No more than two windows ahead of what is being read.
        assert len(told) <= 4 * (1 + len(set().union(*needed[: needed.index(now) + 1]))) + 4
    # Only in the first batches of an epoch, which nothing comes before.
    assert late <= 8
    # Cut in the middle of an epoch, the window that is being read is announced again.
    again = list(itertools.islice(order.announcements(40), 40))
    assert set(order._group_order(1)[20:].tolist()) <= {group for part in again for group in part}


# The same pictures as in folders.


def test_shards_give_what_folders_give(root: Path, picture_folder: Path) -> None:
    in_shards, in_folders = shard_config(root), folder_config(picture_folder, **{"data.image_size": 16})
    found, expected = load_data(in_shards, Ranks()), load_data(in_folders, Ranks())
    assert found.classes == expected.classes == ("dark", "light")
    one, other = (build_eval_loader(in_shards, data, "test", CPU, Ranks()) for data in (found, expected))
    for batch, like in zip(one, other, strict=True):
        assert same(batch, like)
    # All 8 shards are in one window of 16.
    for batch, like in zip(batches(in_shards, 10), batches(in_folders, 10), strict=True):
        assert same(batch, like)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_small_window_takes_another_order_of_the_same_pictures(root: Path, in_memory: bool) -> None:
    config = shard_config(root, **{"data.shuffle_shards": 2, "data.in_memory": in_memory})
    epoch = batches(config, 5)
    data = load_data(config, Ranks())
    assert isinstance(data.splits["train"], Images if in_memory else ImageFiles)
    indices = torch.cat([batch.indices for batch in epoch])
    assert indices.sort().values.tolist() == list(range(40))
    assert torch.equal(torch.cat([batch.labels for batch in epoch]), indices // 20)
    by_shard = permutation(config.seed, 1, 8, Purpose.SHARDS).view(4, 2)
    for part, two in zip((indices // 5).split(10), by_shard, strict=True):
        assert set(part.tolist()) == set(two.tolist())
    # In memory or not, the order is the same.
    other = shard_config(root, **{"data.shuffle_shards": 2, "data.in_memory": not in_memory})
    assert all(same(*pair) for pair in zip(epoch, batches(other, 5), strict=True))


@pytest.mark.parametrize("crops", [False, True])
def test_workers_and_ranks_change_no_batch(root: Path, crops: bool) -> None:
    values = {"data.shuffle_shards": 2, "augment.random_resized_crop": crops}
    config = shard_config(root, **values)
    alone = batches(config, 7)
    in_workers = batches(shard_config(root, **values, **{"data.workers": 2}), 7)
    assert all(same(*pair) for pair in zip(alone, in_workers, strict=True))
    halves = [batches(config, 7, Ranks(rank=rank, world_size=2)) for rank in range(2)]
    for batch, one, two in zip(alone, *halves, strict=True):
        for name in ("images", "labels", "indices"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(one, name), getattr(two, name)]))
    assert all(same(*pair) for pair in zip(alone[3:], batches(config, 4, start=3), strict=True))


def test_a_part_of_the_pictures_is_the_part_that_folders_give(root: Path, picture_folder: Path) -> None:
    values = {"data.val_size": 7, "data.train_size": 30, "data.test_size": 5, "data.image_size": 16}
    (root / "test").rename(root / "val")
    found = load_data(shard_config(root, **values), Ranks())
    expected = load_data(folder_config(picture_folder, **values), Ranks())
    assert list(found.splits) == ["train", "val", "test"]
    for name, split in expected.splits.items():
        assert torch.equal(found.splits[name].indices, split.indices)
        assert torch.equal(found.splits[name].load(torch.arange(5)), split.load(torch.arange(5)))
    assert found.shards is not None
    assert torch.equal(found.shards, found.splits["train"].indices // 5)
    with pytest.raises(ConfigError, match=r"data\.train_size: 41, but there are only 40"):
        load_data(shard_config(root, **{"data.train_size": 41}), Ranks())


# How they are read.


def test_few_shards_are_read_at_a_time_and_in_order(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    real = OpenFiles.read

    def noted(self: OpenFiles, file: int, offset: int, size: int) -> bytes:
        reads.append((file, offset))
        return real(self, file, offset, size)

    monkeypatch.setattr(OpenFiles, "read", noted)
    values = {"data.shuffle_shards": 2, "train.batch_size": 5, "data.in_memory": False}
    batches(shard_config(root, **values), 8)
    # Two batches of 5 are a window of two shards of 5: each batch one pass over it.
    assert len(reads) == 40
    for window in (reads[start : start + 10] for start in range(0, 40, 10)):
        assert len({file for file, _ in window}) == 2
        assert len(set(window)) == 10
    for batch in (reads[start : start + 5] for start in range(0, 40, 5)):
        assert batch == sorted(batch)


def test_what_is_announced_is_read_ahead_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, advised = shard_config(root, **{"data.shuffle_shards": 2, "data.in_memory": False}), []
    files = index_shards(root, "train").paths.files
    loader = build_train_loader(config, load_data(config, Ranks()), CPU, Ranks())

    def noted(descriptor: int, start: int, length: int, advice: int) -> None:
        advised.append((os.readlink(f"/proc/self/fd/{descriptor}"), start, length, advice))

    monkeypatch.setattr(os, "posix_fadvise", noted)
    list(itertools.islice(loader, 5))
    assert sorted(advised) == [(path, 0, 0, os.POSIX_FADV_WILLNEED) for path in files.paths]
    # Where two would not fit into an eighth of the memory, one is asked for.
    memory = {"SC_PHYS_PAGES": 12 * files.sizes[0], "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    advised.clear()
    files.read_ahead([3, 4])
    assert [path for path, *_ in advised] == [files.paths[3]]


def test_no_more_files_are_open_than_are_allowed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> list[str]:
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return [os.readlink(link) for link in links if os.path.islink(link) and os.readlink(link).endswith(".tar")]

    monkeypatch.setattr(shards, "_OPEN", 3)
    files = ImageFiles(index_shards(root, "train").paths, torch.zeros(40), torch.arange(40), 16)
    assert opened() == []
    for _ in range(2):
        files.load(torch.arange(40))
        assert len(opened()) == 3
    del files
    assert opened() == []


# A run.


def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path: Path, root: Path) -> None:
    values = on(root, "checkpoint.every_iterations=2", "train.epochs=2", "evaluation.every=2")
    assert train_tiny(tmp_path / "whole", *values) == 0
    patch = lambda: at_iteration(8, lambda engine: os._exit(9))  # noqa: E731
    assert Command(tmp_path / "cut", *values, patch=patch).wait().code == 9
    # Cut in the second epoch, continued with workers.
    assert train_tiny(tmp_path / "cut", *values, "data.workers=2", resume=True) == 0
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_two_ranks_see_what_one_sees(tmp_path: Path, root: Path) -> None:
    def note(engine: Any) -> None:
        with (tmp_path / f"{idist.get_world_size()}-{rank()}").open("a") as file:
            file.write(json.dumps(engine.state.batch.indices.tolist()) + "\n")

    for ranks in (1, 2):
        command = Command(
            tmp_path / f"run{ranks}",
            *on(root, "train.epochs=2", "evaluation.every=2"),
            ranks=ranks,
            patch=lambda: at_iteration(None, note),
        )
        assert command.wait().code == 0
    alone, first, second = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("1-0", "2-0", "2-1")
    )
    assert len(alone) == 10
    assert [one + two for one, two in zip(first, second, strict=True)] == alone


def test_a_resumed_run_keeps_its_window(tmp_path: Path, root: Path) -> None:
    assert train_tiny(tmp_path / "run", *on(root, "train.epochs=1")) == 0
    with pytest.raises(RunFolderError, match=r"data\.shuffle_shards 2 -> 3"):
        train_tiny(tmp_path / "run", *on(root, "train.epochs=2", "data.shuffle_shards=3"), resume=True)


def test_other_shards_are_other_data(tmp_path: Path, root: Path, picture_folder: Path) -> None:
    assert train_tiny(tmp_path / "run", *on(root, "train.epochs=1")) == 0
    # The same names and numbers of images; in other shards.
    shutil.rmtree(root)
    pack(picture_folder, root, each=6)
    with pytest.raises(
        RunFolderError, match=r"the data has changed: train was 40 images, sha256 of shards \w+, and is 40"
    ):
        train_tiny(tmp_path / "run", *on(root, "train.epochs=2"), resume=True)


# What is wrong with shards.


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
        (lambda path: path.unlink(), r"shards\.json: No such file"),
        (lambda path: path.write_text('{"format": 1, "cla'), r"shards\.json: Invalid JSON"),
        (lambda path: path.write_text("[]"), r"shards\.json: .*object"),
        (lambda path: edit(path, lambda c: c.update(format=2)), r"shards\.json: format: Input should be 1"),
        (lambda path: edit(path, lambda c: c.pop("classes")), r"shards\.json: classes: Field required"),
        (lambda path: edit(path, lambda c: c.update(classes=["a", "a"])), r"shards\.json: classes: 'a' stands there 2"),
        (lambda path: edit(path, lambda c: c.update(shards=[])), r"shards\.json: shards: Tuple should have at least 1"),
        (
            lambda path: edit(path, lambda c: c["shards"].append(c["shards"][0])),
            r"shards: '000000\.tar' stands there 2",
        ),
        (lambda path: edit(path, lambda c: first_shard(c).pop("bytes")), r"shards\.json: shards\.0\.bytes: Field req"),
        (lambda path: edit(path, lambda c: first_shard(c).update(bytes="9")), r"shards\.json: shards\.0\.bytes: .*int"),
        (lambda path: edit(path, lambda c: first_shard(c).update(name="../0.tar")), r"shards\.json: shards\.0\.name"),
        (lambda path: edit(path, lambda c: c["shards"].reverse()), r"000007\.tar:00000035\.\w+: where 00000000\.cls"),
        (lambda path: edit(path, lambda c: first_shard(c).update(images=6)), r"000000\.tar: holds 5 images, .* has 6"),
        (lambda path: (path.parent / "000003.tar").unlink(), r"000003\.tar: No such file .*; shards\.json lists it"),
        (lambda path: os.truncate(path.parent / "000003.tar", 512), r"000003\.tar: cut short: 512 bytes, where"),
        (lambda path: os.truncate(path.parent / "000003.tar", 10**6), r"000003\.tar: too long: 1000000 bytes, where"),
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
        ([("txt", b"", b"0")], r":00000000\.txt: where 00000000\.cls and its picture"),
        ([("cls", b"0", b"0")], r":00000000\.cls: where 00000000\.cls and its picture"),
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
    real = shards._walk

    def noted(*given: Any) -> Any:
        walks.append(given)
        return real(*given)

    monkeypatch.setattr(shards, "_walk", noted)
    monkeypatch.setattr(shards, "_WORTH_KEEPING", 40)
    first = index_shards(root, "train")
    # Young shards may change within a tick of the clock.
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(shards, "SETTLED_S", -1.0)
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
