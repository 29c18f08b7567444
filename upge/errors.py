"""Errors that a user can fix, and errors that end a run in an orderly way.

The message of a `UserError` names the key or file, what was found there and what to do. The command line prints it
without a traceback and exits with code 2. A failed `assert` elsewhere in the package is a bug in the package.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Sequence
from typing import Self


class UserError(ValueError):
    """Bad input: a key, a value or a file that the user can change.

    Attributes:
        problem: what is wrong, and the fix.
        key: the dotted key of the setting; empty if the problem names it or concerns no setting. A caller replaces or
            prefixes it with `with_key` and `under`.
        value: the setting's value; None = the message does not show it after the key.
        is_shared: True if all ranks of a run raise it, so that one of them prints it.
    """

    is_shared = False

    def __init__(self, problem: str, key: str = "", value: object = None) -> None:
        super().__init__(problem)
        self.problem, self.key, self.value = problem, key, value

    def __str__(self) -> str:
        shown = self.key if self.value is None else f"{self.key}={self.value}"
        return f"{shown}: {self.problem}" if self.key else self.problem

    def with_key(self, key: str) -> Self:
        """A copy of this error with another key."""
        error = copy.copy(self)
        error.key = key
        return error

    def under(self, prefix: str) -> Self:
        """A copy of this error with the key `prefix.key`."""
        return self.with_key(f"{prefix}.{self.key}" if self.key else prefix)


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class ConfigErrors(ConfigError):
    """Several configuration keys or values that cannot be used, one per line of the message.

    Attributes:
        problems: the errors, in the order in which they were found.
    """

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        super().__init__("\n".join([f"{len(problems)} settings cannot be used", *(f"  {one}" for one in problems)]))
        self.problems = tuple(problems)

    def under(self, prefix: str) -> ConfigErrors:
        """The same errors, each with the key `prefix.key`."""
        return ConfigErrors([one.under(prefix) for one in self.problems])


class DataError(UserError):
    """A data file, a row or a column that cannot be used."""


class ModelError(UserError):
    """A model or tokenizer that cannot be found or used."""


class StorageError(UserError):
    """A file that cannot be written, for instance because the disk is full."""


class CapacityError(UserError):
    """Settings that need more memory than there is."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that there is no more memory, on a GPU or on the machine."""
    is_named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return is_named or any(sign in str(error) for sign in ("DefaultCPUAllocator", "CUDA out of memory"))


class RunError(Exception):
    """Ends the work that a run has begun. If one rank raises it, all ranks do (`upge.train.distributed.World`)."""

    is_shared = False


class Interrupted(RunError):
    """Sampling or an update was stopped on request. Nothing has changed since the last complete step."""


class EngineError(RunError):
    """An inference engine has failed. `upge.rollout.Sampler.restart` starts it again."""


class NonFiniteError(RunError):
    """A log-probability, a weight or a metric is NaN or infinite."""


class Problems:
    """Collects configuration errors, so that a user sees all of them at once.

    >>> problems = Problems()
    >>> for key in ("lr", "group"):
    ...     with problems:
    ...         raise ConfigError("unknown key", key)
    >>> problems.raise_any()
    Traceback (most recent call last):
    upge.errors.ConfigErrors: 2 settings cannot be used
      lr: unknown key
      group: unknown key
    """

    def __init__(self) -> None:
        self.errors: list[ConfigError] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Keep a ConfigError and let any other exception pass."""
        if not isinstance(error, ConfigError):
            return False
        self.errors += error.problems if isinstance(error, ConfigErrors) else [error]
        return True

    def raise_any(self) -> None:
        """Raise the only error unchanged, several as ConfigErrors, and nothing if there was none."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise ConfigErrors(self.errors)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped `name`: the closest known name, or else all known names."""
    known = sorted(known)
    if hint := closest(name, known):
        return hint
    return "known: " + ", ".join(known) if known else "no names are known here"


def closest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped `name`: the closest known name; empty if none is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else ""
