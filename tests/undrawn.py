"""`python -m experiments.run` whose report has no figures, for tests of something else.

Drawing them takes longer than many a run of the tests. tests/experiments/test_report.py draws every kind.
"""

from __future__ import annotations

import sys
from typing import Any

from experiments.report import page


def blank(*_: Any) -> str:
    """An empty picture in place of a plot."""
    return "<svg></svg>"


page.draw = blank

if __name__ == "__main__":
    from experiments.run import __main__ as command

    sys.exit(command.main())
