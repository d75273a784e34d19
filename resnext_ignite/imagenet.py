"""Unpacks ImageNet: `python -m resnext_ignite.imagenet --train TAR --val TAR --devkit TAR --output DIR`.

The command unpacks the archives of ILSVRC2012 into a folder that training can read. After an interruption, run the same
command again; it resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_ignite.packing.options import IMAGES_PER_SHARD, add_arguments, at_least, encoding_of, require, workers_of
from resnext_ignite.runtime.errors import PreemptedError, run_command

# ILSVRC2012: Russakovsky et al., 'ImageNet Large Scale Visual Recognition Challenge', IJCV 2015, table 2.
_CLASSES, _TRAIN_IMAGES, _VAL_IMAGES = 1000, 1_281_167, 50_000


def main(arguments: list[str]) -> int:
    """Run the command; raise ResnextError for an error that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.imagenet",
        description="Unpack ILSVRC2012 into train/<class>/ and val/<class>/. Each source may be a folder with its "
        "archive's contents. After an interruption, the same command resumes.",
    )
    parser.add_argument("--train", required=True, metavar="TAR|DIR", help="ILSVRC2012_img_train.tar")
    parser.add_argument("--val", required=True, metavar="TAR|DIR", help="ILSVRC2012_img_val.tar")
    parser.add_argument("--devkit", required=True, metavar="TAR|DIR", help="ILSVRC2012_devkit_t12.tar.gz")
    parser.add_argument("--output", required=True, metavar="DIR", help="where train/, val/ and classes.txt go")
    add_arguments(parser)
    parser.add_argument("--shards", action="store_true", help="also pack the images, into DIR/shards")
    for option, default in (("classes", _CLASSES), ("train-images", _TRAIN_IMAGES), ("val-images", _VAL_IMAGES)):
        parser.add_argument(f"--{option}", type=int, default=default, metavar="N", help=f"expected ({default})")
    parsed = parser.parse_args(arguments)
    for option, value in (
        ("--classes", parsed.classes),
        ("--train-images", parsed.train_images),
        ("--val-images", parsed.val_images),
    ):
        at_least(option, value, 1)
    encoding, workers, output = encoding_of(parsed), workers_of(parsed), Path(parsed.output)
    require("scipy", "webdataset")
    from resnext_ignite.packing.ilsvrc import Archives, Expected, prepare

    try:
        sources = Archives(Path(parsed.train), Path(parsed.val), Path(parsed.devkit))
        expected = Expected(parsed.classes, parsed.train_images, parsed.val_images)
        prepare(sources, output, expected, encoding, workers)
        print(
            f"{output}: {expected.classes} classes, {expected.train_images} training images, "
            f"{expected.val_images} validation images",
            flush=True,
        )
        if parsed.shards:
            _pack(output, workers)
    except KeyboardInterrupt:
        raise PreemptedError(f"{output}: stopped; the same command resumes") from None
    return 0


def _pack(output: Path, workers: int) -> None:
    from resnext_ignite.packing.options import Encoding
    from resnext_ignite.packing.shards import Limit, is_packed, pack_folder

    shards = output / "shards"
    if is_packed(shards, ("train", "val")):
        print(f"{shards}: is packed already")
        return
    for split in pack_folder(output, shards, Limit(IMAGES_PER_SHARD), Encoding(), workers):
        print(split)


if __name__ == "__main__":
    run_command(main, prints_result=False)
