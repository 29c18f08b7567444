"""A reward as a weighted sum of verifiers, such as "math + 0.2*my_rewards.is_short"; one verifier is the usual case."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from upge.errors import ConfigError
from upge.verify.base import Verdict, load
from upge.verify.declared import Declared

_TERM = re.compile(r"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>\d+(?:\.\d*)?|\.\d+)\s*\*)?\s*(?P<name>[A-Za-z_][\w.]*)\s*")
_FAILURES = ("error", "timeout")


class Term(NamedTuple):
    """One verifier of a sum, with its weight."""

    name: str
    weight: float = 1.0


def terms(text: str) -> tuple[Term, ...]:
    """The terms of a reward. A text that is no sum is the name of one verifier.

    Raises:
        ConfigError: a verifier occurs twice.
    """
    found: list[Term] = []
    place = 0
    while place < len(text):
        match = _TERM.match(text, place)
        if match is None or (found and not match["sign"]):
            return (Term(text),)
        weight = float(match["weight"] or 1.0)
        found.append(Term(match["name"], -weight if match["sign"] == "-" else weight))
        place = match.end()
    twice = next((term.name for i, term in enumerate(found) if term.name in {t.name for t in found[:i]}), None)
    if twice is not None:
        raise ConfigError(f"verify.verifier: '{text}' names '{twice}' twice; give it one weight")
    return tuple(found) or (Term(text),)


def names(texts: Sequence[str]) -> tuple[str, ...]:
    """The verifiers that rewards are made of, each once."""
    return tuple(dict.fromkeys(term.name for text in texts for term in terms(text)))


@dataclass(frozen=True, eq=False)
class Reward:
    """A weighted sum of verifiers.

    Attributes:
        terms: the verifiers with their weights.
        declared: name → what the verifier declares.
    """

    terms: tuple[Term, ...]
    declared: Mapping[str, Declared]

    @classmethod
    def load(cls, text: str) -> Reward:
        """The reward that a text such as "math + 0.2*my.style" names.

        Raises:
            ConfigError: a verifier does not exist or occurs twice.
        """
        found = terms(text)
        return cls(found, {term.name: Declared.by(load(term.name)) for term in found})

    @property
    def asks(self) -> frozenset[str]:
        """The arguments that any of its verifiers asks for by name."""
        return frozenset().union(*(self.declared[term.name].asks for term in self.terms))

    @property
    def is_plain(self) -> bool:
        """Whether it is the reward of one verifier."""
        return len(self.terms) == 1 and self.terms[0].weight == 1.0

    @property
    def minimum(self) -> float:
        """The smallest reward."""
        return sum(min(self._ends(term)) for term in self.terms)

    @property
    def maximum(self) -> float:
        """The largest reward."""
        return sum(max(self._ends(term)) for term in self.terms)

    def of(self, verdicts: Sequence[Verdict]) -> Verdict:
        """The verdict of the sum, from those of its terms.

        A term that failed counts as its worst case. The first failure gives status and detail, errors before timeouts.
        """
        if self.is_plain:
            return verdicts[0]
        pairs = list(zip(self.terms, verdicts, strict=True))
        parts = [min(self._ends(term)) if v.status in _FAILURES else term.weight * v.reward for term, v in pairs]
        failed = [(t, v) for status in _FAILURES for t, v in pairs if v.status == status]
        term, verdict = failed[0] if failed else pairs[0]
        return replace(
            verdict,
            reward=float(sum(parts)),
            detail=f"{term.name}: {verdict.detail}" if failed else verdict.detail,
            extracted=next((v.extracted for v in verdicts if v.extracted is not None), None),
            rewards=tuple((term.name, v.reward) for term, v in pairs),
        )

    def _ends(self, term: Term) -> tuple[float, float]:
        """The term's contribution at both ends of its verifier's range."""
        declared = self.declared[term.name]
        return term.weight * declared.minimum, term.weight * declared.maximum
