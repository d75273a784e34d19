"""This package reads the plan of an ablation, compares the errors of its runs, and plots them.

`ablate.py` implements the command, which trains the runs one after the other.
"""
