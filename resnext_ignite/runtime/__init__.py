"""What every other room builds on: errors, signals, files, the console, the device, timing, tables."""
