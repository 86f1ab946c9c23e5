"""What a run keeps and shares, whatever it computes.

Takes results of stages by name; gives a `Workspace`, which keeps them in memory or in files that a stopped run goes on
from, exchanges them between processes, times stages and takes everything back; and files that are whole or not there.
"""
