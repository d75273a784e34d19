"""Pictures in tar shards: the same as in folders, read a few shards at a time; and what is wrong with shards, named."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from conftest import Command, at_iteration, digest, rank, train_tiny
from test_data import folder_config

from resnext_ignite.config.schema import Config
from resnext_ignite.data import build_eval_loader, build_train_loader, load_data
from resnext_ignite.data.images import Images
from resnext_ignite.data.loaders import Batch
from resnext_ignite.data.reading.image_files import ImageFiles
from resnext_ignite.data.sampling import Purpose, permutation
from resnext_ignite.data.sources.shards import index_shards, members
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runtime.errors import ConfigError, RunFolderError

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


def test_shards_that_are_sorted_by_class_are_warned_of(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = "the shards are sorted by class, and the images of only 2 shards are shuffled together"
    batches(shard_config(root, **{"data.shuffle_shards": 8}), 1)
    assert line[:20] not in caplog.text
    batches(shard_config(root, **{"data.shuffle_shards": 2}), 1)
    assert caplog.text.count(line) == 1
    caplog.clear()
    # Two of a class, then two of the other: half of the neighbours are alike, as by chance.
    black = [("png", (root / "train/000000.tar").read_bytes()[512:], b"%d" % (number // 2 % 2)) for number in range(40)]
    (tmp_path / "mixed/train").mkdir(parents=True)
    (tmp_path / "mixed/test").symlink_to(root / "test")
    for number in range(8):
        write_shard(tmp_path / f"mixed/train/{number:06}.tar", 5 * number, black[5 * number :][:5])
    describe(tmp_path / "mixed/train", ["dark", "light"], [5] * 8)
    batches(shard_config(tmp_path / "mixed", **{"data.shuffle_shards": 2}), 1)
    assert caplog.text == ""


# How they are read.


def test_few_shards_are_read_at_a_time_and_in_order(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    real = members.OpenFiles.read

    def noted(self: members.OpenFiles, file: int, offset: int, size: int) -> bytes:
        reads.append((file, offset))
        return real(self, file, offset, size)

    monkeypatch.setattr(members.OpenFiles, "read", noted)
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
    def opened() -> list[Path]:
        links = (Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
        # Of these only: what another test has left in a cycle is closed when that is collected.
        return [link.readlink() for link in links if link.is_symlink() and root in link.readlink().parents]

    monkeypatch.setattr(members, "_OPEN", 3)
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
