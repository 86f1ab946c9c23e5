"""`python -m hf_subprune.cli`, and what `accelerate launch -m` starts."""

from . import main

if __name__ == "__main__":
    main()
