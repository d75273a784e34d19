"""Plots of curves, confusion matrices, calibration and images, and the report page."""
