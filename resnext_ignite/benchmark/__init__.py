"""This package compares the speed of this project with that of its alternatives.

`__main__.py` implements the command. The other modules implement the suites of measurements and their helpers.
"""
