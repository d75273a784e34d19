"""The basis of all other subpackages: errors, signals, files, the console, the device, timing, tables."""
