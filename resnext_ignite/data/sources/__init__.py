"""The sources of images: CIFAR's archives, image folders, tar shards, and the generated data set `shapes`."""
