"""What people look at: curves, confusion matrices, sheets of images, and the report page."""
