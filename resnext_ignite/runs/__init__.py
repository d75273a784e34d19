"""The files of a run: its folder, the records in it, and its checkpoints."""
