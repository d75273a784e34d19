"""What a run leaves on disk: its folder, the records in it, and its checkpoint files."""
