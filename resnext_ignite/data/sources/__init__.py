"""Reads the sources of images: CIFAR's archives, image folders and tar shards; generates the data set `shapes`."""
