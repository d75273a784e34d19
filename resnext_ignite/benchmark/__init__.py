"""This package compares this project with the alternatives: one module per suite, and the command in `__main__.py`."""
