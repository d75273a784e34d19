"""Augmentation of training images: a chain of keyed operations, mixup and CutMix, and progressive resizing."""
