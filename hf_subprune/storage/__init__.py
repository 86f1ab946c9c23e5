"""How a pruned model is stored and built again.

Takes a shrunk model; gives its layout, stock where its config can say the widths, ragged where they are listed beside
it, the code that loads it without this package, and skeletons of stored models to be filled layer by layer.
"""
