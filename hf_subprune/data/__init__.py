"""Samples that a model can be run on.

Takes what the user gives as data, a model and a processing class; gives `Samples`: batches to fit on, batches that are
held out, and which of their rows are real tokens. Labels are left behind, except for the tasks of `evaluation`. Where
there is no text, a language model makes up its own.
"""
