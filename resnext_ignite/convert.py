"""Checkpoints of other systems, to and fro: `python -m resnext_ignite.convert --checkpoint FILE --output FILE`.

What comes out can be evaluated, or start a training (`model.pretrained`); or, with `--to`, opens in the other system.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_ignite.runtime.errors import ConfigError, run_command
from resnext_ignite.runtime.storage import check_place

# Of resnext_ignite.weights.foreign, which needs torch.
_SOURCES = (
    "auto",
    "seed",
    "pytorch-classification",
    "pytorch-cifar100",
    "torchvision",
    "timm",
    "torch7",
    "caffe",
    "mxnet",
    "gluoncv",
)
_TARGETS = ("ours", "torchvision", "timm", "seed")


def convert(checkpoint: Path, output: Path, source: str, target: str) -> str:
    """Read one file and write the other; what was done, in a line.

    Raises:
        CheckpointError: the file cannot be used; the line names the first weight that does not fit.
    """
    import torch

    from resnext_ignite.runs.checkpoint import load_model, save_checkpoint
    from resnext_ignite.runtime.storage import replace_durably
    from resnext_ignite.weights.foreign.adopted import checkpoint_of
    from resnext_ignite.weights.foreign.reading import read_foreign
    from resnext_ignite.weights.foreign.systems import renamed_for

    if target == "ours":
        model = read_foreign(checkpoint, source)
        save_checkpoint(output, checkpoint_of(model))
        network = model.network
        return f"{output}: {network.name}, {network.num_classes} classes, from {model.source}"
    ours, metadata = load_model(checkpoint)
    weights = renamed_for(target, ours.state_dict(), checkpoint)
    replace_durably(output, lambda file: torch.save(weights, file))
    return f"{output}: {metadata.config.model.name}, {len(metadata.classes)} classes, for {target}"


def main(arguments: list[str]) -> int:
    """The command; raises ResnextError for what a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.convert", description="Turn checkpoints of other systems into ours, and back."
    )
    parser.add_argument("--from", dest="source", choices=_SOURCES, default="auto", help="default: told by the file")
    parser.add_argument("--to", dest="target", choices=_TARGETS, default="ours", help="default: ours")
    parser.add_argument("--checkpoint", required=True, metavar="FILE|RUN", help="what is read")
    parser.add_argument("--output", required=True, metavar="FILE", help="what is written")
    parsed = parser.parse_args(arguments)
    output = Path(parsed.output)
    check_place("--output", output, new=True)
    if parsed.target != "ours" and parsed.source != "auto":
        raise ConfigError(f"--from {parsed.source}: with --to {parsed.target} a checkpoint of this project is read")
    print(convert(Path(parsed.checkpoint), output, parsed.source, parsed.target))
    return 0


if __name__ == "__main__":
    run_command(main, prints_result=False)
