"""The command line over everything else: `hf-subprune inspect | prune | evaluate | report | push | export | ...`.

Takes words of a shell; gives tables, folders, and one line instead of a traceback where the user can mend something.
"""

from .commands import app, main

__all__ = ["app", "main"]
