"""Data sets brought into shape: folders of pictures packed into shards, ImageNet unpacked as it is distributed."""
