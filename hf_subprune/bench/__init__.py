"""What this package takes and gains on the machine at hand.

Takes settings, most of them from `hf-subprune bench`; gives rows of JSON types and a table of each. Nothing else
imports it.
"""
