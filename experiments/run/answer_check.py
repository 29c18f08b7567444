"""Finds the problems whose answers their verifiers refuse, and caches the result for the next start."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from upge import verify
from upge.cache import entry
from upge.data import Problem
from upge.verify.base import BUILT_IN

#: The least number of different answers for which the result is cached: parsing one takes a millisecond or more.
LEAST = 500
#: The packages on which the verifiers' results depend.
PACKAGES = ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "sympy", "mpmath", "reasoning_gym")

_known: dict[tuple[str, str], str | None] = {}
"""(verifier, answer) → why it is refused, or None; the cache of this process."""


def names(problems: Sequence[Problem], default: str) -> tuple[str, ...]:
    """The verifiers of these problems by name, the run's own first."""
    return tuple(dict.fromkeys([default, *(p.verifier for p in problems if p.verifier)]))


def refused(problems: Sequence[Problem], default: str) -> Iterator[tuple[Problem, str]]:
    """The problems whose answers their verifiers refuse, with the reason, in order.

    Raises:
        ConfigError: a verifier that does not exist.
    """
    for name in names(problems, default):
        verifier = verify.load(name)
        check = getattr(verifier, "check_answer", None)
        answers = list(dict.fromkeys(p.answer for p in problems if (p.verifier or default) == name))
        new = [answer for answer in answers if (name, answer) not in _known]
        if check is None:
            reasons: list[str | None] = [None] * len(new)
        elif name in BUILT_IN and len(new) >= LEAST:
            reasons = _remembered(name, check, new)
        else:
            reasons = [_reason(check, answer) for answer in new]
        _known.update(zip(((name, answer) for answer in new), reasons, strict=True))
    for problem in problems:
        reason = _known[problem.verifier or default, problem.answer]
        if reason is not None:
            yield problem, reason


def _remembered(name: str, check: object, answers: Sequence[str]) -> list[str | None]:
    """The reason for each answer, read from the cache on disk if the same answers were checked before."""
    with entry("answers", _key(name, answers)) as kept:
        cached = kept.read()
        if cached is not None:
            return json.loads(bytes(cached))
        reasons = [_reason(check, answer) for answer in answers]
        kept.write([json.dumps(reasons).encode()])
    return reasons


def _key(name: str, answers: Sequence[str]) -> str:
    """A hash of the answers and of the code that checks them."""
    digest = hashlib.blake2b(digest_size=20)
    for file in sorted(Path(verify.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    digest.update(json.dumps([name, [_version(package) for package in PACKAGES], *answers]).encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _reason(check: object, answer: str) -> str | None:
    try:
        check(answer)
    except ValueError as error:
        return str(error)
    return None
