"""What a verifier declares: the arguments that it takes by name, and the range of its rewards."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ARGUMENTS = ("response", "answer", "prompt", "row", "tokens", "is_truncated")
"""The arguments that a verifier may take by name."""
GROUP_ARGUMENTS = ("responses", *ARGUMENTS[1:])
"""The arguments that a verifier may take by name if it compares the responses to one prompt."""
_NEW = {"responses", "row", "tokens", "is_truncated"}
"""Names that a verifier called as (response, answer, prompt) by position does not use."""

Verifier = Any  # a user's verifier, of any type


@dataclass(frozen=True)
class Declared:
    """What a verifier declares.

    Attributes:
        asks: the arguments that it takes by name; empty = it is called as (response, answer, prompt) by position.
        minimum, maximum: the range of its rewards.
    """

    asks: frozenset[str] = frozenset()
    minimum: float = 0.0
    maximum: float = 1.0

    @classmethod
    def by(cls, verifier: Callable[..., object]) -> Declared:
        """The declarations of a callable: the names of its parameters, and its attributes `minimum` and `maximum`.

        Raises:
            ValueError: it cannot be called with the arguments of a verifier, or its range is invalid. The message is a
                clause whose subject is the verifier.
        """
        minimum, maximum = getattr(verifier, "minimum", 0.0), getattr(verifier, "maximum", 1.0)
        numbers = [isinstance(n, (int, float)) and math.isfinite(n) for n in (minimum, maximum)]
        if not all(numbers) or not minimum < maximum:
            raise ValueError(
                f"declares rewards from minimum={minimum!r} to maximum={maximum!r}; give two numbers, the smaller first"
            )
        return cls(_asked(verifier), float(minimum), float(maximum))

    @property
    def compares(self) -> bool:
        """Whether the verifier gets all responses to a prompt at once and returns a list of rewards."""
        return "responses" in self.asks

    @property
    def needs_answer(self) -> bool:
        """Whether the verifier gets the ground truth."""
        return not self.asks or "answer" in self.asks

    def call(self, verifier: Verifier, values: dict[str, Any]) -> object:
        """Call the verifier with those of the `values` (of `ARGUMENTS` or `GROUP_ARGUMENTS`) that it takes."""
        if not self.asks:
            return verifier(values["response"], values["answer"], values["prompt"])
        return verifier(**{name: values[name] for name in self.asks})


def _asked(verifier: Callable[..., object]) -> frozenset[str]:
    try:
        signature = inspect.signature(verifier)
    except ValueError:  # a callable written in C may have no signature
        return frozenset()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = signature.parameters.values()
    named = {p.name for p in parameters if p.kind in by_name}
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    known = named & {*ARGUMENTS, *GROUP_ARGUMENTS}
    if known and needed <= known:
        if {"response", "responses"} <= known:
            raise ValueError("asks for `response` and `responses`; a verifier of single responses needs the first")
        return frozenset(known)
    if known & _NEW:
        other = ", ".join(f"`{name}`" for name in sorted(needed - known))
        raise ValueError(f"has the parameters {signature} with {other}; name them as in {', '.join(ARGUMENTS)}")
    try:
        signature.bind("response", "answer", "prompt")
    except TypeError as error:
        raise ValueError(
            f"must accept (response, answer, prompt) or some of {', '.join(ARGUMENTS)} by name, but {error}"
        ) from error
    return frozenset()
