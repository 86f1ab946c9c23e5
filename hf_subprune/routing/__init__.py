"""Whole experts of mixture-of-experts layers: which of them go.

Takes a model, `Samples` and a config with `"experts"` among its units; gives the model without those experts whose
absence changes a layer's output least, the second projections of the others fitted to make up for them, and a report
of each layer. It is a step in front of the others, on a router's tokens instead of a block's moments.
"""
