"""The list of a folder's pictures: what it holds, when it is read back, and when it is not believed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from resnext_ignite.data.sources import disk_cache, folders
from resnext_ignite.data.sources.folders import ImageIndex, index_images
from resnext_ignite.data.sources.paths import Paths

NAMES = ["a/1.jpg", "a/with space.jpg", "b/\u00e4\u6f22.png", "b/\udcff.png", "c/" + "long" * 50 + ".jpg"]


def test_paths_are_the_list_that_they_stand_for() -> None:
    paths = Paths.of(NAMES, "/root/train")
    expected = [f"/root/train/{name}" for name in NAMES]
    assert list(paths) == expected
    assert paths[-1] == expected[-1]
    assert paths[1:4] == expected[1:4]
    assert paths[::2] == expected[::2]
    with pytest.raises(IndexError):
        paths[5]
    some = paths.take(np.array([4, 0, 2]))
    assert list(some) == [expected[4], expected[0], expected[2]]
    assert list(some.take(np.array([2, 1]))) == [expected[2], expected[0]]
    assert some.letters is paths.letters
    assert len(Paths.of([])) == 0


def test_the_digest_is_that_of_the_names() -> None:
    paths = Paths.of(NAMES, "elsewhere")
    assert paths.digest() == hashlib.sha256(os.fsencode("\n".join(NAMES))).hexdigest()
    some = paths.take(np.array([3, 1]))
    assert some.digest() == hashlib.sha256(os.fsencode(f"{NAMES[3]}\n{NAMES[1]}")).hexdigest()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of 4, 3 and 2 empty files, large enough to be kept, and unchanged for a minute."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "_WORTH_KEEPING", 5)
    monkeypatch.setattr(disk_cache, "time", Clock())
    for number, name in enumerate("abc"):
        folder = tmp_path / "data/train" / name
        folder.mkdir(parents=True)
        for file in range(4 - number):
            (folder / f"{file}.jpg").touch()
        (folder / "notes.txt").touch()
    return tmp_path / "data"


class Clock:
    """The index's: some seconds ahead of the folders'."""

    ahead = 60.0

    def time(self) -> float:
        return time.time() + self.ahead


def listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ImageIndex, bool]:
    """The index, and whether the folders were read for it."""
    real, calls = folders._list_files, []

    def noted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "_list_files", noted)
        return index_images(root, "train"), bool(calls)


def cached(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache/resnext_ignite").iterdir()
    return file


def test_a_list_is_read_back_until_something_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, read = listed(root, monkeypatch)
    assert read
    assert first.classes == ("a", "b", "c")
    assert first.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert first.paths[4] == str(root / "train/b/0.jpg")
    again, read = listed(root, monkeypatch)
    assert not read
    assert list(again.paths) == list(first.paths)
    assert again.labels.tolist() == first.labels.tolist()

    train = root / "train"

    def add_a_class() -> None:
        (train / "d").mkdir()
        (train / "d/0.jpg").touch()

    changes: dict[str, Callable[[], object]] = {
        "a file more": (train / "b/9.jpg").touch,
        "a file less": (train / "a/0.jpg").unlink,
        "another name": lambda: (train / "c/0.jpg").rename(train / "c/00.jpg"),
        "a class more": add_a_class,
        "a class of another name": lambda: (train / "d").rename(train / "e"),
    }
    for change, make in changes.items():
        make()
        # Young, the list is not kept.
        monkeypatch.setattr(Clock, "ahead", 0.0)
        expected = sorted(str(path) for path in train.glob("*/*.jpg"))
        for _ in range(2):
            found, read = listed(root, monkeypatch)
            assert read, change
            assert list(found.paths) == expected, change
        monkeypatch.setattr(Clock, "ahead", 60.0)
        assert listed(root, monkeypatch)[1], change
        found, read = listed(root, monkeypatch)
        assert not read, change
        assert list(found.paths) == expected, change


def test_a_time_that_was_set_back_deceives_nobody(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed(root, monkeypatch)
    folder = root / "train/a"
    before = folder.stat().st_mtime_ns
    (folder / "0.jpg").rename(folder / "zzz.jpg")
    os.utime(folder, ns=(before, before))
    found, read = listed(root, monkeypatch)
    assert read
    assert found.paths[3] == str(folder / "zzz.jpg")


@pytest.mark.parametrize("home", [None, "cache"])
def test_without_a_home_nothing_is_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    if home is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", home)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert listed(root, monkeypatch)[1]
    assert len(listed(root, monkeypatch)[0].labels) == 9
    # Neither in the cache nor in the current folder.
    assert listed(root, monkeypatch)[1]
    assert os.listdir() == []


def test_where_the_cache_cannot_be_written_nothing_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError("read-only")))
    assert listed(root, monkeypatch)[1]
    assert len(listed(root, monkeypatch)[0].labels) == 9


def test_a_moved_folder_and_a_class_of_the_same_name_are_listed_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(root, monkeypatch)
    other = tmp_path / "other"
    root.rename(other)
    found, read = listed(other, monkeypatch)
    assert read
    assert found.paths[0] == str(other / "train/a/0.jpg")
    # The same name and the same time, but another folder.
    times = (other / "train/c").stat().st_mtime_ns
    (other / "train/c").rename(tmp_path / "gone")
    (other / "train/c").mkdir()
    (other / "train/c/new.jpg").touch()
    os.utime(other / "train/c", ns=(times, times))
    assert listed(other, monkeypatch)[0].paths[-1] == str(other / "train/c/new.jpg")


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "a count", "a letter"])
def test_a_damaged_cache_is_not_believed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    first, _ = listed(root, monkeypatch)
    file = cached(tmp_path)
    content = file.read_bytes()
    if damage in ("a count", "a letter"):
        array = load_file(file)["counts" if damage == "a count" else "letters"].tobytes()
        place = content.index(array)
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    else:
        content = {"cut": content[: len(content) // 2], "empty": b"", "noise": b"\x00\x01" * 50}[damage]
    file.write_bytes(content)
    again, read = listed(root, monkeypatch)
    assert read
    assert list(again.paths) == list(first.paths)
    assert again.labels.tolist() == first.labels.tolist()


def test_small_folders_and_unwritable_homes_are_left_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_WORTH_KEEPING", 10)
    listed(root, monkeypatch)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(folders, "_WORTH_KEEPING", 5)
    (tmp_path / "cache").write_text("not a folder")
    assert listed(root, monkeypatch)[1]
    assert len(listed(root, monkeypatch)[0].labels) == 9
