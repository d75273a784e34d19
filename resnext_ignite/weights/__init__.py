"""Reads weights of other runs and systems, and exports models."""
