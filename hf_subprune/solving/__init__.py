"""From a survey and widths to a model that is shrunk, block by block, and to the report of what that did.

Takes a `Survey`, the `Widths` of one size and a `Workspace`; gives `Solved`: edits that are in place, and a report of
each block; then `outcome`, the report of the whole.
"""
