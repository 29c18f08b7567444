"""Which problems' answers their verifiers refuse; what was found out once is not asked again by the next start."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from upge import verify
from upge.cache import entry
from upge.data import Problem
from upge.verify.loading import BUILT_IN

#: Different answers from which on the result is remembered: parsing one as mathematics takes a millisecond or more.
LEAST = 500
#: What the verifiers' judgement rests on, beside their own code.
PACKAGES = ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "sympy", "mpmath", "reasoning_gym")

_known: dict[tuple[str, str], str | None] = {}
"""(verifier, answer) → why it is refused, or None: of this process."""


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
    """The reason for each answer, from the cache where the same answers were asked about before."""
    with entry("answers", _key(name, answers)) as kept:
        found = kept.read()
        if found is not None:
            return json.loads(bytes(found))
        reasons = [_reason(check, answer) for answer in answers]
        kept.write([json.dumps(reasons).encode()])
    return reasons


def _key(name: str, answers: Sequence[str]) -> str:
    """A hash of the answers and of the code that judges them."""
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
