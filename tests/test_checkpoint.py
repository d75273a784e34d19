"""The checkpoint file: nothing damaged is ever loaded, nothing good is lost, nothing hostile is run."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Payload

import resnext_ignite
from resnext_ignite.runs import checkpoint
from resnext_ignite.runs.checkpoint import (
    checksum_path,
    find_checkpoint,
    iteration_checkpoints,
    load_checkpoint,
    load_model,
    newest_resume_point,
    save_checkpoint,
    verify_checkpoint,
)
from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.runtime.storage import replace_durably

STATE: dict[str, Any] = {"model": {"w": torch.arange(200.0)}, "config": {"seed": 1}}


def test_a_state_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, STATE)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["w"], STATE["model"]["w"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "a.pt.sha256"]
    # In sha256sum's own format.
    assert checksum_path(path).read_text() == f"{checkpoint.sha256_of(path)}  a.pt\n"


@pytest.mark.parametrize("with_sum", [True, False])
def test_damage_is_always_found(tmp_path: Path, with_sum: bool) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, STATE)
    good = path.read_bytes()
    if not with_sum:
        checksum_path(path).unlink()
    verify_checkpoint(path)
    generator = random.Random(0)
    record = good.find(b"data/0")
    damaged = [b"", *(good[:cut] for cut in generator.sample(range(1, len(good)), 10))]
    for _ in range(50):
        # Without the sum, the archive's CRCs vouch for the records only: flip within the tensor's.
        at = generator.randrange(len(good)) if with_sum else record + 100 + generator.randrange(400)
        damaged.append(good[:at] + bytes([good[at] ^ 1 << generator.randrange(8)]) + good[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            load_checkpoint(path)


def test_the_newest_good_one_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_resume_point(tmp_path / "none") is None
    for iteration in (2, 10, 9):
        save_checkpoint(tmp_path / f"iteration_{iteration:08}.pt", {"at": iteration})
    # File times prove nothing.
    os.utime(tmp_path / "iteration_00000002.pt")
    assert iteration_checkpoints(tmp_path)[0].name == "iteration_00000010.pt"
    newest = tmp_path / "iteration_00000010.pt"
    newest.write_bytes(newest.read_bytes()[:-9])
    logging.getLogger("resnext_ignite").propagate = True
    point = newest_resume_point(tmp_path)
    assert point is not None
    assert point.state["at"] == 9
    assert point.damaged == (newest,)
    assert "iteration_00000010.pt: damaged" in caplog.text
    assert "resuming from" in caplog.text
    for path in iteration_checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        newest_resume_point(tmp_path)


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"save": (torch, "save"), "fsync": (os, "fsync"), "rename": (Path, "replace")}[name]
    monkeypatch.setattr(*target, full)


@pytest.mark.parametrize("step", ["save", "fsync", "rename"])
def test_a_save_that_fails_leaves_the_old_file_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(path, {"at": 1})
    with monkeypatch.context() as patch:
        fail_at(patch, step)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(path, {"at": 2})
    assert load_checkpoint(path)["at"] == 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("travelled", [False, True])
def test_a_crash_between_checksum_and_rename_leaves_the_old_file_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, travelled: bool
) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(path, {"at": 1})
    if travelled:
        # A file that was copied without its checksum.
        checksum_path(path).unlink()
    rename = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if Path(target) == path:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"at": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["at"] == 1
    save_checkpoint(path, {"at": 3})
    assert load_checkpoint(path)["at"] == 3
    assert len(checksum_path(path).read_text().splitlines()) == 1


def test_a_damaged_file_without_a_checksum_gets_none_by_a_save_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(path, STATE)
    checksum_path(path).unlink()
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"at": 2})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_storage_that_lies_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path, **options: "0" * 64)
    with pytest.raises(CheckpointError, match="the storage is failing"):
        save_checkpoint(tmp_path / "a.pt", STATE)
    assert not list(tmp_path.iterdir())


def test_the_steps_of_a_save_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def traced_fsync(descriptor: int) -> None:
        steps.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def traced_rename(self: Path, target: Path) -> Path:
        steps.append("rename " + Path(target).name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(Path, "replace", traced_rename)
    save_checkpoint(tmp_path / "a.pt", STATE)
    folder = f"fsync {tmp_path.name}"
    assert steps == [
        "fsync .a.pt.tmp",
        "fsync .a.pt.sha256.tmp",
        "rename a.pt.sha256",
        folder,
        "rename a.pt",
        folder,
    ]


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_hostile_file_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    path, sentinel = tmp_path / "x.pt", tmp_path / "sentinel"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(sentinel)))
    else:
        torch.save({"format": checkpoint.FORMAT, "x": Payload(sentinel)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not sentinel.exists()


def test_nothing_is_ever_loaded_without_weights_only() -> None:
    source = Path(resnext_ignite.__file__).parent
    calls = ("torch.load(", ".get_state_dict(", "load_state_dict_from_url(")
    lines = [line for path in source.rglob("*.py") for line in path.read_text().splitlines()]
    loads = [line for line in lines if any(call in line for call in calls)]
    assert len(loads) >= 2
    assert all("weights_only=True" in line for line in loads)


def test_a_file_of_another_kind_says_so(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="its format is None"):
        load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(tmp_path / "none.pt")
    save_checkpoint(tmp_path / "y.pt", {"config": {"train": {"epocs": 1}}})
    with pytest.raises(CheckpointError, match="its config is not one of this version"):
        load_model(tmp_path / "y.pt")


def test_a_run_means_final_else_the_newest(finished_run: Path, tmp_path: Path) -> None:
    assert find_checkpoint(finished_run) == finished_run / "checkpoints/final.pt"
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    (copy / "checkpoints/final.pt").unlink()
    assert find_checkpoint(copy) == copy / "checkpoints/iteration_00000012.pt"
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="a run without a checkpoint"):
        find_checkpoint(copy)


def test_a_model_comes_out_of_its_file_alone(finished_run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "model.pt"
    shutil.copy(finished_run / "checkpoints/final.pt", alone)
    model, metadata = load_model(alone)
    assert not model.training
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert metadata.classes[0] == "disk"
    assert (metadata.image_size, metadata.iteration) == (32, 12)
    assert metadata.errors["last"]["images"] == 37
    state = load_checkpoint(alone)
    assert set(state["model"]) == set(model.state_dict())
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in state["model"])


def test_a_durable_replacement_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "status.json"

    def whole(file: Any) -> None:
        file.write(b"old")

    def half(file: Any) -> None:
        file.write(b"ne")
        raise RuntimeError("cut")

    replace_durably(path, whole)
    with pytest.raises(RuntimeError, match="cut"):
        replace_durably(path, half)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
