"""This package reads the plan of an ablation, compares the errors of its runs, and draws them.

`ablate.py` has the command, which trains one run after the other.
"""
