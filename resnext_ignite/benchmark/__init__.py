"""Benchmarks of this project against the alternatives: one module per suite; the command is in `__main__.py`."""
