"""Prepares data sets: packs folders of images into tar shards, and unpacks ImageNet from its archives."""
