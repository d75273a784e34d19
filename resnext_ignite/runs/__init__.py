"""This package reads and writes the files of a run: its folder, the records in the folder, and its checkpoints."""
