"""Training on several ranks.

`launch` starts the ranks, `ranks` has their collectives, `stopping` makes them stop at the same iteration, `ddp`
wraps the model, and `failures` reports errors.
"""
