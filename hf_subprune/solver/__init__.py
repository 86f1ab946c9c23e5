"""Which units of a block to keep, new weights on them, and how good both are: tensors in, tensors out.

Takes the second moments of a consumer's inputs with its weight (`problem.Problem`), and `settings.Settings`; gives
what to keep and the new weights (`solve.solve`), the units of blocks that must all keep the same ones (`tied`), and
what a block loses at every width (`curves`). Imports torch, and nothing of the rest of the package.
"""
