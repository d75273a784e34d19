"""Converts checkpoints from and to other systems: `python -m resnext_ignite.convert --checkpoint FILE --output FILE`.

By default, the command reads a checkpoint of another system and writes a checkpoint of this project, which can be
evaluated or used as `model.pretrained`. With `--to`, it reads a checkpoint of this project and writes weights for
another system.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_ignite.runtime.errors import ConfigError, run_command
from resnext_ignite.runtime.storage import check_output_path

# "auto", and the names in `weights/foreign/systems.py`. The names are repeated here, because importing that module also
# imports torch, which would slow down `--help`.
_SYSTEMS = (
    "auto",
    "resnext.pytorch",
    "pytorch-classification",
    "pytorch-cifar100",
    "torchvision",
    "timm",
    "torch7",
    "caffe",
    "mxnet",
    "gluoncv",
)
_TARGETS = ("resnext_ignite", "torchvision", "timm", "resnext.pytorch")
# Names from earlier versions, which are still accepted.
_EARLIER_NAMES = {"seed": "resnext.pytorch", "ours": "resnext_ignite"}


def convert(checkpoint: Path, output: Path, source: str, target: str) -> str:
    """Convert the file `checkpoint` to the file `output`, and return a one-line report.

    Raises:
        CheckpointError: the checkpoint cannot be used. If a weight does not fit, the message names the weight.
    """
    import torch

    from resnext_ignite.runs.checkpoint import load_model, save_checkpoint
    from resnext_ignite.runtime.storage import replace_durably
    from resnext_ignite.weights.foreign.conversion import checkpoint_of
    from resnext_ignite.weights.foreign.reading import read_foreign
    from resnext_ignite.weights.foreign.systems import renamed_for

    if target == "resnext_ignite":
        read = read_foreign(checkpoint, source)
        save_checkpoint(output, checkpoint_of(read))
        network = read.network
        return f"{output}: {network.name}, {network.num_classes} classes, from {read.source}"
    model, metadata = load_model(checkpoint)
    weights = renamed_for(target, model.state_dict(), checkpoint)
    replace_durably(output, lambda file: torch.save(weights, file))
    return f"{output}: {metadata.config.model.name}, {len(metadata.classes)} classes, for {target}"


def _name(text: str) -> str:
    return _EARLIER_NAMES.get(text, text)


def main(arguments: list[str]) -> int:
    """Run the command; raise ResnextError for an error that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.convert",
        description="Convert a checkpoint of another system to this project, or one of this project to another system.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=_name,
        choices=_SYSTEMS,
        default="auto",
        help="system that wrote the checkpoint; default: recognised from it",
    )
    parser.add_argument(
        "--to",
        dest="target",
        type=_name,
        choices=_TARGETS,
        default="resnext_ignite",
        help="system to write for; default: resnext_ignite",
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE|RUN", help="the checkpoint to read")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parsed = parser.parse_args(arguments)
    output = Path(parsed.output)
    check_output_path("--output", output, new=True)
    if parsed.target != "resnext_ignite" and parsed.source != "auto":
        raise ConfigError(
            f"--from {parsed.source}: with --to {parsed.target} a checkpoint of this project is read; leave out --from"
        )
    print(convert(Path(parsed.checkpoint), output, parsed.source, parsed.target))
    return 0


if __name__ == "__main__":
    run_command(main, prints_result=False)
