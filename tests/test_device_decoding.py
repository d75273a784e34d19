"""JPEG files decoded by a device: on a CPU the whole path runs, and gives what the workers' own decoding gives."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import train_tiny
from PIL import Image
from test_decoding import KINDS, photograph

from resnext_ignite.benchmark import photographs
from resnext_ignite.benchmark.end_to_end import measure_end_to_end
from resnext_ignite.benchmark.setup import Training
from resnext_ignite.benchmark.training import Workload
from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.images import UNREADABLE
from resnext_ignite.data.loaders import Batch, TrainLoader
from resnext_ignite.data.reading import device_decoding
from resnext_ignite.data.reading.decoding import UndecodedJpeg, read_undecoded
from resnext_ignite.data.reading.device_decoding import DeviceDecoding, JpegDecoder, JpegReader, Part, _group_by_pixels
from resnext_ignite.data.reading.image_files import ImageFiles
from resnext_ignite.data.sampling import TrainOrder
from resnext_ignite.data.sources.folders import index_images
from resnext_ignite.runtime.errors import ConfigError, DataError, RunFolderError

CPU = torch.device("cpu")
AUGMENT = Augment(5, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), flip="random", color=0.4)
# At 64 pixels, no crop of a picture of 80 rows is twice as large: the workers decode it whole, too.
# What one of 255 levels is in a normalised image.
LEVEL = 1 / 255 / 0.25
JPEGS = 12


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve plain JPEGs of about 100x80 pixels, and one each of what is none: by index 12 to 17."""
    for label, name in enumerate("ab"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number, kind in enumerate(KINDS):
            picture = photograph(100 + 3 * number, 80 + label, seed=10 * label + number)
            picture.save(tmp_path / "train" / name / f"{number}.jpg", **KINDS[kind])
    others = tmp_path / "train/c"
    others.mkdir()
    picture, exif = photograph(90, 70), Image.Exif()
    exif[0x0112] = 6
    picture.save(others / "0.png")
    picture.convert("L").save(others / "1.jpg")
    picture.convert("CMYK").save(others / "2.jpg")
    picture.save(others / "3.jpg", exif=exif)
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) << 8).save(others / "4.png")
    picture.save(others / "5.jpg")
    (others / "5.jpg").write_bytes((others / "5.jpg").read_bytes() + b"behind its end")
    return tmp_path


def files_of(root: Path, size: int = 64) -> ImageFiles:
    index = index_images(root, "train")
    return ImageFiles(index.paths, index.labels, torch.arange(len(index.labels)), size)


def train_loader(root: Path, decode_on: torch.device | None, size: int = 64, **values: Any) -> TrainLoader:
    files = files_of(root, size)
    order = TrainOrder(seed=5, count=len(files), batch_size=9)
    return TrainLoader(files, order, AUGMENT, CPU, random_resized_crop=True, decode_on=decode_on, **values)


def jpegs_of(files: ImageFiles) -> list[str]:
    return [str(files.paths[position]) for position in range(JPEGS)]


def read(reader: JpegReader) -> tuple[torch.Tensor, list[Part], dict[int, str]]:
    """All files in one batch of the first epoch."""
    batch = reader[1, list(range(len(reader.files))), []]
    assert not isinstance(batch, DataError)
    (content, parts), epoch, _, unreadable = batch
    assert epoch == 1
    return content, parts, unreadable


def epochs(loader: TrainLoader, iterations: int = 4) -> list[Batch]:
    return list(itertools.islice(loader, iterations))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_workers_own(root: Path, workers: int) -> None:
    """The same files, crops, labels and mirrorings; with one decoder behind both ways, the same pixels to the last."""
    ours = epochs(train_loader(root, None))
    for expected, batch in zip(ours, epochs(train_loader(root, CPU, workers=workers)), strict=True):
        assert torch.equal(batch.indices, expected.indices)
        assert torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.images, expected.images)


def test_a_run_goes_on_with_the_same_pictures(root: Path) -> None:
    whole, cut = train_loader(root, CPU), train_loader(root, CPU, workers=2)
    cut.start_iteration = 3
    assert torch.equal(epochs(whole, 5)[3].images, epochs(cut, 1)[0].images)


def test_only_plain_jpegs_are_left_to_the_device(root: Path) -> None:
    files = files_of(root)
    _, parts, unreadable = read(JpegReader(files, 5))
    assert [part.is_jpeg for part in parts] == [True] * JPEGS + [False] * 6
    assert not unreadable
    # A picture takes its own pixels: 64 x 64 of three colours.
    assert [part.length for part in parts[JPEGS:]] == [12288] * 6
    assert [part.length for part in parts[:JPEGS]] == [os.path.getsize(path) for path in jpegs_of(files)]


def test_large_pictures_differ_little_from_those_decoded_at_a_fraction(tmp_path: Path) -> None:
    """The workers decode them at a half, a quarter or an eighth, and smoother; on a device they are decoded whole."""
    (tmp_path / "train/a").mkdir(parents=True)
    for number in range(9):
        photograph(640, 480, number).save(tmp_path / f"train/a/{number}.jpg", quality=90)
    pairs = zip(
        epochs(train_loader(tmp_path, None, size=48), 2), epochs(train_loader(tmp_path, CPU, size=48), 2), strict=True
    )
    for workers, device in pairs:
        levels = (workers.images - device.images).abs() / LEVEL
        # Half a level is measured.
        assert 0 < levels.mean() < 1


def test_the_part_that_is_kept_is_cut_out_of_the_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "x.jpg")
    photograph(60, 50).save(path)
    jpeg = read_undecoded(path, 16, lambda width, height: (10, 5, width, height))
    assert jpeg == UndecodedJpeg(Path(path).read_bytes(), 60, 50, (10, 5, 60, 50))
    # Between pixels, it is resized as PIL does it; of 64 times the size and more, decoded at a fraction.
    assert read_undecoded(path, 16, lambda width, height: (10.5, 5, 50, 50)) is None
    Image.new("RGB", (641, 20)).save(path)
    assert read_undecoded(path, 10, lambda width, height: (0, 0, 640, 20)) is not None
    assert read_undecoded(path, 10, lambda width, height: (0, 0, 641, 20)) is None


def break_jpeg(path: Path, kind: str) -> None:
    content = path.read_bytes()
    # The first quantisation table, of 67 bytes, without which nothing can be decoded: the header is whole without it.
    tables = content.index(b"\xff\xdb")
    broken = {"cut": content[:-400], "empty": b"", "noise": bytes(range(256)), "tables": content[:tables]}
    broken["tables"] += content[content.index(b"\xff\xc0") :]
    path.write_bytes(broken[kind])


@pytest.mark.parametrize("kind", ["cut", "empty", "noise", "tables"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_ends_the_run_or_is_skipped_as_ever(
    root: Path, kind: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    broken = root / "train/a/0.jpg"
    break_jpeg(broken, kind)
    messages = []
    for decode_on in (None, CPU):
        with pytest.raises(DataError) as caught:
            epochs(train_loader(root, decode_on, workers=workers))
        messages.append(str(caught.value))
        # Though the traceback is there still, with all that was at work.
        assert multiprocessing.active_children() == []
    assert messages[0] == messages[1]
    assert messages[1].startswith(f"{broken}: ")
    warnings = []
    skipping = []
    for decode_on in (None, CPU):
        caplog.clear()
        skipping.append(epochs(train_loader(root, decode_on, workers=workers, skip_unreadable=True)))
        warnings.append([record.getMessage() for record in caplog.records])
    assert warnings[0] == warnings[1] == [f"skipped: {messages[0]}"]
    for expected, batch in zip(*skipping, strict=True):
        assert torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.images, expected.images)
    # Two batches of nine are an epoch of 18 pictures: once in each.
    assert sum(int((batch.labels == UNREADABLE).sum()) for batch in skipping[1]) == 2


def test_flipped_bytes_are_forgiven_as_ever(root: Path) -> None:
    """Neither way says a word: a picture in which some blocks are wrong is still a picture."""
    path = root / "train/a/0.jpg"
    content = bytearray(path.read_bytes())
    whole = bytes(content)
    for place in range(len(content) // 2, len(content) - 2, 97):
        content[place] = 0
    path.write_bytes(content)
    pair = [torch.cat([batch.images for batch in epochs(train_loader(root, way), 2)]) for way in (None, CPU)]
    assert torch.equal(*pair)
    path.write_bytes(whole)
    assert not torch.equal(torch.cat([batch.images for batch in epochs(train_loader(root, CPU), 2)]), pair[1])


class Choosy(JpegDecoder):
    """Refuses files of an even number of bytes, and all that come with one: as nvJPEG refuses a list."""

    def decode(self, contents: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        decoded = super().decode(contents)
        return [None if len(content) % 2 == 0 else one for content, one in zip(contents, decoded, strict=True)]


def test_what_the_device_refuses_is_decoded_without_it(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = files_of(root)
    refused = [path for path in jpegs_of(files) if os.path.getsize(path) % 2 == 0]
    assert 1 < len(refused) < JPEGS
    reader, positions = JpegReader(files, 5), torch.arange(len(files))
    content, parts, unreadable = read(reader)
    batches = (((content, parts), 1, positions, unreadable) for _ in range(2))
    for pictures, _, _, reasons in DeviceDecoding(reader, Choosy(CPU)).finished(batches):
        assert torch.equal(pictures, files.read(positions, (5, 1))[0])
        assert not reasons
    assert [record.getMessage() for record in caplog.records] == [
        f"data.decode: the device cannot decode {refused[0]}; the CPU decodes this file and others like it"
    ]


def test_one_bad_file_does_not_spoil_the_others() -> None:
    contents = [torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for data in (b"\xff\xd8nothing", jpeg(8))]
    bad, good = JpegDecoder(CPU).decode(contents)
    assert bad is None
    assert good is not None
    assert good.shape == (3, 6, 8)
    assert JpegDecoder(CPU).decode(contents[:1]) == [None]


def jpeg(width: int) -> bytes:
    file = io.BytesIO()
    photograph(width, 6).save(file, "jpeg")
    return file.getvalue()


def test_so_many_are_decoded_at_once_that_they_fit(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    parts = [Part(9, 100, 10), Part(9), Part(9, 50, 10), Part(9, 60, 10), Part(9, 500, 10), Part(9, 10, 10)]
    monkeypatch.setattr(device_decoding, "_PIXELS_AT_ONCE", 1500)
    # 1000 + 500 pixels, 600, more than all by itself, and the rest.
    assert list(_group_by_pixels(parts)) == [[0, 2], [3], [4], [5]]
    assert list(_group_by_pixels([Part(9)])) == []
    expected = epochs(train_loader(root, None))[0]
    assert torch.equal(epochs(train_loader(root, CPU))[0].images, expected.images)


FOLDER_RUN = ["data.name=imagefolder", "data.train_size=null", "data.test_size=null", "data.workers=0"]
CROPS = "augment.random_resized_crop=true"


def test_a_run_on_a_cpu_is_refused_and_so_is_another_crop(tmp_path: Path, picture_folder: Path) -> None:
    values = [*FOLDER_RUN, f"data.root={picture_folder}", "data.decode=device", "train.device=cpu"]
    with pytest.raises(ConfigError, match=r"^data.decode: device is for GPUs only, and this run is on cpu; set it to"):
        train_tiny(tmp_path / "run", *values, CROPS)
    with pytest.raises(ConfigError, match=r"data\.decode: device needs random-resized crops; set augment\.random"):
        train_tiny(tmp_path / "other", *values)
    assert not (tmp_path / "other").exists()


def test_it_is_part_of_a_runs_identity(tmp_path: Path, picture_folder: Path) -> None:
    values = [*FOLDER_RUN, f"data.root={picture_folder}", CROPS, "train.epochs=1"]
    assert train_tiny(tmp_path / "run", *values) == 0
    with pytest.raises(
        RunFolderError, match=r"would change the run: data\.decode workers -> device; keep the old values"
    ):
        train_tiny(tmp_path / "run", *values, "data.decode=device", resume=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_a_gpu_decodes_to_what_a_cpu_does(root: Path) -> None:
    """Within what libjpeg-turbo's two ways to enlarge halved colours differ by, and a level; the same each time."""
    gpu = torch.device("cuda", 0)
    files = files_of(root)
    contents = [Path(path).read_bytes() for path in jpegs_of(files)]
    encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    for content, there in zip(contents, JpegDecoder(gpu).decode(encoded), strict=True):
        smooth, plain = (simplejpeg.decode_jpeg(content, "RGB", False, fast).astype(int) for fast in (False, True))
        assert there is not None
        assert there.device == gpu
        limit = np.abs(smooth - plain).mean() + 1
        assert np.abs(there.permute(1, 2, 0).cpu().numpy().astype(int) - smooth).mean() < limit
    order = TrainOrder(seed=5, count=len(files), batch_size=9)
    runs = []
    for workers in (0, 2):
        loader = TrainLoader(files, order, AUGMENT, gpu, random_resized_crop=True, decode_on=gpu, workers=workers)
        runs.append([batch.images.cpu() for batch in epochs(loader)])
    for first, again, expected in zip(*runs, epochs(train_loader(root, None)), strict=True):
        assert torch.equal(first, again)
        # A batch of pictures whose ways differ by up to 3.9 levels, with their contrast up to 1.4 times as strong.
        assert ((first - expected.images).abs() / LEVEL).mean() < 5


def photographs_in(folder: Path, count: int) -> Path:
    """A config of a tiny network that is to train on them."""
    for number in range(count):
        photograph(60, 50, number).save(folder / f"{number}.jpg")
    config = folder / "tiny.yaml"
    config.write_text("model: {name: cifar_resnext11_2x8d, stem_channels: 8}\naugment: {crop_padding: 0}\n")
    return config


def test_training_from_files_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(photographs_in(tmp_path, 3), "cifar_resnext11_2x8d", 8, 32, 2)
    monkeypatch.setattr(photographs, "_IMAGES", 16)
    result = measure_end_to_end(tmp_path, work, decoders=("workers",), rounds=2, iterations=2)
    assert result["files"] == 3
    # Of two, the median is the mean: of the seconds that 8 images take.
    ready, files = (np.mean([8 / rate for rate in rates]) for rates in result["samples"].values())
    name = "share of the time that waits for data, workers"
    assert result["ratios"] == {name: pytest.approx(1 - ready / files)}
    with pytest.raises(ConfigError, match="this run is on cpu"):
        measure_end_to_end(tmp_path, work, rounds=1)
    assert multiprocessing.active_children() == []
    with pytest.raises(DataError, match="holds no"):
        measure_end_to_end(tmp_path / "empty", work)


def test_what_the_workers_are_ahead_is_taken_before_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker is two batches ahead: the third is the first that a turn may wait for."""
    work = Workload(photographs_in(tmp_path, 3), "cifar_resnext11_2x8d", 8, 32, 2)
    monkeypatch.setattr(photographs, "_IMAGES", 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    firsts = []

    def run(training: Training, source: Iterator[Batch], iterations: int) -> float:
        firsts.append(next(source).indices.tolist())
        return 1.0

    monkeypatch.setattr(Training, "run", run)
    measure_end_to_end(tmp_path, work, decoders=("workers",), rounds=1)
    order = TrainOrder(seed=1, count=16, batch_size=8)
    first, third = (next(order.batches(start))[1].tolist() for start in (0, 2))
    # The batch that lies ready, and the one from files; the first round is the warm-up.
    assert firsts == [first, third] * 2
