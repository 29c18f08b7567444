"""Errors that a user can mend: each message names the key or file, what was found there and what to do.

Everything raised as `UserError` is shown by the command line as one message without a traceback and ends the process
with exit code 2. An `assert` elsewhere in the package means a defect of ours.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from typing import Self


class UserError(ValueError):
    """Bad input: a key, a value or a file that the user can change.

    Attributes:
        problem: what is wrong, and the fix.
        key: the dotted setting that is wrong; empty where the problem says it, or is about none. Whoever passes the
            error on replaces or prefixes it: see `with_key` and `under`.
        value: the setting's value, where the message shows it behind the key.
    """

    def __init__(self, problem: str, key: str = "", value: object = None) -> None:
        super().__init__(problem)
        self.problem, self.key, self.value = problem, key, value

    def __str__(self) -> str:
        shown = self.key if self.value is None else f"{self.key}={self.value}"
        return f"{shown}: {self.problem}" if self.key else self.problem

    def with_key(self, key: str) -> Self:
        """The same error about another key."""
        error = copy.copy(self)
        error.key = key
        return error

    def under(self, prefix: str) -> Self:
        """The same error with its key below `prefix`, as in `prefix.key`."""
        return self.with_key(f"{prefix}.{self.key}" if self.key else prefix)


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
