"""What happens to training images on the device: a chain of keyed operations, mixing, and the growing image size."""
