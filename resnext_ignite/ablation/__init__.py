"""Ablations: what a plan asks for, what its runs' errors say together, and how that is drawn.

The runs themselves are `train.run`'s; `python -m resnext_ignite.ablate` makes them one after the other.
"""
