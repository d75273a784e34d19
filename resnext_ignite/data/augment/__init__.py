"""Augments training images: a chain of random operations, mixup and CutMix, and progressive resizing."""
