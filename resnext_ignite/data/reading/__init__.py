"""Turns image files into pixels: decodes and crops them, in worker processes or on a GPU."""
