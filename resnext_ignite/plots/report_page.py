"""Builds the report page of one or more runs: fills the template `report_page.html`, and embeds plots as data URIs."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from resnext_ignite.config.resume import changed_values, differing_values
from resnext_ignite.config.schema import Config, flatten
from resnext_ignite.plots.figures import (
    draw_confusion,
    draw_curves,
    figure_to_png,
    figure_to_svg,
    name_of_evaluation,
    pyplot,
)
from resnext_ignite.runs.class_metrics import metrics_by_class
from resnext_ignite.runs.folder import Record, RunFolder
from resnext_ignite.runtime.storage import write_durably

# With more classes than this, the page shows the confusion matrix as an image instead of a table.
_MOST_CELLS_A_SIDE = 20
_MOST_CLASSES = 50
# Sizes of the curves in inches, chosen so that the text is readable at the width of the page.
_DESKTOP, _PHONE = (8, 8), (4.4, 7)


def save_page(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the report page of the given runs.

    Args:
        runs: name of the run -> its summary from `report.summarize`.
        path: the HTML file.
    """
    page = build_page(runs)
    # The name of a file may contain bytes that are not valid UTF-8.
    write_durably(path, page.encode(errors="replace"))


def build_page(runs: dict[str, dict[str, Any]]) -> str:
    """Return the page as HTML; the template engine escapes all names and values."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["as_json"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template("report_page.html").render(
        runs=[_view(name, run) for name, run in runs.items()],
        curves=_curves({name: run["records"] for name, run in runs.items()}),
        differing=differing_values([run["config"] for run in runs.values()]),
    )


def _curves(records: dict[str, list[Record]]) -> dict[str, str]:
    """Return the curves as data URIs, in four versions: wide (desktop) and narrow (phone), each for light and dark."""
    curves = {}
    # The light page needs no style. The style "default" would reset the settings that `pyplot()` makes.
    styles: dict[str, Any] = {"": {}, "_dark": "dark_background"}
    for suffix, style in styles.items():
        with pyplot().style.context(style):
            for name, size in (("wide", _DESKTOP), ("narrow", _PHONE)):
                curves[name + suffix] = _uri("svg+xml", figure_to_svg(draw_curves(records, size)))
    return curves


def _view(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """Return the values of one run that the page shows."""
    last, status, folder = run["records"][-1], run["status"], run["folder"]
    evaluation, missing = _evaluation_of(folder, last)
    return {
        **run,
        "name": name,
        "last": last,
        "wrong": last["images"] - last["correct"],
        "duration": _duration(run["wall_s"]),
        "reason": status.get("reason"),
        "environment": _environment(status),
        "config": _config_rows(run["config"]),
        "missing": missing,
        "details": _details(evaluation) if evaluation else None,
        "sheet": _sheet(folder, last) if evaluation and evaluation["mistakes"] else None,
    }


def _evaluation_of(folder: RunFolder, last: Record) -> tuple[Record | None, str]:
    """Return the content of `evaluation.json` and an empty string.

    If the file is not readable or does not belong to the last record, return None and the reason.
    """
    evaluation = folder.read_evaluation()
    if not evaluation:
        return (
            None,
            "There is no readable evaluation.json: confusion matrix and mistakes are missing.",
        )
    if any(evaluation[key] != last[key] for key in ("split", "epoch", "iteration")):
        return None, (
            f"evaluation.json is of another evaluation ({name_of_evaluation(evaluation)}) than the last of "
            f"metrics.jsonl ({name_of_evaluation(last)}), so that confusion matrix and mistakes are left out."
        )
    # A resumed run may repeat this evaluation, write `metrics.jsonl`, and be interrupted before it writes
    # `evaluation.json`. Then `metrics.jsonl` is from the second evaluation, and `evaluation.json` from the first. Their
    # counts may differ if the run is not deterministic.
    correct = sum(count for true, predicted, count in evaluation["confusion"] if true == predicted)
    images = sum(count for _, _, count in evaluation["confusion"])
    if (correct, images) != (last["correct"], last["images"]):
        return None, (
            f"evaluation.json counts {correct} of {images} as correct, the last line of metrics.jsonl "
            f"{last['correct']} of {last['images']}: confusion matrix and mistakes are left out."
        )
    return evaluation, ""


def _details(evaluation: Record) -> dict[str, Any]:
    """Return the confusion matrix, the classes (worst first) and the mistakes of an evaluation."""
    classes = evaluation["classes"]
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    for true, predicted, count in evaluation["confusion"]:
        confusion[true, predicted] = count
    worst_first = sorted(metrics_by_class(confusion), key=lambda figures: -(figures.error or 0))
    small = len(classes) <= _MOST_CELLS_A_SIDE
    return {
        "classes": classes,
        "matrix": _matrix(confusion) if small else None,
        "picture": None if small else _uri("png", figure_to_png(draw_confusion(confusion, classes))),
        "by_class": worst_first[:_MOST_CLASSES],
        "mistakes": evaluation["mistakes"],
    }


def _matrix(confusion: Tensor) -> list[list[tuple[int, int]]]:
    """Convert a confusion matrix, int64 (C, C), to rows of pairs (count, percent of the images of the true class)."""
    fractions = (100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)).round().int()
    return [list(zip(*rows, strict=True)) for rows in zip(confusion.tolist(), fractions.tolist(), strict=True)]


def _sheet(folder: RunFolder, last: Record) -> dict[str, str]:
    """Return the image `mistakes.png` under the key `uri`.

    If the image is not readable or does not belong to the last record, return the reason under the key `note`.
    """
    try:
        data = folder.mistakes.read_bytes()
        with Image.open(folder.mistakes) as image:
            drawn = image.info.get("Description", "")
    except FileNotFoundError:
        return {"note": "There is no mistakes.png; a run draws it at its end."}
    except Exception:
        # PIL raises a dozen types of exceptions for damaged files.
        return {"note": "mistakes.png cannot be read and is left out."}
    if drawn != name_of_evaluation(last):
        return {"note": f"mistakes.png is of another evaluation ({drawn or 'unnamed'}) and is left out."}
    return {"uri": _uri("png", data)}


def _config_rows(config: Config) -> list[tuple[str, Any, Any, bool]]:
    """Return a row for each config key: key, value, default, and whether the value differs from the default."""
    changed = changed_values(config, Config())
    return [(key, value, changed.get(key, (value,))[0], key in changed) for key, value in flatten(config).items()]


def _environment(status: Record) -> dict[str, Any]:
    return {**{key: status[key] for key in ("device", "ranks") if key in status}, **status.get("versions", {})}


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
