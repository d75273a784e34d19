"""Training on several ranks.

`launch` starts the ranks, `ranks` has their collectives, `stopping` lets them agree on stops, `ddp` wraps the model,
and `failures` reports errors.
"""
