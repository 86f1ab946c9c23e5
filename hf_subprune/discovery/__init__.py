"""Which units of a model can be removed.

Takes a model and a batch that it runs on (a synthetic one when left out); gives a `Discovery`: `Block`s, found by what
depends on what, each proved on that batch to shrink exactly, and a `Refusal` with a reason for whatever is left whole.
"""
