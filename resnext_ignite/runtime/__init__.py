"""Modules that all other subpackages use: errors, signals, files, console, device, timing, tables, model names."""
