"""The mathematics of one block, on tensors only.

Takes the `Problem` of a block (its moments, weight, columns of units) and `Settings`; gives which `k` units to keep,
the new weights of what reads them, how good both are, and the error at every `k`. Knows no model and no data.
"""
