"""Weights from other runs and systems, and the export of models."""
