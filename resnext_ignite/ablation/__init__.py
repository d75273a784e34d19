"""Ablations: the plan, the statistics of its runs' errors, and their plot.

`python -m resnext_ignite.ablate` makes the runs one after the other, each by `train.run`.
"""
