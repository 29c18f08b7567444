"""`python -m tests.local_model PATH`: prints the folder of the model, converted if it is a file."""

from __future__ import annotations

import sys

from upge.models import local_path

if __name__ == "__main__":
    print(local_path(sys.argv[1]))
