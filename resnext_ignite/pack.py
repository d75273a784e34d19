"""Packs folders into tar shards: `python -m resnext_ignite.pack FOLDER --output DIR`; `--check DIR` checks shards.

Training then reads a few large files sequentially, instead of opening a million small files one by one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_ignite.packing.options import IMAGES_PER_SHARD, add_arguments, at_least, encoding_of, require, workers_of
from resnext_ignite.runtime.errors import ConfigError, run_command


def main(arguments: list[str]) -> int:
    """Run the command; raise ResnextError for an error that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m resnext_ignite.pack",
        description="Pack a folder of images (train/<class>/*, val|test/<class>/*) into tar shards.",
    )
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="holds train/, val/ or test/")
    parser.add_argument("--output", metavar="DIR", help="where the shards go")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--images-per-shard", type=int, metavar="N", help=f"default: {IMAGES_PER_SHARD}")
    size.add_argument("--shard-mb", type=int, metavar="N", help="instead: largest size of a shard, in megabytes")
    add_arguments(parser)
    parser.add_argument("--check", metavar="DIR", help="pack nothing: check the shards in there")
    parsed = parser.parse_args(arguments)
    if (parsed.check is None) == (parsed.folder is None):
        raise ConfigError("FOLDER --output DIR packs, --check DIR checks; give one of the two")
    if (parsed.folder is None) != (parsed.output is None):
        raise ConfigError("FOLDER, --output DIR: both are needed to pack, and neither to check")
    at_least("--images-per-shard", parsed.images_per_shard, 1)
    at_least("--shard-mb", parsed.shard_mb, 1)
    encoding, workers = encoding_of(parsed), workers_of(parsed)
    require("webdataset")
    from resnext_ignite.packing.shards import Limit, check_folder, pack_folder

    if parsed.check is not None:
        splits = check_folder(Path(parsed.check))
    else:
        images = parsed.images_per_shard or (None if parsed.shard_mb else IMAGES_PER_SHARD)
        limit = Limit(images, parsed.shard_mb and parsed.shard_mb * 10**6)
        splits = pack_folder(Path(parsed.folder), Path(parsed.output), limit, encoding, workers)
    for split in splits:
        print(split)
    return 0


if __name__ == "__main__":
    run_command(main, prints_result=False)
