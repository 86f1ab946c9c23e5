"""Units taken out of a model, and put back.

Takes a model, a `Block`, the units to keep and new weights; gives an `Edit` that is in place, whose `undo` puts back
the very objects, or a mask in its stead, and the proof that the shrunk model computes what the masked one does.
"""
