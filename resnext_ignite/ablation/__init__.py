"""This package reads the plan of an ablation, and compares and draws the errors of the ablation's runs.

`ablate.py` has the command; the command trains the runs, one after the other.
"""
