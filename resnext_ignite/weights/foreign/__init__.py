"""Recognises checkpoints of other systems, reads them without running their code, and translates weight names."""
