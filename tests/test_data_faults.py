"""Faults injected for real into the data of runs: each ends the run with a line that names it, or is left out."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import resource
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import Command, Outcome, at_iteration, digest, fill, rank, small_disk, train_tiny
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_data import folder_config, md5, write_cifar
from torch import nn

from resnext_ignite.data import build_train_loader, load_data
from resnext_ignite.data.images import UNREADABLE
from resnext_ignite.data.reading import decoding, workers
from resnext_ignite.data.sampling import Purpose, permutation
from resnext_ignite.data.sources import cifar
from resnext_ignite.data.sources.cifar import prepare_cifar
from resnext_ignite.data.sources.folders import index_images
from resnext_ignite.data.sources.shards.listing import read_shard_list
from resnext_ignite.data.sources.shards.tar import Tar
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runs.folder import RunFolder
from resnext_ignite.runtime.errors import ConfigError, DataError, as_resnext_error
from resnext_ignite.training.engines import create_trainer

IN_MEMORY = ["data.in_memory=true"]
AS_FILES = ["data.in_memory=false", "data.workers=0"]
IN_WORKERS = ["data.in_memory=false", "data.workers=2"]
PROMISED_S = 10


def on(root: Path, *values: str) -> list[str]:
    """Overrides of a tiny run on a folder: 3 epochs of 5 batches of 8."""
    sizes = ["data.train_size=null", "data.test_size=null", "train.batch_size=8"]
    return ["data.name=imagefolder", f"data.root={root}", *sizes, *values]


@pytest.fixture
def root(tmp_path: Path, picture_folder: Path) -> Path:
    """A folder of 40 and 12 pictures to break."""
    return Path(shutil.copytree(picture_folder, tmp_path / "pictures"))


def cut_jpeg(path: Path) -> None:
    Image.linear_gradient("L").save(path, "jpeg")
    path.write_bytes(path.read_bytes()[:-400])


def bomb(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(60001) * 50)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


# How a picture cannot be read; the file is gone when one is called.
FAULTS: dict[str, Callable[[Path], object]] = {
    "empty": Path.touch,
    "cut": cut_jpeg,
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "bomb": bomb,
    "text": lambda path: path.write_text("404 Not Found"),
    "link": lambda path: path.symlink_to("nowhere.png"),
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
}


def damage(path: Path, fault: str) -> Path:
    path.unlink()
    FAULTS[fault](path)
    return path


def assert_one_line(outcome: Outcome, line: str) -> None:
    assert outcome.code == 3, outcome.stderr
    assert len(outcome.errors) == 1, outcome.stderr
    assert outcome.errors[0].startswith(f"error: {line}")
    assert "Traceback" not in outcome.stderr
    assert "Thread" not in outcome.stderr
    assert outcome.left == []
    assert outcome.seconds < PROMISED_S


@pytest.mark.parametrize("fault", FAULTS)
def test_a_picture_that_cannot_be_read_ends_the_run(tmp_path: Path, root: Path, fault: str) -> None:
    path = damage(root / "train/light/07.png", fault)
    for number, way in enumerate((IN_MEMORY, AS_FILES, IN_WORKERS)):
        # The first batch is the whole split, and there is no evaluation before it.
        values = on(root, *way, "train.batch_size=40", "evaluation.early=[]")
        assert_one_line(Command(tmp_path / f"run{number}", *values).wait(), f"{path}: ")


def drop_roots_rights() -> None:
    """Without its capabilities the owner of a file that nobody may read cannot read it."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective set.
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0


def test_a_picture_without_read_permission_is_named(tmp_path: Path, root: Path) -> None:
    path = root / "train/light/07.png"
    path.chmod(0)
    outcome = Command(tmp_path / "run", *on(root, *IN_MEMORY), patch=drop_roots_rights).wait()
    assert_one_line(outcome, f"{path}: cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda root: (root / "train/none").mkdir(), "train/none: a class without an image"),
        (
            lambda root: (root / "train/far").symlink_to("/nowhere"),
            "train/far: a link to /nowhere, which does not exist; remove it",
        ),
        (lambda root: (root / "test/cat").mkdir(), "test/cat: not a class of the training images"),
    ],
    ids=["empty", "dangling", "unknown"],
)
def test_a_class_that_cannot_be_is_named(
    tmp_path: Path, root: Path, change: Callable[[Path], object], line: str
) -> None:
    change(root)
    assert_one_line(Command(tmp_path / "run", *on(root)).wait(), f"{root}/{line}")


@pytest.mark.parametrize("way", [IN_MEMORY, IN_WORKERS], ids=["memory", "workers"])
def test_an_evaluation_never_skips(tmp_path: Path, root: Path, way: list[str]) -> None:
    path = damage(root / "test/light/03.png", "cut")
    outcome = Command(tmp_path / "run", *on(root, *way, "data.on_error=skip")).wait()
    assert_one_line(outcome, f"{path}: cannot be read: ")
    # It is met before training.
    assert "iteration 1 " not in outcome.stderr


# Of 40 pictures an epoch of 3 batches of 12 leaves out 4.
SKIP = ["data.on_error=skip", "train.batch_size=12", "logging.every_iterations=1"]


BROKEN = [0, 3, 9, 14, 21, 26, 33, 38]


def picture(root: Path, index: int) -> Path:
    return root / "train" / ("dark", "light")[index // 20] / f"{index % 20:02}.png"


def break_in_every_way(root: Path, turn: int = 0) -> None:
    """Break the pictures of BROKEN, the first in the `turn`th way."""
    for number, index in enumerate(BROKEN):
        damage(picture(root, index), list(FAULTS)[(number + turn) % len(FAULTS)])


def broken_by_batch() -> list[list[int]]:
    """Of each epoch, how many broken pictures each batch of 12 has."""
    orders = [permutation(1, epoch, 40, Purpose.ORDER).tolist() for epoch in (1, 2, 3)]
    return [[len(set(BROKEN) & set(order[start : start + 12])) for start in (0, 12, 24)] for order in orders]


def skipped(folder: Path) -> list[int]:
    return [record["skipped_images"] for record in RunFolder(folder).read_metrics()]


def test_what_cannot_be_read_is_counted_and_has_no_influence(tmp_path: Path, picture_folder: Path) -> None:
    per_epoch = [sum(batches) for batches in broken_by_batch()]
    # Not all are seen in every epoch.
    assert max(per_epoch) <= len(BROKEN) > min(per_epoch)
    digests = []
    for number, way in enumerate((IN_MEMORY, AS_FILES, IN_WORKERS)):
        # Each time it is other garbage that stands in the same places.
        root = Path(shutil.copytree(picture_folder, tmp_path / f"pictures{number}"))
        break_in_every_way(root, turn=number)
        outcome = Command(tmp_path / f"run{number}", *on(root, *SKIP, *way)).wait()
        assert outcome.code == 0, outcome.stderr
        assert skipped(tmp_path / f"run{number}") == [0, *per_epoch]
        warned = [line.split(": ")[1] for line in outcome.stderr.splitlines() if line.startswith("skipped: ")]
        assert sorted(warned) == [str(picture(root, index)) for index in BROKEN]
        digests.append(digest(tmp_path / f"run{number}"))
    assert digests[0] == digests[1] == digests[2]


def test_ranks_and_a_resume_skip_and_count_the_same(tmp_path: Path, root: Path) -> None:
    break_in_every_way(root)
    batches = broken_by_batch()
    assert 0 < sum(batches[1][:2]) < sum(batches[1])
    values = on(root, *SKIP, *AS_FILES)

    def cut() -> None:
        # After two of the second epoch's three batches.
        at_iteration(5, lambda engine: os.kill(os.getpid(), signal.SIGTERM) if rank() == 1 else None)

    outcome = Command(tmp_path / "run", *values, ranks=2, patch=cut).wait()
    assert (outcome.code, outcome.left) == (75, []), outcome.stderr
    outcome = Command(tmp_path / "run", *values, ranks=2, resume=True).wait()
    assert outcome.code == 0, outcome.stderr
    assert skipped(tmp_path / "run") == [0, *map(sum, batches)]
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("skipped: ")]
    # Once a rank.
    assert max(map(lines.count, lines)) <= 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_more_than_the_allowed_ends_the_run(tmp_path: Path, root: Path, ranks: int) -> None:
    break_in_every_way(root)
    first = list(itertools.accumulate(broken_by_batch()[0]))
    limit = first[0]
    # Ranks meet after each iteration, and the second one's pictures are too many.
    assert first[1] > limit
    values = on(root, *SKIP, *AS_FILES, f"data.max_skipped={limit}")
    line = f"{first[1]} training images of this epoch cannot be read, more than data.max_skipped {limit}; "
    assert_one_line(Command(tmp_path / "run", *values, ranks=ranks).wait(), line)
    # As many as are allowed are no error.
    enough = f"data.max_skipped={first[-1]}"
    assert Command(tmp_path / "enough", *values, enough, "train.epochs=1", ranks=ranks).wait().code == 0


def test_a_batch_that_cannot_be_read_at_all_is_no_nan(tmp_path: Path, root: Path) -> None:
    # The first batch, of which TensorBoard shows a sheet too.
    for index in permutation(1, 1, 40, Purpose.ORDER)[:8].tolist():
        damage(picture(root, index), "text")
    values = on(root, "data.on_error=skip", *AS_FILES, "logging.every_iterations=1", "train.epochs=1")
    values += ["train.label_smoothing=0.1", "logging.tensorboard=true", "logging.images=8"]
    assert train_tiny(tmp_path / "run", *values) == 0
    assert skipped(tmp_path / "run") == [0, 8]
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Images("train/augmented")] == [1]
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses[0] == 0
    assert all(0 < loss < 100 for loss in losses[1:])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pictures_that_cannot_be_read_add_nothing_to_the_loss(root: Path, smoothing: float) -> None:
    config = folder_config(root, **{"data.image_size": 8, "data.on_error": "skip", "data.in_memory": False})
    clean = next(iter(build_train_loader(config, load_data(config, Ranks()), torch.device("cpu"), Ranks())))
    damage(picture(root, int(clean.indices[3])), "cut")
    batch = next(iter(build_train_loader(config, load_data(config, Ranks()), torch.device("cpu"), Ranks())))
    others = [place for place in range(8) if place != 3]
    assert torch.equal(batch.images[others], clean.images[others])
    assert batch.labels.tolist() == [UNREADABLE if place == 3 else int(clean.labels[place]) for place in range(8)]

    torch.manual_seed(0)
    linear = nn.Linear(3 * 8 * 8, 2)
    model = nn.Sequential(nn.Flatten(), linear)
    weight = linear.weight.detach().clone().requires_grad_()
    logits = clean.images[others].flatten(1) @ weight.T + linear.bias.detach()
    # -log of the true class's probability and, smoothed, of both alike.
    losses = -logits.log_softmax(1)
    true = losses[range(7), clean.labels[others]]
    expected = ((1 - smoothing) * true + smoothing * losses.mean(1)).sum() / 8
    expected.backward()
    trainer = create_trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        torch.device("cpu"),
        label_smoothing=smoothing,
        skip_unreadable=True,
    )
    trainer.run([batch], max_epochs=1)
    loss, _, images, unreadable, *_ = trainer.state.sums.read_and_reset().tolist()
    assert (images, unreadable) == (7, 1)
    assert loss / images == pytest.approx(expected.item() * 8 / 7, rel=1e-6)
    assert weight.grad is not None
    torch.testing.assert_close(linear.weight, weight.detach() - weight.grad)


CIFAR = [
    "data.name=cifar10",
    "data.download=false",
    "data.train_size=null",
    "data.test_size=null",
    "train.batch_size=4",
    "train.epochs=1",
]


@pytest.mark.parametrize("fault", ["batch", "archive", "half"])
def test_damaged_cifar_ends_the_run_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    dataset = torchvision.datasets.CIFAR10
    path, _ = write_cifar(tmp_path, dataset, monkeypatch)
    expected = dataset.tgz_md5
    if fault == "batch":
        load_data(folder_config(tmp_path, **{"data.name": "cifar10"}), Ranks())
        path, expected = tmp_path / "cifar-10-batches-py/data_batch_3", dataset.train_list[2][1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if fault == "half" else content)
    outcome = Command(tmp_path / "run", *CIFAR, f"data.root={tmp_path}").wait()
    assert_one_line(outcome, f"{path}: md5 is {md5(path)}, not {expected}; ")
    assert "epoch" not in outcome.stderr


def test_cifar_files_that_are_gone_are_unpacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, torchvision.datasets.CIFAR10, monkeypatch)
    values = [*CIFAR, f"data.root={tmp_path}"]
    assert train_tiny(tmp_path / "run", *values) == 0
    folder = tmp_path / "cifar-10-batches-py"
    before = {path.name: md5(path) for path in folder.iterdir()}
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).unlink()
    assert train_tiny(tmp_path / "again", *values) == 0
    assert {path.name: md5(path) for path in folder.iterdir()} == before
    assert digest(tmp_path / "again") == digest(tmp_path / "run")


def test_no_room_to_unpack_cifar_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", 200_000) as disk:
        write_cifar(disk, torchvision.datasets.CIFAR10, monkeypatch)
        fill(disk)
        outcome = Command(tmp_path / "run", *CIFAR, f"data.root={disk}").wait()
    assert outcome.code == 6
    assert outcome.errors == [f"error: {disk}: No space left on device; free some space or choose another data.root"]


def test_too_many_open_files_between_workers_is_a_line(tmp_path: Path, root: Path) -> None:
    # From few for the workers to start with, to enough for all.
    codes = []
    for limit in range(24, 200, 8):
        folder = tmp_path / str(limit)

        def patch(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

        values = on(root, "data.in_memory=false", "data.workers=4", "train.epochs=1", "data.image_size=24")
        outcome = Command(folder, *values, patch=patch).wait()
        codes.append(outcome.code)
        if outcome.code == 0:
            break
        assert outcome.code in (3, 6), outcome.stderr
        (line,) = outcome.errors
        assert "open files" in line
        assert "data.workers" in line
        assert outcome.left == []
        if (folder / "status.json").exists():
            assert RunFolder(folder).read_status()["state"] == "failed"
    assert codes[-1] == 0
    assert 3 in codes


def test_a_picture_is_not_skipped_for_want_of_a_descriptor(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, *arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr(decoding, "_file", full)
    values = {"data.on_error": "skip", "data.in_memory": True}
    with pytest.raises(DataError, match="Too many open files; raise `ulimit -n`"):
        load_data(folder_config(root, **values), Ranks())


def test_cifar_on_a_file_system_without_locks_is_an_error_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(DataError, match=f"{tmp_path}: No locks available"):
        prepare_cifar("cifar10", tmp_path, download=False)


@pytest.mark.parametrize("name", ["ESTALE", "EIO", "ESHUTDOWN", "ENOTCONN"])
def test_an_error_of_the_datas_storage_is_one_of_the_data(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(errno, name)
    is_dir = os.path.exists

    def gone(path: str) -> bool:
        if str(path).startswith(str(root)):
            raise OSError(number, os.strerror(number), path)
        return is_dir(path)

    (root / "train/link").symlink_to(root / "train/dark")
    monkeypatch.setattr(os.path, "exists", gone)
    with pytest.raises(DataError, match=f"{root}.*: {os.strerror(number)}; check that it is there"):
        load_data(folder_config(root), Ranks())


def test_no_memory_is_a_line() -> None:
    for hungry in (lambda: torch.empty(2**50), lambda: bytearray(2**60), lambda: np.empty(2**60, np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            hungry()
        known = as_resnext_error(caught.value)
        assert isinstance(known, ConfigError)
        assert str(known).startswith("out of memory")
        assert "lower train.batch_size or evaluation.batch_size" in str(known)
    assert as_resnext_error(RuntimeError("shape mismatch")) is None


@pytest.mark.parametrize(
    ("opened", "owner", "name"),
    [
        (lambda folder: index_images(folder, "train"), os, "scandir"),
        (lambda folder: read_shard_list(folder / "shards.json"), Path, "read_bytes"),
        (lambda folder: cifar._check(folder / "data_batch_1", ""), Path, "open"),
        (lambda folder: Tar(folder / "000.tar"), Path, "open"),
    ],
    ids=["folder", "shard list", "archive", "shard"],
)
def test_too_many_open_files_are_never_blamed_on_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[[Path], object], owner: object, name: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(DataError, match=r"Too many open files; raise `ulimit -n` or lower data\.workers$"):
        opened(tmp_path)


def test_too_many_open_files_are_not_a_full_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> None:
        raise RuntimeError("unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files")

    monkeypatch.setattr(workers, "get_worker_info", object)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", refuse)
    with pytest.raises(
        DataError, match=r"^data workers: Too many open files; raise `ulimit -n` or lower data\.workers$"
    ):
        workers.allocate_batch(2, 8, 8, 3)
