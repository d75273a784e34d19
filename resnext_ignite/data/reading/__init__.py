"""From image files to pixels: decoding and cropping, in worker processes or on a GPU."""
