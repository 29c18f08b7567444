"""The commands: `python -m experiments.NAME ...`, or `upge NAME ...`."""

import sys

from experiments import packages

# `python -m experiments.NAME` imports this package while Python still looks for the command's module. The commands
# import optional packages at the top of their files, so a missing one cannot be handled there.
if sys.argv[:1] == ["-m"]:
    packages.explain_missing()
