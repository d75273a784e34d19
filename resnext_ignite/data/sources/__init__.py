"""Reads images from CIFAR's archives, image folders and tar shards, and generates the data set `shapes`."""
