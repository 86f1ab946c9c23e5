"""Pruning around and during training.

Takes a model with a `Trainer` or samples; gives `SubpruneCallback`, which prunes before, after or during training, and
`recover`, which distils the original into the pruned model.
"""
