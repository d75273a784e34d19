"""Exports a model to one format, with its model card."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from torch import nn

from resnext_ignite import __version__
from resnext_ignite.runs.checkpoint import ModelMetadata
from resnext_ignite.runtime.storage import write_durably
from resnext_ignite.weights.export.formats import Options, write_onnx, write_program, write_weights
from resnext_ignite.weights.export.model_card import ExportedModel, model_card

_WRITTEN_WITH = {"onnx": ("torch", "onnx", "onnxscript", "onnxruntime"), "torch-export": ("torch",)}


def export_model(
    output: Path, card: Path, model: nn.Module, metadata: ModelMetadata, format: str, options: Options
) -> float | None:
    """Write a model as `onnx`, `torch-export` or `safetensors`, and its model card.

    Return the `largest_difference` of the exported logits (`formats.py`), or None for safetensors.

    Raises:
        CheckpointError: the exported file does not reproduce the model; nothing is written.
        OSError: a file cannot be written. If only the card fails, the exported file is removed.
    """
    difference = None
    if format == "onnx":
        difference = write_onnx(output, model, metadata, options)
    elif format == "torch-export":
        difference = write_program(output, model, metadata, options)
    else:
        write_weights(output, model, metadata)
    packages = _WRITTEN_WITH.get(format, ("torch", "safetensors"))
    versions = {"resnext_ignite": __version__, **{name: version(name) for name in packages}}
    try:
        text = model_card(metadata, ExportedModel(output.name, format, options, difference, versions))
        write_durably(card, text)
    except BaseException:
        output.unlink()
        raise
    return difference
