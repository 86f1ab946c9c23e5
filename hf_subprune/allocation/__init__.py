"""How many units each block keeps.

Takes a model, `Samples` and the configs of one or several sizes; gives a `Survey` (blocks, costs of the targets, what
each block would lose at any width) and, of it, the `Widths` of one size. Nothing of the model is changed.
"""
