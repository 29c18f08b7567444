"""`python -m experiments COMMAND ...` is `upge COMMAND ...`."""

import sys

from experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
