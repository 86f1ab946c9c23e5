"""What every test process starts with.

One thread: there are as many processes as cores, and threads without a core stall the others. Tables of one width,
whatever the terminal's.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("COLUMNS", "120")
