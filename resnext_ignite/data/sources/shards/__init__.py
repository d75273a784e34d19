"""Reads tar shards of WebDataset's layout: the list of shards, `<split>/shards.json`, and the images in the shards."""

from resnext_ignite.data.sources.shards.index import ShardIndex, index_shards, shard_classes
from resnext_ignite.data.sources.shards.listing import LIST_NAME, Shard, ShardList, read_shard_list
from resnext_ignite.data.sources.shards.members import Members

__all__ = [
    "LIST_NAME",
    "Members",
    "Shard",
    "ShardIndex",
    "ShardList",
    "index_shards",
    "read_shard_list",
    "shard_classes",
]
