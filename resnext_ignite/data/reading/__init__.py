"""From image files to pixels: decoding, cropping, the worker processes that do it, and decoding on a GPU."""
