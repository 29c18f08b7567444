"""Errors that a user can mend: each message names the key or file, what was found there and what to do.

Everything raised as `UserError` is shown by the command line as one message without a traceback and ends the process
with exit code 2. An `assert` elsewhere in the package means a defect of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: a key, a value or a file that the user can change."""


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class DataError(UserError):
    """A data file, a row or a column that cannot be used."""


class ModelError(UserError):
    """A model or tokenizer that cannot be found or used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped `name`: the closest known name, else the list of all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(known) if known else "nothing is known here"
