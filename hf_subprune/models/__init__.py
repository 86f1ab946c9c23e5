"""A torch model in itself: what it is made of, how it is run, and how it is set up to be worked on.

Takes models of Transformers and their modules; gives linears of every kind as one matrix on rows, hooks and forwards
that leave no trace, weights that lie elsewhere, and `session`, within which a model can be observed and shrunk. It
knows nothing of samples, budgets or reports. What a model stacks in one tensor is taken apart by a form (see `forms`).
"""
