"""Writes exported models. Each writer compares the new file with the model before it renames the file to `path`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from resnext_ignite.runs.checkpoint import ModelMetadata
from resnext_ignite.runtime.errors import CheckpointError
from resnext_ignite.runtime.storage import replace_durably, write_durably
from resnext_ignite.weights.export.networks import prepare_for_export, program_of, reference, traced_images
from resnext_ignite.weights.foreign.metadata import as_strings

# torch's exporter writes this opset directly; other opsets need a conversion. Runtimes have supported it since 2023.
OPSET = 18
# The largest accepted difference between an exported and an original logit, relative to max(1, largest absolute logit).
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Options:
    """The options of an export.

    Args:
        uint8: include the normalisation in the exported model. Its inputs are uint8 images (0 to 255) in this case, and
            normalised float32 images otherwise.
        fold: fold each BatchNorm into the convolution before it.
    """

    uint8: bool = False
    fold: bool = True


def write_onnx(path: Path, model: nn.Module, metadata: ModelMetadata, options: Options) -> float:
    """Write an ONNX file that includes the weights.

    Return the `largest_difference` of the logits that onnxruntime computes from this file.

    Raises:
        CheckpointError: the logits differ from the model's by more than TOLERANCE; nothing is written.
    """
    import onnx

    network = prepare_for_export(model, metadata.mean, metadata.std, uint8=options.uint8, fold=options.fold)
    with _quiet():
        program = torch.onnx.export(
            network,
            (traced_images(uint8=options.uint8),),
            dynamo=True,
            dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            external_data=False,
            # The exporter's optimiser also folds BatchNorm, so without `fold` it must not run.
            optimize=options.fold,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        # Remove the stack traces, which hold local paths.
        del node.metadata_props[:]
    onnx.helper.set_model_props(proto, export_metadata(metadata, options))
    difference = 0.0

    def check(temporary: Path) -> None:
        nonlocal difference
        onnx.checker.check_model(temporary, full_check=True)
        difference = _checked(path, onnx_logits(temporary), model, metadata, options)

    write_durably(path, proto.SerializeToString(), before_rename=check)
    return difference


def onnx_logits(path: Path, threads: int = 0) -> Callable[[Tensor], Tensor]:
    """Return a function that runs an ONNX file on the CPU with onnxruntime: images (N, 3, H, W) -> logits.

    Args:
        threads: number of threads; 0 for onnxruntime's default.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_program(path: Path, model: nn.Module, metadata: ModelMetadata, options: Options) -> float:
    """Write a torch.export file that includes `metadata.json`, and return the `largest_difference` of its logits.

    Raises:
        CheckpointError: as in `write_onnx`.
    """
    network = prepare_for_export(model, metadata.mean, metadata.std, uint8=options.uint8, fold=options.fold)
    with _quiet():
        program = program_of(network, uint8=options.uint8)
    extra = {"metadata.json": json.dumps(export_metadata(metadata, options))}
    difference = 0.0

    def write(file: IO[bytes]) -> None:
        with _quiet():
            torch.export.save(program, file, extra_files=extra)

    def check(temporary: Path) -> None:
        nonlocal difference
        with _quiet(), temporary.open("rb") as file:
            loaded = torch.export.load(file).module()
        difference = _checked(path, loaded, model, metadata, options)

    replace_durably(path, write, before_rename=check)
    return difference


def write_weights(path: Path, model: nn.Module, metadata: ModelMetadata) -> None:
    """Write a safetensors file with the weights, under this project's names, and with the model's metadata.

    Raises:
        CheckpointError: when the file is read back, its weights differ from the model's; the new file is removed.
    """
    from safetensors.torch import load, save

    weights = model.state_dict()

    def check(temporary: Path) -> None:
        found = load(temporary.read_bytes())
        if found.keys() != weights.keys() or not all(torch.equal(found[name], weights[name]) for name in weights):
            raise CheckpointError(f"{path}: the weights read back differ from those written; the storage is failing")

    write_durably(path, save(weights, as_strings(metadata)), before_rename=check)


def export_metadata(metadata: ModelMetadata, options: Options) -> dict[str, str]:
    """Return the metadata of an exported model as strings: its name, its classes and the format of its inputs."""
    return {
        "model_name": metadata.config.model.name,
        "classes": json.dumps(metadata.classes, ensure_ascii=False),
        "mean": json.dumps(metadata.mean),
        "std": json.dumps(metadata.std),
        "image_size": str(metadata.image_size),
        "input": "uint8, 0 to 255" if options.uint8 else "float32, (value / 255 - mean) / std",
    }


def largest_difference(
    logits: Callable[[Tensor], Tensor], model: nn.Module, metadata: ModelMetadata, options: Options
) -> float:
    """Return the largest difference between the logits of an exported model and of the original model in eager mode.

    The difference is relative to max(1, largest absolute logit of the original model). There are two input batches: one
    image of the model's image size, and three smaller images, which are wider than high and have odd sides.

    Args:
        logits: runs the exported model.
        model: the original model.
    """
    generator = torch.Generator().manual_seed(0)
    size = metadata.image_size
    worst = 0.0
    for shape in ((1, 3, size, size), (3, 3, size // 2 | 1, 3 * size // 4 | 1)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        if not options.uint8:
            images = torch.randn(shape, generator=generator)
        expected = reference(model, images, metadata.mean, metadata.std)
        with torch.inference_mode():
            difference = (logits(images) - expected).abs().max() / expected.abs().max().clamp(min=1)
        # A NaN counts as an infinite difference.
        worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst


def _checked(
    path: Path, logits: Callable[[Tensor], Tensor], model: nn.Module, metadata: ModelMetadata, options: Options
) -> float:
    difference = largest_difference(logits, model, metadata, options)
    if difference > TOLERANCE:
        raise CheckpointError(
            f"{path}: its logits differ by {difference:.1e} from the model's, relative to max(1, largest logit); "
            f"at most {TOLERANCE:.0e} is allowed, and nothing is written; try --no-fold"
        )
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of torch's exporters."""
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", kind)
        yield
