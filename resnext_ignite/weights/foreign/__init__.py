"""Checkpoints of other systems: recognised, read without running anything, renamed; and written back for them."""
