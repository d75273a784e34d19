"""This package draws curves, confusion matrices, calibration and images, and builds the report page."""
