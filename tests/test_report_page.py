"""The page of `report --html`: what it says of real runs, of cut ones, of odd names, and that a browser shows it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DRAWN, train_tiny
from PIL import Image

from resnext_ignite import report
from resnext_ignite.plots import report_page
from resnext_ignite.runs.folder import RunFolder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img", "source"}
ODD_CLASSES = ("<script>alert('no')", "a & b", 'quo"ted', "$\\frac$", "\u00e9t\u00e9")


class Page(HTMLParser):
    """A page read strictly: every element is closed where it must be, and no id comes twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.tags, self.ids = "", list[str](), list[str](), list[str]()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        self.text = " ".join(self.text.split())
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data + " "


draw_curves_of_page = report_page._curves
drawn: dict[str, dict[str, str]] = {}


@pytest.fixture(autouse=True)
def curves_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most pages here are of the same run, and its four curves take most of a page's time."""

    def curves(records: dict[str, Any]) -> dict[str, str]:
        key = repr(records)
        if key not in drawn:
            drawn[key] = draw_curves_of_page(records)
        return drawn[key]

    monkeypatch.setattr(report_page, "_curves", curves)


def page_of(tmp_path: Path, *folders: Path) -> tuple[Page, Path]:
    path = tmp_path / "report.html"
    curves = ["--output", str(tmp_path / "curves.png")]
    assert report.main([*map(str, folders), "--html", str(path), *curves]) == 0
    return Page(path.read_text(encoding="utf-8")), path


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run to spoil."""
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("*.pt", "*tfevents*"))
    return tmp_path / "run"


def write_evaluation(folder: Path, classes: list[str], confusion: list[list[int]], **changes: Any) -> None:
    """Give a run an evaluation whose figures are those of its last record."""
    folder = folder.resolve()
    last = RunFolder(folder).read_metrics()[-1]
    last["images"] = sum(count for _, _, count in confusion)
    last["correct"] = sum(count for true, predicted, count in confusion if true == predicted)
    (folder / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    place = {key: last[key] for key in ("split", "epoch", "iteration")}
    evaluation = {**place, "classes": classes, "confusion": confusion, "mistakes": [], **changes}
    RunFolder(folder).write_evaluation(evaluation)


def test_one_run(finished_run: Path, tmp_path: Path) -> None:
    page, path = page_of(tmp_path, finished_run)
    last = RunFolder(finished_run).read_metrics()[-1]
    assert (
        f"{last['top1_error']:.2f} % test error at epoch 3, the last: {37 - last['correct']} wrong of 37" in page.text
    )
    assert "(chosen on the test split: no result)" in page.text
    assert "completed, epoch 3 of 3" in page.text
    assert 'model.name "cifar_resnext11_2x8d" "cifar_resnext29_8x64d"' in page.text
    assert "device cpu ranks 1 resnext_ignite" in page.text
    assert page.text.count("missing") == 0
    # Ten true classes and their columns, and the sheet of mistakes beside the curves.
    assert sum(attributes.get("class") == "hit" for _, attributes in page.attributes) == 10
    assert page.tags.count("img") == 2
    assert all(attributes["alt"] for tag, attributes in page.attributes if tag == "img")
    assert not {"script", "iframe", "object"} & set(page.tags)
    # Nothing is asked of a network.
    assert set(re.findall(r'(?:src|srcset|href)="([^"]{1,5})', path.read_text())) == {"data:"}


def test_counts_by_hand(copied_run: Path, tmp_path: Path) -> None:
    write_evaluation(copied_run, ["cat", "yak", "elk"], [[0, 0, 3], [0, 1, 1], [2, 0, 2], [2, 1, 3], [2, 2, 5]])
    page, _ = page_of(tmp_path, copied_run)
    assert "6 wrong of 14" in page.text
    assert "cat 3 1 yak elk 2 3 5" in page.text
    assert "mostly taken for elk 10 50.00 yak (3) cat 4 25.00 yak (1) yak 0 - - Config" in page.text
    shares = [attributes["style"] for _, attributes in page.attributes if "style" in attributes]
    # Of four, none and ten images of each true class, in percent.
    assert shares == [f"--share: {share}" for share in (75, 25, 0, 0, 0, 0, 20, 30, 50)]


def test_several_runs_side_by_side(finished_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert train_tiny(other, "optimizer.lr=0.2", "data.val_size=10", "logging.images=0") == 0
    page, _ = page_of(tmp_path, finished_run, other)
    assert "key tiny other data.val_size 0 10 optimizer.lr 0.1 0.2 logging.tensorboard true false" in page.text
    assert "with the weights of the best" in page.text
    assert "None listed: there was no mistake, or" in page.text
    assert page.ids == ["run-1", "run-2"]
    same, _ = page_of(tmp_path, finished_run, shutil.copytree(finished_run, tmp_path / "again"))
    assert "What differs in their configs Nothing." in same.text


def test_a_run_folder_from_before_gets_its_page(copied_run: Path, tmp_path: Path) -> None:
    for name in ("evaluation.json", "mistakes.png", "status.json"):
        (copied_run / name).unlink()
    page, _ = page_of(tmp_path, copied_run)
    assert "There is no readable evaluation.json" in page.text
    assert "no status.json that could be read" in page.text
    assert "Confusion" not in page.text


def test_what_is_of_another_evaluation_is_left_out_and_named(copied_run: Path, tmp_path: Path) -> None:
    whole = (copied_run / "metrics.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    # As of a run that was killed, resumed from iteration 8 and killed again before its next evaluation.
    (copied_run / "metrics.jsonl").write_text("".join(lines[:3]))
    page, _ = page_of(tmp_path, copied_run)
    assert (
        "evaluation.json is of another evaluation (test, epoch 3, iteration 12) than the last of metrics.jsonl "
        "(test, epoch 2, iteration 8)" in page.text
    )
    assert "Confusion" not in page.text
    # The same place, counted anew by a run that is not deterministic, and killed before it wrote that down.
    last = json.loads(lines[3])
    other = {**last, "correct": (last["correct"] + 1) % 37}
    (copied_run / "metrics.jsonl").write_text("".join([*lines[:3], json.dumps(other) + "\n"]))
    page, _ = page_of(tmp_path, copied_run)
    assert f"evaluation.json counts {last['correct']} of 37 as correct" in page.text
    (copied_run / "metrics.jsonl").write_text(whole)
    # As of a run that evaluated again, and has not come to its end.
    Image.new("RGB", (9, 9)).save(copied_run / "mistakes.png")
    page, _ = page_of(tmp_path, copied_run)
    assert "mistakes.png is of another evaluation (unnamed) and is left out" in page.text
    assert "Confusion" in page.text


def test_names_are_text(copied_run: Path, tmp_path: Path) -> None:
    mistakes = [{"index": 4, "label": 0, "predicted": 1, "loss": 2.5}]
    write_evaluation(copied_run, list(ODD_CLASSES), [[0, 1, 3], [4, 4, 2]], mistakes=mistakes)
    page, path = page_of(tmp_path, copied_run.rename(tmp_path / "<b>run & $x_$"))
    assert "script" not in page.tags
    assert "b" not in page.tags
    for name in ODD_CLASSES:
        assert name in page.text
    drawn = [base64.b64decode(found).decode() for found in re.findall(r"svg\+xml;base64,([^\"]*)", path.read_text())]
    assert len(drawn) == 4
    assert all("&lt;b&gt;run &amp; $x_$: test error" in svg for svg in drawn)
    assert "4 <script>alert('no') a & b 2.50" in page.text


def test_a_thousand_classes_are_a_picture_and_the_fifty_worst(copied_run: Path, tmp_path: Path) -> None:
    # Class n of a thousand has a hundred images, n // 10 of them wrong.
    confusion = [[n, n, 100 - n // 10] for n in range(1000)] + [[n, 0, n // 10] for n in range(10, 1000)]
    write_evaluation(copied_run, [f"class {n}" for n in range(1000)], confusion)
    page, path = page_of(tmp_path, copied_run)
    assert "The 50 worst of 1,000 classes." in page.text
    assert page.text.count("class 0 (") == 50
    assert "class 990 100 99.00 class 0 (99)" in page.text
    assert "class 949" not in page.text
    assert "hit" not in [attributes.get("class") for _, attributes in page.attributes]
    assert path.stat().st_size < 2_000_000


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to load the page in")
def test_a_browser_shows_all_of_it(finished_run: Path, copied_run: Path, tmp_path: Path) -> None:
    write_evaluation(copied_run, [f"<i>{n}" for n in range(30)], [[n, 29 - n, 2] for n in range(30)])
    _, path = page_of(tmp_path, finished_run, copied_run)
    probe = """<script>addEventListener("load", () => {
        const narrow = [...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).length
        const wide = document.documentElement.scrollWidth > innerWidth
        document.body.dataset.seen = [document.images.length, narrow, wide, document.compatMode].join(" ")
    })</script></body>"""
    path.write_text(path.read_text().replace("</body>", probe))
    for size in ("1280,900", "500,900"):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        shown = subprocess.run(
            [str(CHROMIUM), *flags, profile, f"--window-size={size}", path.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        # Curves, the sheet of one run and the matrix of the other; the page itself is no wider than the window.
        assert 'data-seen="3 0 false CSS1Compat"' in shown.stdout
        assert "CONSOLE" not in shown.stderr


def test_a_run_of_oddly_named_folders(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 3)):
        for name in ODD_CLASSES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{number}.png")
    values = ["data.name=imagefolder", f"data.root={tmp_path / 'data'}", "data.train_size=null", "data.test_size=null"]
    folder = tmp_path / "run"
    assert train_tiny(folder, *values, *DRAWN, "data.image_size=32", "train.epochs=1", "logging.tensorboard=true") == 0
    evaluation = RunFolder(folder).read_evaluation()
    assert set(evaluation["classes"]) == set(ODD_CLASSES)
    assert sum(count for _, _, count in evaluation["confusion"]) == 15
    page, _ = page_of(tmp_path, folder)
    assert "script" not in page.tags
    assert page.tags.count("img") == 2


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evaluation.json", b'{"a": 1}'),
        ("evaluation.json", b"[" * 5000),
        ("evaluation.json", b"\xff\xfe"),
        ("confusion", "word"),
        ("confusion", [[-1, -1, 18]]),
        ("confusion", [[0, 10, 1]]),
        ("confusion", [[0, 1, 0.5]]),
        ("classes", []),
        ("mistakes", [{}]),
        ("mistakes", [{"index": 0, "label": 99, "predicted": 0, "loss": 1.0}]),
        ("status.json", b'{"state": null, "versions": []}'),
        ("status.json", b'{"state": "completed", "versions": {}, "best": "low"}'),
        ("mistakes.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
        ("metrics.jsonl", b"\n\xff\xfe"),
        ("metrics.jsonl", b'\n{"epoch": 4}'),
        ("metrics.jsonl", b"\n5"),
    ],
)
def test_damaged_files_are_left_out(finished_run: Path, tmp_path: Path, file: str, content: object) -> None:
    run, page = tmp_path / "run", tmp_path / "page.html"
    shutil.copytree(finished_run, run)
    if isinstance(content, bytes):
        # Of metrics a line more, as of a run that was killed while it wrote.
        before = (run / file).read_bytes() if file == "metrics.jsonl" else b""
        (run / file).write_bytes(before + content)
    else:
        evaluation = json.loads((run / "evaluation.json").read_text())
        (run / "evaluation.json").write_text(json.dumps({**evaluation, file: content}))
    assert report.main([str(run), "--html", str(page), "--output", str(tmp_path / "c.png")]) == 0
    left_out = "There is no readable evaluation.json" in page.read_text()
    assert left_out == (file in ("evaluation.json", "confusion", "classes", "mistakes"))
    assert RunFolder(run).read_metrics() == RunFolder(finished_run).read_metrics()
