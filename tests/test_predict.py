"""Pictures of every kind, named by a tiny model; and the model's own evaluation as the measure of the names."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import train_tiny
from PIL import Image
from torch import nn

from resnext_ignite import evaluate, predict
from resnext_ignite.data.reading.cropping import square_crop
from resnext_ignite.data.reading.decoding import open_rgb, resized
from resnext_ignite.data.sources.shapes import CLASSES, load_shapes
from resnext_ignite.plots.figures import draw_mistakes, save_figure
from resnext_ignite.runs.checkpoint import load_model
from resnext_ignite.runtime.errors import CheckpointError, ConfigError, DataError

COUNT = 37


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images of a tiny run, as PNG in the order of their indices."""
    folder = tmp_path_factory.mktemp("shapes")
    images = load_shapes("test", COUNT)
    for number, picture in enumerate(images.pixels):
        Image.fromarray(picture.numpy()).save(folder / f"{number:03}.png")
    return folder


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert predict.main([*arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["predictions"]
    return found


def test_a_folder_is_named_as_the_evaluation_counts(
    finished_run: Path, shapes_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = predicted(capsys, "--checkpoint", str(finished_run), str(shapes_folder), "--batch-size", "8")
    assert [Path(p["file"]).name for p in found] == [f"{n:03}.png" for n in range(COUNT)]
    labels = load_shapes("test", COUNT).labels.tolist()
    correct = sum(p["top"][0]["index"] == label for p, label in zip(found, labels, strict=True))
    metrics, _ = evaluate.evaluate(finished_run, "test", [])
    assert (len(found), correct) == (metrics["images"], metrics["correct"])
    for prediction in found:
        top = prediction["top"]
        assert len(top) == 5
        assert [CLASSES[answer["index"]] for answer in top] == [answer["class"] for answer in top]
        probabilities = [answer["probability"] for answer in top]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0.5 < sum(probabilities) <= 1


def test_probabilities_are_the_softmax_of_the_logits(
    finished_run: Path, shapes_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(shapes_folder / "003.png")
    (prediction,) = predicted(capsys, "--checkpoint", str(finished_run), file, "--top-k", "99")
    model, metadata = load_model(finished_run)
    picture = torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (metadata.mean, metadata.std))
    with torch.no_grad():
        expected = model((picture - mean) / std).softmax(1)[0]
    found = {answer["index"]: answer["probability"] for answer in prediction["top"]}
    assert sorted(found) == list(range(10))
    torch.testing.assert_close(torch.tensor([found[i] for i in range(10)]), expected, rtol=1e-4, atol=1e-5)


def test_a_table_a_csv_and_a_sheet(
    finished_run: Path, shapes_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet, pattern = tmp_path / "sheet.png", str(shapes_folder / "00*.png")
    common = ["--checkpoint", str(finished_run), "--top-k", "2", pattern]
    assert predict.main([*common, "--save-sheet", str(sheet)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(shapes_folder / f"00{n}.png") for n in range(10)]
    assert {line.count(" % ") for line in lines} == {2}
    with Image.open(sheet) as image:
        assert min(image.size) > 300
    assert predict.main([*common, "--csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 20
    assert rows[1]["rank"] == "2"
    assert float(rows[0]["probability"]) >= float(rows[1]["probability"])
    assert CLASSES[int(rows[0]["index"])] == rows[0]["class"]


def test_a_broken_file_is_named_and_the_rest_go_on(
    finished_run: Path, shapes_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, missing, whole = tmp_path / "broken.png", tmp_path / "missing.png", shapes_folder / "000.png"
    broken.write_bytes(whole.read_bytes()[:100])
    files = [str(broken), str(missing), str(whole)]
    with pytest.raises(DataError, match="2 of 3 images could not be read"):
        predict.main(["--checkpoint", str(finished_run), *files, "--json", "--save-sheet", str(tmp_path / "s.png")])
    out, err = capsys.readouterr()
    assert [p["file"] for p in json.loads(out)["predictions"]] == [str(whole)]
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in lines] == files[:2]
    assert (tmp_path / "s.png").exists()


def test_standard_input_in_a_process_of_its_own(finished_run: Path, shapes_folder: Path) -> None:
    arguments = [sys.executable, "-m", "resnext_ignite.predict", "--checkpoint", str(finished_run), "-", "--json"]
    content = (shapes_folder / "005.png").read_bytes()
    done = subprocess.run(arguments, input=content, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (prediction,) = json.loads(done.stdout)["predictions"]
    assert prediction["file"] == "-"
    assert len(prediction["top"]) == 5


def test_standard_input_that_is_no_picture(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"no picture")))
    with pytest.raises(DataError, match="1 of 1 images could not be read"):
        predict.main(["--checkpoint", str(finished_run), "-", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out) == {"predictions": []}
    assert err.splitlines()[-1] == "error: standard input: not a picture; remove or replace it"


@pytest.mark.parametrize("change", ["none", "turned", "half"])
def test_workers_change_nothing(finished_run: Path, shapes_folder: Path, change: str) -> None:
    files = predict.find_images([str(shapes_folder)])
    if change == "turned":
        files = files[::-1]
    if change == "half":
        files = files[: COUNT // 2]
    alone = list(predict.Predictor(finished_run, batch_size=4, workers=0)(files))
    assert list(predict.Predictor(finished_run, batch_size=4, workers=2)(files)) == alone


@pytest.mark.parametrize(
    ("arguments", "error", "line"),
    [
        (["--top-k", "0", "x.png"], ConfigError, "--top-k 0: at least 1"),
        (["--batch-size", "-1", "x.png"], ConfigError, "--batch-size -1: at least 1"),
        (["--json", "--csv", "x.png"], ConfigError, "--json and --csv: choose one"),
        (["EMPTY"], DataError, "no image in this folder or below it"),
        (["nothing-*.png"], DataError, "nothing-*.png: no file matches this pattern"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    finished_run: Path, tmp_path: Path, arguments: list[str], error: type[Exception], line: str
) -> None:
    arguments = [str(tmp_path) if argument == "EMPTY" else argument for argument in arguments]
    with pytest.raises(error) as caught:
        predict.main(["--checkpoint", str(finished_run), *arguments])
    assert line in str(caught.value)


def test_a_damaged_checkpoint_is_not_taken_for_another_systems(finished_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    content = bytearray((finished_run / "checkpoints/final.pt").read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged: the CRC"):
        predict.Predictor(file)


GREY, WHITE = (100, 100, 100), (255, 255, 255)


def saved(picture: Image.Image, path: Path, **options: Any) -> str:
    picture.save(path, **options)
    return str(path)


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "pixel"),
    [
        ("L", 100, "png", GREY),
        ("1", 1, "png", WHITE),
        ("RGB", (1, 2, 3), "png", (1, 2, 3)),
        # Half transparent on white: (100 + 255) / 2.
        ("RGBA", (100, 100, 100, 128), "png", (177, 177, 177)),
        ("RGBA", (9, 9, 9, 0), "png", WHITE),
        ("LA", (100, 0), "png", WHITE),
        # 0x6480: the upper byte is 100. PIL's own conversion would clip it to 255.
        ("I;16", 0x6480, "png", GREY),
        ("I;16", 0x6480, "tiff", GREY),
        ("CMYK", (0, 0, 0, 155), "tiff", GREY),
        ("P", 1, "png", (1, 2, 3)),
    ],
)
def test_every_kind_of_picture(
    tmp_path: Path, mode: str, value: int | tuple[int, ...], suffix: str, pixel: tuple[int, int, int]
) -> None:
    picture = Image.new(mode, (8, 6), value)
    if mode == "P":
        picture.putpalette([0, 0, 0, 1, 2, 3])
    out = open_rgb(saved(picture, tmp_path / f"x.{suffix}"))
    assert (out.mode, out.size) == ("RGB", (8, 6))
    assert out.getpixel((3, 3)) == pixel


def test_a_transparent_palette_is_on_white(tmp_path: Path) -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 1, 2, 3])
    assert open_rgb(saved(picture, tmp_path / "x.png", transparency=1)).getpixel((0, 0)) == WHITE


# EXIF's orientations, each with the corner to which a picture's upper left one goes: x, y.
@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 1)), (8, (0, 1))],
)
def test_pictures_stand_upright(tmp_path: Path, orientation: int, corner: tuple[int, int]) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = open_rgb(saved(Image.fromarray(pixels), tmp_path / "x.jpg", exif=exif, quality=95))
    assert out.size == ((32, 16) if orientation < 5 else (16, 32))
    bright = np.argwhere(np.asarray(out)[..., 0] > 128)
    height, width = np.asarray(out).shape[:2]
    assert tuple((bright.mean(0) > (height / 2, width / 2))[::-1].astype(int)) == corner


def test_squares_lie_where_their_anchor_says() -> None:
    pixels = np.arange(40 * 60, dtype=np.int64).reshape(40, 60) % 251
    picture = Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    for anchor, (left, top) in {(0.5, 0.5): (20, 10), (0.0, 0.0): (0, 0), (1.0, 1.0): (40, 20)}.items():
        found = resized(np.array(picture), 20, square_crop(20, 0.5, anchor)(*picture.size))
        assert np.array_equal(found[..., 0], pixels[top : top + 20, left : left + 20])


class Corner(nn.Module):
    """Logits that are the mean of the pictures' upper left quarter."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        half = images.shape[-1] // 2
        return images[..., :half, :half].mean((2, 3))


def test_views_are_averaged_by_hand() -> None:
    from resnext_ignite.models.inference import MeanOverViews

    images = torch.zeros(2, 3, 4, 4)
    # Image 0, upper right: seen by the mirrored view alone.
    images[0, 1, :2, 2:] = 8.0
    images[1, 0, :2, :2] = 2.0
    flipped = MeanOverViews(Corner(), flip=True)(images)
    assert flipped.tolist() == [[0.0, 4.0, 0.0], [1.0, 0.0, 0.0]]
    crops = torch.stack([images, images, images.flip(-1), images.flip(-1)], dim=1)
    assert MeanOverViews(Corner(), flip=False)(crops).tolist() == flipped.tolist()


def test_an_evaluation_with_views_is_marked_and_its_own(
    finished_run: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = ["--checkpoint", str(finished_run)]
    assert evaluate.main([*checkpoint, "--views", "flip", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["views"] == "flip"
    model, metadata = load_model(finished_run)
    test = load_shapes("test", COUNT)
    mean, std = (torch.tensor(values)[:, None, None] for values in (metadata.mean, metadata.std))
    images = (test.pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        logits = (model(images) + model(images.flip(-1))) / 2
    assert found["correct"] == int((logits.argmax(1) == test.labels).sum())
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, test.labels)), rel=1e-4)
    with pytest.raises(ConfigError, match=r"--views ten-crop: needs data of image files"):
        evaluate.main([*checkpoint, "--views", "ten-crop"])

    folder = tmp_path / "folder"
    data = ["data.name=imagefolder", f"data.root={picture_folder}", "data.image_size=16", "data.eval_crop=0.875"]
    assert train_tiny(folder, *data, "data.train_size=null", "data.test_size=null", "train.batch_size=4") == 0
    capsys.readouterr()
    pictures = {name: tmp_path / f"{name}.png" for name in ("confusion", "mistakes", "calibration")}
    drawn = [argument for name, path in pictures.items() for argument in (f"--{name}", str(path))]
    arguments = ["--checkpoint", str(folder), "--views", "ten-crop", *drawn]
    assert evaluate.main(arguments) == 0
    out = capsys.readouterr().out
    assert "test with ten crops: " in out
    assert "expected calibration error" in out
    for path in pictures.values():
        with Image.open(path) as image:
            assert min(image.size) > 150
    metrics, data_found = evaluate.evaluate(folder, "test", [], views="ten-crop")
    assert metrics["images"] == len(data_found.splits["test"])


def test_ten_crops_by_hand(tmp_path: Path) -> None:
    """One picture: the mean of the logits of its five crops and their mirror images."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    for split, name in [("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")]:
        (folder / split / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    run = tmp_path / "run"
    keys = ["data.name=imagefolder", f"data.root={folder}", "data.image_size=32", "data.eval_crop=0.8"]
    assert train_tiny(run, *keys, "data.train_size=null", "data.test_size=null", "train.batch_size=4") == 0
    metrics, _ = evaluate.evaluate(run, "test", ["data.workers=0"], views="ten-crop")
    model, metadata = load_model(run)
    losses = []
    for label, name in enumerate("ab"):
        for file in sorted(os.listdir(folder / "test" / name)):
            picture = np.asarray(Image.open(folder / "test" / name / file))
            # 0.8 of the shorter side are 32 pixels: no resizing.
            corners = [(4, 12), (0, 0), (0, 24), (8, 0), (8, 24)]
            crops = torch.tensor(np.stack([picture[t : t + 32, le : le + 32] for t, le in corners])).permute(0, 3, 1, 2)
            mean, std = (torch.tensor(values)[:, None, None] for values in (metadata.mean, metadata.std))
            views = (torch.cat([crops, crops.flip(-1)]) / 255 - mean) / std
            with torch.no_grad():
                logits = model(views).mean(0, keepdim=True)
            losses.append(float(nn.functional.cross_entropy(logits, torch.tensor([label]))))
    assert metrics["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-4)


def test_calibration_by_hand() -> None:
    from resnext_ignite.data.loaders import Batch
    from resnext_ignite.distributed.ranks import Ranks
    from resnext_ignite.training.metrics import Calibration

    metric = Calibration(Ranks(), torch.device("cpu"))
    # Confidences 0.9 (right), 0.9 (wrong) in one bin, 0.5 (right) in another.
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0])
    for part in (slice(0, 2), slice(2, 3)):
        metric.update((probabilities[part].log(), Batch(torch.zeros(0), labels[part], labels[part])))
    result = metric.compute()
    # (|1 - 1.8| + |1 - 0.5|) / 3
    assert result["calibration_error"] == pytest.approx(100 * 1.3 / 3)
    assert result["calibration_bins"].sum(0).tolist() == pytest.approx([3, 2, 2.3])


def test_linked_folders_are_entered_once(shapes_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(shapes_folder)
    (tmp_path / "itself").symlink_to(tmp_path)
    assert predict.find_images([str(tmp_path)]) == [str(tmp_path / f"linked/{n:03}.png") for n in range(COUNT)]


def test_a_sheet_of_no_mistakes_is_empty(tmp_path: Path) -> None:
    save_figure(draw_mistakes([], load_shapes("test", COUNT), CLASSES), tmp_path / "mistakes.png")
    with Image.open(tmp_path / "mistakes.png") as image:
        assert image.convert("L").getextrema() == (255, 255)
