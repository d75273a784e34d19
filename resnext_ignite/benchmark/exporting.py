"""Measures exported models on the CPU: compares an ONNX file in onnxruntime with the same network in eager mode."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnext_ignite.benchmark.processes import Turn, in_processes
from resnext_ignite.config.schema import config_of
from resnext_ignite.models import create_model
from resnext_ignite.models.inference import Inference
from resnext_ignite.models.resnext import ResNeXt
from resnext_ignite.runs.checkpoint import ModelMetadata
from resnext_ignite.runtime.timing import in_turns, medians, timed
from resnext_ignite.weights.export.formats import Options, onnx_logits, write_onnx

_CPU = torch.device("cpu")
_SIZE, _CLASSES = 32, 10


def has_onnxruntime() -> bool:
    """Return whether the packages for ONNX are installed; they are an optional extra."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript", "onnxruntime"))


def time_eager(name: str, batch_size: int, way: str) -> Turn:
    """Return a function that measures the seconds per batch of the fp32 network; `way` is `plain` or `folded`."""
    return _turn(Inference(_network(name), torch.float32, way), batch_size)


def time_onnxruntime(file: Path, batch_size: int) -> Turn:
    """Return a function that measures the seconds per batch of onnxruntime, which uses as many threads as torch."""
    return _turn(onnx_logits(file, torch.get_num_threads()), batch_size)


def measure_export(name: str, batch_size: int = 32, rounds: int = 2) -> dict[str, Any]:
    """Measure the images/s of fp32 inference on the CPU: the plain network, the folded network and the ONNX file.

    `differences` shows how far the logits of the folded network and of the ONNX file are from those of the plain
    network: the largest absolute difference of each.
    """
    model = _network(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        write_onnx(file, model, _metadata(name), Options())
        makers: dict[str, Callable[[], Turn]] = {
            "eager": partial(time_eager, name, batch_size, "plain"),
            "eager, folded": partial(time_eager, name, batch_size, "folded"),
            "onnxruntime": partial(time_onnxruntime, file, batch_size),
        }
        with in_processes(makers) as ways:
            seconds = in_turns(dict(ways), rounds, f"export, {name}", warm_up=False)
        images = _images(4)
        expected = Inference(model)(images)
        logits = {
            "eager, folded": Inference(model, torch.float32, "folded")(images),
            "onnxruntime": onnx_logits(file, torch.get_num_threads())(images),
        }
    samples = {way: [batch_size / value for value in values] for way, values in seconds.items()}
    speeds = medians(samples)
    return {
        "unit": "images/s",
        "model": name,
        "batch_size": batch_size,
        "image_size": _SIZE,
        "differences": {way: float((found - expected).abs().max()) for way, found in logits.items()},
        "largest_logit": float(expected.abs().max()),
        "failed": ways.failed,
        "samples": samples,
        "ratios": {
            "onnx_vs_eager": speeds["onnxruntime"] / speeds["eager"],
            "onnx_vs_eager_folded": speeds["onnxruntime"] / speeds["eager, folded"],
        },
    }


def _network(name: str) -> ResNeXt:
    torch.manual_seed(0)
    return create_model(name, _CLASSES).eval()


def _metadata(name: str) -> ModelMetadata:
    return ModelMetadata(
        classes=tuple(map(str, range(_CLASSES))),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=_SIZE,
        iteration=0,
        errors={"last": None, "best": None},
        selection="test",
        source=None,
        config=config_of({"model": {"name": name, "num_classes": _CLASSES}}),
    )


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0))


def _turn(network: Callable[[Tensor], Tensor], batch_size: int) -> Turn:
    images = _images(batch_size)
    return lambda: timed(_CPU, lambda: network(images))
