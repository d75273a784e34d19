"""The data sets: CIFAR archives made in its exact format, folders of pictures, drawn shapes; and their loaders."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import Payload
from PIL import Image

from resnext_ignite.config.schema import Config, with_values
from resnext_ignite.data import build_eval_loader, build_loaders, build_train_loader, load_data
from resnext_ignite.data.augment.chain import Augment
from resnext_ignite.data.images import Images
from resnext_ignite.data.loaders import EvalLoader, TrainLoader
from resnext_ignite.data.reading.cropping import crop_draws, random_box, square_crop
from resnext_ignite.data.reading.decoding import resized
from resnext_ignite.data.reading.image_files import ImageFiles
from resnext_ignite.data.sampling import Purpose, TrainOrder, uniform
from resnext_ignite.data.sources import shapes
from resnext_ignite.data.sources.folders import index_images
from resnext_ignite.distributed.ranks import Ranks
from resnext_ignite.runtime.errors import ConfigError, DataError

CPU = torch.device("cpu")
PLAIN = Augment(1, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop_padding=2, flip="random")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_cifar(root: Path, dataset: Any, monkeypatch: pytest.MonkeyPatch, per_file: int = 4) -> tuple[Path, Any]:
    """An archive in the format of `dataset`, with few pictures, and torchvision told its checksums."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(3)
    coarse = dataset is torchvision.datasets.CIFAR100
    classes = 100 if coarse else 10
    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    pixels = []
    for name, files in (("train_list", dataset.train_list), ("test_list", dataset.test_list)):
        for file, _ in files:
            data = generator.integers(0, 256, (per_file, 3072), dtype=np.uint8)
            labels = generator.integers(0, classes, per_file).tolist()
            content = {"data": data, ("fine_labels" if coarse else "labels"): labels}
            (folder / file).write_bytes(pickle.dumps(content))
            lists[name].append([file, md5(folder / file)])
            pixels.append((data, labels))
    meta = folder / dataset.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: [f"class{k}" for k in range(classes)]}))
    archive = root / dataset.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, dataset.base_folder)
    shutil.rmtree(folder)
    for name, value in lists.items():
        monkeypatch.setattr(dataset, name, value)
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5_of_meta(archive, dataset)})
    monkeypatch.setattr(dataset, "tgz_md5", md5(archive))
    return archive, pixels


def md5_of_meta(archive: Path, dataset: Any) -> str:
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"{dataset.base_folder}/{dataset.meta['filename']}")
        assert member is not None
        return hashlib.md5(member.read(), usedforsecurity=False).hexdigest()


def cifar_config(root: Path, **values: Any) -> Config:
    named = {"data.name": "cifar10", "data.root": str(root), "data.download": False, "train.batch_size": 4}
    return with_values(Config(), {**named, **values})


@pytest.mark.parametrize(
    ("name", "dataset", "classes"),
    [("cifar10", torchvision.datasets.CIFAR10, 10), ("cifar100", torchvision.datasets.CIFAR100, 100)],
)
def test_cifar_is_unpacked_checked_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dataset: Any, classes: int
) -> None:
    _, pixels = write_cifar(tmp_path, dataset, monkeypatch)
    data = load_data(cifar_config(tmp_path, **{"data.name": name}), Ranks())
    train, test = data.splits["train"], data.splits["test"]
    assert isinstance(train, Images)
    assert len(train) == 4 * len(dataset.train_list)
    assert len(test) == 4
    assert len(data.classes) == classes
    first_data, first_labels = pixels[0]
    # A row of a batch file is 1024 red, 1024 green, 1024 blue values.
    expected = torch.from_numpy(first_data[1].reshape(3, 32, 32)).permute(1, 2, 0)
    assert torch.equal(train.pixels[1], expected)
    assert train.labels[:4].tolist() == first_labels
    # The second time the unpacked files are there.
    (tmp_path / dataset.filename).unlink()
    assert len(load_data(cifar_config(tmp_path, **{"data.name": name}), Ranks()).splits["test"]) == 4


@pytest.mark.parametrize("where", ["archive", "batch"])
def test_a_wrong_checksum_is_named_before_any_pickle_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    archive, _ = write_cifar(tmp_path, torchvision.datasets.CIFAR10, monkeypatch)
    sentinel = tmp_path / "sentinel"
    if where == "archive":
        damaged = archive
        damaged.write_bytes(archive.read_bytes()[:-20])
    else:
        load_data(cifar_config(tmp_path), Ranks())
        damaged = tmp_path / "cifar-10-batches-py/data_batch_2"
        damaged.write_bytes(pickle.dumps(Payload(sentinel)))
    with pytest.raises(DataError) as caught:
        load_data(cifar_config(tmp_path), Ranks())
    line = str(caught.value)
    assert str(damaged) in line
    assert md5(damaged) in line
    expected = torchvision.datasets.CIFAR10
    assert (expected.tgz_md5 if where == "archive" else expected.train_list[1][1]) in line
    assert not sentinel.exists()


def test_missing_cifar_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.download=true"):
        load_data(cifar_config(tmp_path), Ranks())


def test_held_out_images_are_keyed_and_disjoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, torchvision.datasets.CIFAR10, monkeypatch)
    data = load_data(cifar_config(tmp_path, **{"data.val_size": 6}), Ranks())
    train, val = (set(data.splits[name].indices.tolist()) for name in ("train", "val"))
    assert len(train) == 14
    assert len(val) == 6
    assert train | val == set(range(20))
    assert data.selection == "val"
    again = load_data(cifar_config(tmp_path, **{"data.val_size": 6}), Ranks(), ("val",))
    assert set(again.splits["val"].indices.tolist()) == val
    other = load_data(cifar_config(tmp_path, **{"data.val_size": 6, "seed": 2}), Ranks())
    assert set(other.splits["val"].indices.tolist()) != val
    with pytest.raises(ConfigError, match=r"data\.val_size: 20 of 20"):
        load_data(cifar_config(tmp_path, **{"data.val_size": 20}), Ranks())
    with pytest.raises(ConfigError, match=r"data\.train_size: 21, but there are only 20"):
        load_data(cifar_config(tmp_path, **{"data.train_size": 21}), Ranks())
    subset = load_data(cifar_config(tmp_path, **{"data.train_size": 5, "data.image_size": 16}), Ranks())
    train_images = subset.splits["train"]
    assert isinstance(train_images, Images)
    assert train_images.pixels.shape == (5, 16, 16, 3)


def test_shapes_are_a_pure_function_of_the_index() -> None:
    many, few = shapes.load_shapes("test", 1030), shapes.load_shapes("test", 7)
    assert torch.equal(many.pixels[:7], few.pixels)
    assert many.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert not torch.equal(shapes.load_shapes("train", 7).pixels, few.pixels)
    mean, std = (many.pixels.float() / 255).mean((0, 1, 2)), (many.pixels.float() / 255).std((0, 1, 2))
    torch.testing.assert_close(mean, torch.tensor(shapes.MEAN), atol=0.01, rtol=0)
    torch.testing.assert_close(std, torch.tensor(shapes.STD), atol=0.01, rtol=0)


def test_shapes_are_too_hard_for_a_linear_model() -> None:
    train, test = shapes.load_shapes("train", 4000), shapes.load_shapes("test", 1000)

    def features(images: Images) -> torch.Tensor:
        flat = images.pixels.flatten(1).double() / 255 - 0.5
        return torch.cat([flat, torch.ones(len(flat), 1).double()], dim=1)

    x, targets = features(train), torch.nn.functional.one_hot(train.labels, 10).double()
    errors = []
    for ridge in (10.0, 1000.0):
        gram = x.T @ x + ridge * torch.eye(x.shape[1]).double()
        answers = (features(test) @ torch.linalg.solve(gram, x.T @ targets)).argmax(1)
        errors.append(100 * (answers != test.labels).double().mean().item())
    assert min(errors) > 40


def folder_config(root: Path, **values: Any) -> Config:
    return with_values(
        Config(),
        {"data.name": "imagefolder", "data.root": str(root), "train.batch_size": 8, "data.workers": 0, **values},
    )


def test_a_folder_is_decoded_resized_and_cropped(picture_folder: Path) -> None:
    data = load_data(folder_config(picture_folder, **{"data.image_size": 16}), Ranks())
    assert data.classes == ("dark", "light")
    assert isinstance(data.splits["train"], ImageFiles)
    assert len(data.splits["train"]) == 40
    assert len(data.splits["test"]) == 12
    pictures = data.splits["train"].load(torch.tensor([0, 20]))
    assert pictures.shape == (2, 16, 16, 3)
    assert pictures[0].max() <= 128 <= pictures[1].min()
    path = str(data.splits["train"].paths[0])
    with Image.open(path) as image:
        # 36x32, as published: the shorter side to 16, then the central 16x16.
        expected = np.asarray(image.resize((18, 16), Image.Resampling.BILINEAR).crop((1, 0, 17, 16)))
    np.testing.assert_allclose(pictures[0].numpy().astype(int), expected.astype(int), atol=1)


def test_pictures_of_the_asked_size_are_kept_in_memory(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / split / name / f"{number}.png")
    data = load_data(folder_config(tmp_path), Ranks())
    assert list(data.splits) == ["train", "val", "test"]
    assert all(isinstance(split, Images) for split in data.splits.values())
    train = data.splits["train"]
    assert isinstance(train, Images)
    assert train.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3] * 2
    Image.new("RGB", (33, 32)).save(tmp_path / "train/b/9.png")
    assert isinstance(load_data(folder_config(tmp_path), Ranks()).splits["train"], ImageFiles)
    whole = load_data(folder_config(tmp_path, **{"data.in_memory": True}), Ranks()).splits["train"]
    assert isinstance(whole, Images)
    assert len(whole) == 9
    with pytest.raises(ConfigError, match="already has a val/ folder"):
        load_data(folder_config(tmp_path, **{"data.val_size": 1}), Ranks())


def break_file(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": b"\x00\x01" * 200}[kind])


@pytest.mark.parametrize("kind", ["empty", "cut", "noise"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_named(tmp_path: Path, picture_folder: Path, kind: str, workers: int) -> None:
    root = tmp_path / "copy"
    shutil.copytree(picture_folder, root)
    broken = root / "train/light/07.png"
    break_file(broken, kind)
    config = folder_config(root, **{"data.image_size": 16, "data.workers": workers})
    loader = iter(build_train_loader(config, load_data(config, Ranks()), CPU, Ranks()))
    with pytest.raises(DataError) as caught:
        list(itertools.islice(loader, 5))
    assert str(caught.value).startswith(f"{broken}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [3000, 1000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "train/a/x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    index = index_images(tmp_path, "train")
    with pytest.raises(DataError, match=r"x\.png: cannot be read: .*4096"):
        ImageFiles(index.paths, index.labels, torch.arange(1), 8).load(torch.tensor([0]))


def test_folders_that_are_no_data_set(tmp_path: Path, picture_folder: Path) -> None:
    with pytest.raises(DataError, match="not an imagefolder"):
        load_data(folder_config(tmp_path), Ranks())
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="holds no class folder"):
        load_data(folder_config(tmp_path), Ranks())
    (tmp_path / "train/a").mkdir()
    with pytest.raises(DataError, match="a class without an image"):
        load_data(folder_config(tmp_path), Ranks())
    shutil.copytree(picture_folder / "train", tmp_path / "train", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "train/a")
    (tmp_path / "val/other").mkdir(parents=True)
    with pytest.raises(DataError, match="other: not a class of the training images"):
        load_data(folder_config(tmp_path), Ranks())
    config = folder_config(picture_folder, **{"train.batch_size": 999})
    data = load_data(config, Ranks())
    with pytest.raises(ConfigError, match=r"train\.batch_size: 999 is more than the 40"):
        build_train_loader(config, data, CPU, Ranks())
    with pytest.raises(DataError, match="no val split"):
        build_eval_loader(config, data, "val", CPU, Ranks())


def take(loader: TrainLoader, start: int, count: int) -> list[tuple[torch.Tensor, ...]]:
    loader.start_iteration = start
    source = iter(loader)
    return [(b.images, b.labels, b.indices) for b in (next(source) for _ in range(count))]


def assert_same(ours: list[tuple[torch.Tensor, ...]], theirs: list[tuple[torch.Tensor, ...]]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("random_crops", [False, True])
def test_training_images_do_not_depend_on_workers_ranks_or_cuts(picture_folder: Path, random_crops: bool) -> None:
    values = {"data.image_size": 24, "augment.random_resized_crop": random_crops, "augment.color": 0.4}
    config = folder_config(picture_folder, **values)
    data = load_data(config, Ranks())

    def loader(workers: int = 0, rank: int = 0, ranks: int = 1) -> TrainLoader:
        part = with_values(config, {"data.workers": workers})
        of_rank = Ranks(rank, ranks)
        return build_train_loader(part, load_data(part, of_rank), CPU, of_rank)

    whole = take(loader(), 0, 12)
    assert len(data.splits["train"]) // 8 == 5
    assert_same(take(loader(workers=2), 0, 12), whole)
    for cut in (1, 5, 7):
        assert_same(take(loader(workers=2 * (cut % 2)), cut, 12 - cut), whole[cut:])
    halves = [take(loader(rank=rank, ranks=2), 0, 12) for rank in range(2)]
    joined = [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in zip(*halves, strict=True)]
    assert_same(joined, whole)


def test_memory_and_files_give_the_same_batches(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    taken = []
    for in_memory in (True, False):
        config = folder_config(tmp_path, **{"data.in_memory": in_memory, "train.batch_size": 4})
        data = load_data(config, Ranks())
        assert isinstance(data.splits["train"], Images) == in_memory
        taken.append(take(build_train_loader(config, data, CPU, Ranks()), 0, 5))
    assert_same(taken[0], taken[1])


@pytest.mark.parametrize("count", [1, 7, 257])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_sees_every_image_once(count: int, ranks: int) -> None:
    images = Images(torch.zeros(count, 8, 8, 3, dtype=torch.uint8), torch.arange(count) % 3, torch.arange(count) * 2)
    seen: list[int] = []
    for rank in range(ranks):
        loader = EvalLoader(images, PLAIN, CPU, batch_size=50, rank=rank, world_size=ranks)
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert torch.equal(batch.labels, batch.indices // 2 % 3)
            seen += batch.indices.tolist()
    assert seen == [2 * k for k in range(count)]


def test_workers_do_not_touch_torchs_generator(picture_folder: Path) -> None:
    config = folder_config(picture_folder, **{"data.image_size": 16, "data.workers": 2})
    data = load_data(config, Ranks())
    state = torch.get_rng_state()
    next(iter(build_train_loader(config, data, CPU, Ranks())))
    list(build_eval_loader(config, data, "test", CPU, Ranks()))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_boxes_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms.v2 import RandomResizedCrop

    count, width, height = 3000, 500, 333
    indices = torch.arange(count)
    draws = torch.stack([uniform(1, 1, indices, 20 + k) for k in range(40)], dim=1).view(-1, 10, 4).tolist()
    ours = np.array([random_box(width, height, draw) for draw in draws])
    torch.manual_seed(0)
    crop = RandomResizedCrop(224)
    image = torch.empty(3, height, width, device="meta")
    made = [crop.make_params([image]) for _ in range(count)]
    theirs = np.array([(p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]) for p in made])
    assert (ours[:, 0] >= 0).all()
    assert (ours[:, 2] <= width).all()
    assert (ours[:, 3] <= height).all()
    # Two samples of 3000: the largest distance of their distribution functions exceeds 0.05 in 1 of 1000 draws.
    widths_heights_corners = np.array([[-1, 0, 1, 0], [0, -1, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]])
    for weights in widths_heights_corners:
        a, b = np.sort(ours @ weights), np.sort(theirs @ weights)
        grid = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / count
        assert distance < 0.05


def test_boxes_that_never_fit_fall_back_to_the_centre() -> None:
    # A strip of 100x10: every attempt asks for the whole area, which at these aspects does not fit.
    left, top, right, bottom = random_box(100, 10, [[1.0, 0.5, 0.0, 0.0]] * 10)
    assert (top, bottom) == (0, 10)
    assert right - left == pytest.approx(10 * 4 / 3)
    assert left == pytest.approx(50 - 10 * 4 / 6)


def test_the_central_crop_keeps_its_share() -> None:
    image = Image.fromarray(np.arange(100, dtype=np.uint8).repeat(3).reshape(1, 100, 3).repeat(50, axis=0))
    out = resized(np.array(image), 25, square_crop(25, 0.5)(*image.size))
    # Of 100x50 the central 25x25: columns 37.5 to 62.5, of which the first pixel averages 37 and 38.
    assert out.shape == (25, 25, 3)
    assert abs(int(out[0, 0, 0]) - 38) <= 1
    assert abs(int(out[0, -1, 0]) - 62) <= 1


def test_an_order_too_short_is_a_config_error() -> None:
    with pytest.raises(ValueError, match="fewer than a batch"):
        TrainOrder(seed=1, count=3, batch_size=4)


def test_with_only_train_the_held_out_images_are_evaluated(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "train" / name / f"{number}.png")
    data = load_data(folder_config(tmp_path, **{"data.val_size": 3}), Ranks())
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 9, "val": 3}
    with pytest.raises(DataError, match="nothing to evaluate on"):
        build_loaders(folder_config(tmp_path), CPU, Ranks())
    (tmp_path / "train").rename(tmp_path / "test")
    assert list(load_data(folder_config(tmp_path), Ranks(), ("test",)).splits) == ["test"]
    with pytest.raises(DataError, match="has no train split; it holds test"):
        load_data(folder_config(tmp_path), Ranks(), ("train",))


@pytest.mark.parametrize(
    ("values", "ranks", "line"),
    [
        ({"train.batch_size": 8}, 3, "cannot be shared by 3 ranks of 1 micro-batches; 6 or 9 can"),
        (
            {"train.batch_size": 16, "train.ghost_batch": 8},
            4,
            "of ghost batches of 8; 32 can",
        ),
        ({"augment.crop_padding": 16, "data.image_size": 16}, 1, "must be below the size 16"),
    ],
)
def test_what_ranks_and_sizes_forbid_is_exit_2(
    picture_folder: Path, values: dict[str, int], ranks: int, line: str
) -> None:
    config = folder_config(picture_folder, **values)
    data = load_data(config, Ranks())
    with pytest.raises(ConfigError, match=line):
        build_train_loader(config, data, CPU, Ranks(0, ranks))


def test_the_numbers_of_a_random_crop_are_keyed_and_can_be_asked_for_again() -> None:
    indices = torch.tensor([5, 9])
    draws = crop_draws(3, 2, indices)[1]
    wanted = [
        [float(uniform(3, 2, indices[1:], Purpose.RESIZED_CROP + 4 * attempt + k)) for k in range(4)]
        for attempt in range(10)
    ]
    assert list(draws) == wanted
    assert list(draws) == wanted, "a picture that PIL has to decode asks once more"
