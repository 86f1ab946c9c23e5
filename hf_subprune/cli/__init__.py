"""The command line over everything else: `hf-subprune inspect | prune | evaluate | report | push | demo | bench`."""

from .commands import app, main

__all__ = ["app", "main"]
