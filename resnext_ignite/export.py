"""Exports a model: `python -m resnext_ignite.export --checkpoint FILE|RUN --format onnx --output FILE`.

The formats are ONNX, torch.export and safetensors. The checkpoint is from this project or from another system. The
command checks the exported file before the file gets its final name. It writes a model card beside the file.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from resnext_ignite.runtime.errors import ConfigError, run_command
from resnext_ignite.runtime.storage import check_output_path

# Format -> required suffix of the output file. Other programs recognise the format by this suffix.
_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}


def export(checkpoint: Path, format: str, output: Path, *, uint8: bool, fold: bool) -> str:
    """Read a checkpoint, write and check the exported file, and return a one-line report.

    Raises:
        CheckpointError: the checkpoint cannot be used, or the exported file does not reproduce the model.
    """
    from resnext_ignite.weights.export.formats import OPSET, Options
    from resnext_ignite.weights.export.write import export_model
    from resnext_ignite.weights.loading import open_model

    model, metadata = open_model(checkpoint)
    card = card_path(output)
    difference = export_model(output, card, model, metadata, format, Options(uint8=uint8, fold=fold))
    notes = [f"opset {OPSET}"] if format == "onnx" else []
    if difference is None:
        notes.append("read back equal")
    else:
        notes.append(f"largest logit difference {difference:.1e}, relative to max(1, largest logit)")
    if metadata.source is not None:
        notes.append(f"the checkpoint states no size, normalisation or classes; those of {metadata.source} are used")
    return f"{output}: {', '.join(notes)}; model card: {card}"


def card_path(output: Path) -> Path:
    """Return the path of the model card of an exported file."""
    return output.with_name("README.md")


def check_options(format: str, output: Path, *, changed: bool) -> None:
    """Check the options before the export starts, so that a wrong option does not waste the time of an export.

    Args:
        changed: whether `--uint8` or `--no-fold` is given. These options change the exported network, but a
            safetensors file holds only weights.

    Raises:
        ConfigError: the output file or the model card exists already, an option does not fit the format, or a folder or
            package is missing.
    """
    card = card_path(output)
    if output.suffix != _SUFFIXES[format]:
        raise ConfigError(f"--output {output}: a file of {format} ends in {_SUFFIXES[format]}")
    check_output_path("--output", output, new=True)
    if card.exists():
        raise ConfigError(f"--output {output}: the model card {card} exists already; choose another folder")
    if format == "safetensors" and changed:
        raise ConfigError("--uint8, --no-fold: a safetensors file holds no network; leave these options out")
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            if importlib.util.find_spec(name) is None:
                raise ConfigError(f"--format onnx: {name} is missing; pip install 'resnext-ignite[export]'")


def main(arguments: list[str]) -> int:
    """Run the command; raise ResnextError for an error that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.export", description="Write a model as ONNX, torch.export or safetensors."
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="FILE|RUN", help="a checkpoint of this project or of another system"
    )
    parser.add_argument("--format", required=True, choices=tuple(_SUFFIXES))
    parser.add_argument("--output", required=True, metavar="FILE", help="README.md is written beside it")
    parser.add_argument(
        "--uint8", action="store_true", help="take uint8 images, 0 to 255, and normalise inside the model"
    )
    parser.add_argument("--no-fold", action="store_true", help="do not fold BatchNorm into the convolutions")
    parsed = parser.parse_args(arguments)
    output = Path(parsed.output)
    check_options(parsed.format, output, changed=parsed.uint8 or parsed.no_fold)
    print(export(Path(parsed.checkpoint), parsed.format, output, uint8=parsed.uint8, fold=not parsed.no_fold))
    return 0


if __name__ == "__main__":
    run_command(main, prints_result=False)
