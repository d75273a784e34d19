"""This package compares the speed of this project with that of its alternatives.

`__main__.py` has the command. The other modules measure the suites.
"""
