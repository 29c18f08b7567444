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
    of_reward = {text: [term.name for term in verify.terms(text)] for text in names(problems, default)}
    for name in dict.fromkeys(name for verifiers in of_reward.values() for name in verifiers):
        answers = dict.fromkeys(p.answer for p in problems if name in of_reward[p.verifier or default])
        new = [answer for answer in answers if (name, answer) not in _known]
        _known.update(zip(((name, answer) for answer in new), _reasons(name, new), strict=True))
    for problem in problems:
        reasons = (_known[name, problem.answer] for name in of_reward[problem.verifier or default])
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is not None:
            yield problem, reason


def _reasons(name: str, answers: Sequence[str]) -> list[str | None]:
    """Why the verifier refuses each answer; None if it does not."""
    verifier = verify.load(name)
    check = getattr(verifier, "check_answer", None)
    if not verify.Declared.by(verifier).needs_answer:
        return [None] * len(answers)
    if check is None:
        return [None if answer else f"there is none, and the verifier '{name}' asks for it" for answer in answers]
    if name in BUILT_IN and len(answers) >= LEAST:
        return _remembered(name, check, answers)
    return [_reason(check, answer) for answer in answers]


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
