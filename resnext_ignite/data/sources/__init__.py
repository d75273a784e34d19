"""Where images come from: CIFAR's archives, folders, tar shards, and the images that this package draws."""
