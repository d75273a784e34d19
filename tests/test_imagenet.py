"""ILSVRC2012 in its archives' exact format, three classes small: unpacked, resumed, and what is wrong with it named."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from conftest import small_disk
from PIL import Image
from scipy.io import savemat

from resnext_ignite import imagenet
from resnext_ignite.data.sources.folders import index_images
from resnext_ignite.packing import ilsvrc
from resnext_ignite.packing.options import locked
from resnext_ignite.packing.shards import check_folder
from resnext_ignite.runtime.errors import ConfigError, DataError, PreemptedError, RunFolderError, StorageError

# By their ILSVRC2012_ID, which is not the order of their names; with how many training images.
CLASSES = {1: ("n02119789", "kit fox, Vulpes macrotis", 4), 2: ("n01440764", "tench, Tinca tinca", 3)}
CLASSES[3] = ("n02100735", "English setter", 2)
GROUND_TRUTH = [3, 1, 1, 2, 3, 2]
SIZES = ["--classes", "3", "--train-images", "9", "--val-images", "6", "--workers", "0"]


def jpeg(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def tar(files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def devkit(ground_truth: list[int]) -> bytes:
    """The three classes, and two synsets above them, as in the real one behind the classes."""
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros((5, 1), [(name, object) for name in [*names, "num_train_images"]])
    above = {4: ("n02084071", "dog, domestic dog", 0), 5: ("n00001740", "entity", 0)}
    for number, (wnid, words, images) in {**CLASSES, **above}.items():
        children = np.array([[1.0, 3.0]] if wnid == "n02084071" else [[2.0, 4.0]] if images == 0 else [])
        height = float(number > 3)
        row = (float(number), wnid, words, "a gloss", float(children.size), children, height, float(images))
        synsets[number - 1, 0] = row
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    lines = "".join(f"{number}\n" for number in ground_truth)
    return tar(
        {
            "ILSVRC2012_devkit_t12/readme.txt": b"read me",
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": lines.encode(),
            "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        },
        "w:gz",
    )


def inner_tars() -> dict[str, bytes]:
    return {
        f"{wnid}.tar": tar({f"{wnid}_{k}.JPEG": jpeg(40 + 8 * k, 50, 10 * number + k) for k in range(images)})
        for number, (wnid, _, images) in CLASSES.items()
    }


def val_images() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(60, 30 + number, number) for number in range(1, 7)}


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(inner_tars()))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(val_images()))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit(GROUND_TRUTH))
    return folder


def arguments(archives: Path, output: Path, *more: str) -> list[str]:
    names = ("train", "ILSVRC2012_img_train.tar"), ("val", "ILSVRC2012_img_val.tar")
    given = [text for option, name in names for text in (f"--{option}", str(archives / name))]
    return [*given, "--devkit", str(archives / "ILSVRC2012_devkit_t12.tar.gz"), "--output", str(output), *SIZES, *more]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_archives_become_class_folders(archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "imagenet"
    assert imagenet.main(arguments(archives, output, "--workers", "2")) == 0
    assert capsys.readouterr().out == f"{output}: 3 classes, 9 training images, 6 validation images\n"
    train = {
        f"{wnid}/{wnid}_{k}.JPEG": jpeg(40 + 8 * k, 50, 10 * number + k)
        for number, (wnid, _, images) in CLASSES.items()
        for k in range(images)
    }
    assert files_below(output / "train") == train
    # Image 1 shows class 3, images 2 and 3 show class 1, ...
    val = {
        f"{CLASSES[GROUND_TRUTH[number - 1]][0]}/ILSVRC2012_val_{number:08d}.JPEG": jpeg(60, 30 + number, number)
        for number in range(1, 7)
    }
    assert files_below(output / "val") == val
    assert (output / "classes.txt").read_text().splitlines() == [
        "n01440764 tench, Tinca tinca",
        "n02100735 English setter",
        "n02119789 kit fox, Vulpes macrotis",
    ]
    assert sorted(os.listdir(output)) == [".lock", "classes.txt", "prepared.json", "train", "val"]
    # As a training sees it: labels are the places of the names in order.
    index = index_images(output, "val", index_images(output, "train").classes)
    assert index.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_short_side_is_exact_and_shards_are_packed(archives: Path, tmp_path: Path) -> None:
    output = tmp_path / "imagenet"
    assert imagenet.main(arguments(archives, output, "--short-side", "45", "--quality", "90", "--shards")) == 0
    # 40 to 64 pixels wide, 50 high: the first was short enough, and is the archive's.
    path = output / "train/n02119789/n02119789_0.JPEG"
    assert path.read_bytes() == jpeg(40, 50, 10)
    for number, size in ((1, (45, 47)), (2, (50, 45)), (3, (58, 45))):
        with Image.open(path.with_name(f"n02119789_{number}.JPEG")) as picture:
            assert picture.size == size
    assert [sum(shard.images for shard in split.shards) for split in check_folder(output / "shards")] == [9, 6]
    # A second time there is nothing to do.
    before = files_below(output)
    assert imagenet.main(arguments(archives, output, "--short-side", "45", "--quality", "90", "--shards")) == 0
    assert files_below(output) == before
    with pytest.raises(RunFolderError, match=r"was begun with the encoding .*45.*, not .*46"):
        imagenet.main(arguments(archives, output, "--short-side", "46", "--quality", "90"))


def test_folders_of_what_the_archives_hold_do_as_well(archives: Path, tmp_path: Path) -> None:
    for name in os.listdir(archives):
        with tarfile.open(archives / name) as archive:
            archive.extractall(tmp_path / "unpacked" / name.split(".")[0], filter="data")
    unpacked = tmp_path / "unpacked"
    # One class is a tar file still, and half of the validation images lie in class folders.
    for wnid in ("n02119789", "n01440764"):
        archive_path = unpacked / f"ILSVRC2012_img_train/{wnid}.tar"
        with tarfile.open(archive_path) as archive:
            archive.extractall(unpacked / "ILSVRC2012_img_train" / wnid, filter="data")
        archive_path.unlink()
    val = unpacked / "ILSVRC2012_img_val"
    (val / "n02100735").mkdir()
    (val / "ILSVRC2012_val_00000001.JPEG").rename(val / "n02100735/ILSVRC2012_val_00000001.JPEG")
    outputs = []
    for place, kit in (("a", "ILSVRC2012_devkit_t12"), ("b", "ILSVRC2012_devkit_t12/ILSVRC2012_devkit_t12")):
        outputs.append(tmp_path / place)
        given = ["--train", str(unpacked / "ILSVRC2012_img_train"), "--val", str(val), "--devkit", str(unpacked / kit)]
        assert imagenet.main([*given, "--output", str(outputs[-1]), *SIZES]) == 0
    whole = tmp_path / "whole"
    assert imagenet.main(arguments(archives, whole)) == 0
    assert files_below(outputs[0]) == files_below(outputs[1]) == files_below(whole)
    # A farm of relative links, as subsets are made: what they lead to is taken.
    lent = tmp_path / "lent"
    for picture in sorted((unpacked / "ILSVRC2012_img_train/n01440764").iterdir()):
        lent.mkdir(exist_ok=True)
        picture.rename(lent / picture.name)
        picture.symlink_to(Path("../../../lent") / picture.name)
    assert imagenet.main([*given, "--output", str(tmp_path / "linked"), *SIZES]) == 0
    assert files_below(tmp_path / "linked") == files_below(whole)
    assert not any(path.is_symlink() for path in (tmp_path / "linked").rglob("*"))
    kept = unpacked / "ILSVRC2012_img_train/n01440764/n01440764_0.JPEG"
    kept.rename(kept.with_name("n01440764_0.kept"))
    kept.symlink_to("n01440764_0.lost")
    with pytest.raises(DataError, match=r"n01440764_0.JPEG: is a broken link"):
        imagenet.main([*given, "--output", str(tmp_path / "c"), *SIZES])
    (val / "n02100735/ILSVRC2012_val_00000001.JPEG").rename(val / "n02100735/ILSVRC2012_val_00000002.JPEG")
    (val / "ILSVRC2012_val_00000002.JPEG").unlink()
    with pytest.raises(DataError, match=r"val_00000002.JPEG: the development kit says that it shows n02119789"):
        imagenet.main([*given, "--output", str(tmp_path / "c"), *SIZES])


def test_a_subset_leaves_the_other_classes_out(archives: Path, tmp_path: Path) -> None:
    two = {name: data for name, data in inner_tars().items() if "n02119789" not in name}
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar(two))
    output = tmp_path / "imagenet"
    sizes = ["--classes", "2", "--train-images", "5", "--val-images", "4"]
    assert imagenet.main(arguments(archives, output, *sizes)) == 0
    assert sorted(os.listdir(output / "val")) == ["n01440764", "n02100735"]


def cut_inner(archives: Path) -> None:
    files = inner_tars()
    # In the middle of the second of three pictures.
    files["n01440764.tar"] = files["n01440764.tar"][:4000]
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar(files))


def cut_inner_between_pictures(archives: Path) -> None:
    files = inner_tars()
    size = 512 + -(-len(jpeg(40, 50, 20)) // 512) * 512
    files["n01440764.tar"] = files["n01440764.tar"][:size]
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar(files))


def cut_outer(archives: Path) -> None:
    path = archives / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:-20_000])


def without_a_class(archives: Path) -> None:
    files = inner_tars()
    del files["n02100735.tar"]
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar(files))


def without_an_image(archives: Path) -> None:
    files = inner_tars()
    files["n02100735.tar"] = tar({"n02100735_0.JPEG": jpeg(9, 9, 0)})
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar(files))


def with_another_class(archives: Path) -> None:
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar({**inner_tars(), "n02084071.tar": tar({})}))


def with_an_empty_picture(archives: Path) -> None:
    (archives / "ILSVRC2012_img_train.tar").write_bytes(
        tar({**inner_tars(), "n02100735.tar": tar({"n02100735_0.JPEG": b""})})
    )


def without_a_val_image(archives: Path) -> None:
    files = val_images()
    del files["ILSVRC2012_val_00000003.JPEG"]
    (archives / "ILSVRC2012_img_val.tar").write_bytes(tar(files))


def a_line_too_many(archives: Path) -> None:
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit([*GROUND_TRUTH, 1]))


def a_line_too_few(archives: Path) -> None:
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit(GROUND_TRUTH[:-1]))


def a_class_above_the_classes(archives: Path) -> None:
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit([4, *GROUND_TRUTH[1:]]))


def a_cut_devkit(archives: Path) -> None:
    path = archives / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(path.read_bytes()[:200])


def another_archive(archives: Path) -> None:
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar({"data/other.mat": b""}))


def a_damaged_meta(archives: Path) -> None:
    files = {"data/meta.mat": b"no mat file" * 30, "data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar(files))


def a_way_out_of_a_class(archives: Path) -> None:
    bad = tar({"n02100735_0.JPEG": jpeg(9, 9, 0), "../../../escaped.JPEG": jpeg(9, 9, 0)})
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar({**inner_tars(), "n02100735.tar": bad}))


def a_way_out_of_val(archives: Path) -> None:
    (archives / "ILSVRC2012_img_val.tar").write_bytes(tar({**val_images(), "/tmp/escaped.JPEG": jpeg(9, 9, 0)}))


def a_link_in_val(archives: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        link = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (archives / "ILSVRC2012_img_val.tar").write_bytes(content.getvalue())


def another_picture_in_val(archives: Path) -> None:
    (archives / "ILSVRC2012_img_val.tar").write_bytes(tar({**val_images(), "cat.jpg": jpeg(9, 9, 0)}))


def no_val(archives: Path) -> None:
    (archives / "ILSVRC2012_img_val.tar").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_inner, r"img_train.tar: n01440764.tar: is damaged or not a tar file: unexpected end of data"),
        (cut_inner_between_pictures, r"img_train.tar: n01440764.tar: is cut short or damaged after \d+ bytes"),
        (cut_outer, r"img_train.tar: is damaged or not a tar file: unexpected end of data"),
        (without_a_class, r"holds 2 classes, not 3; the first missing class .* is n02100735"),
        (without_an_image, r"train: holds 8 images, not 9: n02100735 has 1, the development kit says 2"),
        (with_another_class, r"n02084071: is not a class"),
        (with_an_empty_picture, r"n02100735_0.JPEG: is empty"),
        (without_a_val_image, r"img_val.tar: holds 5 validation images of these classes, not 6"),
        (a_line_too_many, r"ground_truth.txt has 7 lines, not 6"),
        (a_line_too_few, r"val_00000006.JPEG: .*ground_truth.txt of .* has 5 lines"),
        (a_class_above_the_classes, r"ground_truth.txt:1: 4 is not the ILSVRC2012_ID of a class"),
        (a_cut_devkit, r"devkit_t12.tar.gz: cannot be read: "),
        (another_archive, r"holds no data/meta.mat"),
        (a_damaged_meta, r"data/meta.mat cannot be read: "),
        (a_way_out_of_a_class, r"n02100735.tar: ../../../escaped.JPEG: leads out of the folder"),
        (a_way_out_of_val, r"/tmp/escaped.JPEG: leads out of the folder"),
        (a_link_in_val, r"val_00000001.JPEG: is neither a file nor a folder"),
        (another_picture_in_val, r"cat.jpg: is not the name of a validation image"),
        (no_val, r"--val .*img_val.tar: does not exist"),
    ],
)
def test_what_is_wrong_is_named(archives: Path, tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(archives)
    with pytest.raises(DataError, match=words) as caught:
        imagenet.main(arguments(archives, tmp_path / "imagenet"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("escaped.JPEG"))
    assert not (tmp_path / "imagenet/classes.txt").exists()


def test_a_mended_archive_goes_on_where_the_damaged_one_ended(archives: Path, tmp_path: Path) -> None:
    output, whole = tmp_path / "imagenet", tmp_path / "whole"
    assert imagenet.main(arguments(archives, whole)) == 0
    good = (archives / "ILSVRC2012_img_train.tar").read_bytes()
    a_way_out_of_a_class(archives)
    with pytest.raises(DataError):
        imagenet.main(arguments(archives, output))
    # The classes are taken in the order of their names: one was whole.
    assert os.listdir(output / "train") == ["n01440764"]
    inode = (output / "train/n01440764").stat().st_ino
    (archives / "ILSVRC2012_img_train.tar").write_bytes(good)
    assert imagenet.main(arguments(archives, output)) == 0
    assert files_below(output) == files_below(whole)
    assert (output / "train/n01440764").stat().st_ino == inode


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_half_way_it_goes_on(
    archives: Path,
    tmp_path: Path,
    in_fork: Callable[[Callable[[], None]], int],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    output, whole = tmp_path / "imagenet", tmp_path / "whole"
    given = arguments(archives, output, "--workers", "1")

    def stopped() -> None:
        place, placed = ilsvrc._place, 0

        def place_four(*values: Any) -> None:
            nonlocal placed
            place(*values)
            placed += 1
            if placed == 4:
                # In the worker, which has one of three classes behind it.
                os.kill(os.getppid(), number)
                time.sleep(60)

        monkeypatch.setattr(ilsvrc, "_place", place_four)
        # A shell's background job, as this may be, begins with it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            imagenet.main(given)
        except PreemptedError as error:
            told = str(error) == f"{output}: stopped; the same command resumes"
            os._exit(error.exit_code if told else 99)

    status = in_fork(stopped)
    assert os.waitstatus_to_exitcode(status) == (75 if number == signal.SIGINT else -number)
    assert os.listdir(output / "train") == ["n01440764"]
    assert imagenet.main(given) == 0
    assert imagenet.main(arguments(archives, whole)) == 0
    assert files_below(output) == files_below(whole)


def test_a_full_disk_is_told_and_gone_on_with(archives: Path, tmp_path: Path) -> None:
    # Of pages of 4,096 bytes: three pictures of one class fit in, not the nine.
    with small_disk(tmp_path / "disk", 8 * 4096) as disk:
        with pytest.raises(StorageError, match=r"/n\d+_\d.JPEG: No space left on device; free some space"):
            imagenet.main(arguments(archives, disk / "imagenet"))
        assert not (disk / "imagenet/classes.txt").exists()
        subprocess.run(["mount", "-o", "remount,size=1000000", str(disk)], check=True)
        assert imagenet.main(arguments(archives, disk / "imagenet")) == 0


def test_an_output_that_holds_something_else_is_refused(archives: Path, tmp_path: Path) -> None:
    output = tmp_path / "imagenet"
    (output / "train").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="exists already, and not from this command"):
        imagenet.main(arguments(archives, output))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        imagenet.main(arguments(archives, tmp_path / "file"))
    given = arguments(archives, output)
    given[1] = str(output / "train")
    with pytest.raises(ConfigError, match=r"--train .*: lies in --output"):
        imagenet.main(given)


def test_two_at_a_time_are_one_too_many(archives: Path, tmp_path: Path) -> None:
    output = tmp_path / "imagenet"
    with locked(output), pytest.raises(RunFolderError, match="another process is writing into it; wait for it"):
        imagenet.main(arguments(archives, output))


def test_a_twice_named_picture_is_told(archives: Path, tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG"))
    (archives / "ILSVRC2012_img_val.tar").write_bytes(content.getvalue())
    with pytest.raises(DataError, match=r"val_00000001.JPEG: exists twice"):
        imagenet.main(arguments(archives, tmp_path / "imagenet"))
