"""Checkpoints of other systems: recognise them, read them without running code, rename weights in both directions."""
