"""What a model costs and how well it does, before and after.

Takes models and batches; gives costs (parameters, multiply-accumulates, latency), the `Drift` of one model's output
from another's, and figures of labelled tasks with their intervals. Nothing of a model is changed.
"""
