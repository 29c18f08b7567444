"""A reward as a weighted sum of verifiers, such as "math + 0.2*my_rewards.is_short"; usually there is one verifier.

The reward of each verifier in a sum has the verifier's name or the name after `as`:
"math as correct + 0.2*boxed as format".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from upge.errors import ConfigError
from upge.verify.base import NamedReward, Verdict, load
from upge.verify.declared import Declared

_TERM = re.compile(
    r"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>\d+(?:\.\d*)?|\.\d+)\s*\*)?\s*(?P<name>[A-Za-z_][\w.]*)"
    r"(?:\s+as\s+(?P<label>[A-Za-z_]\w*))?\s*"
)
_FAILURES = ("error", "timeout")


class Term(NamedTuple):
    """One verifier of a sum, with its weight.

    Attributes:
        name: the verifier's name.
        weight: the factor of its reward.
        label: the name after `as`; empty = the verifier's name.
    """

    name: str
    weight: float = 1.0
    label: str = ""

    @property
    def reward(self) -> str:
        """The name of the verifier's reward."""
        return self.label or self.name


def terms(text: str) -> tuple[Term, ...]:
    """The terms of a reward. A text that is not a sum is taken as the name of one verifier.

    Raises:
        ConfigError: a verifier or the name of a reward occurs twice, or a reward is called 'mean'.
    """
    found: list[Term] = []
    place = 0
    while place < len(text):
        match = _TERM.match(text, place)
        if match is None or (found and not match["sign"]):
            return (Term(text),)
        weight = float(match["weight"] or 1.0)
        found.append(Term(match["name"], -weight if match["sign"] == "-" else weight, match["label"] or ""))
        place = match.end()
    twice = _repeated([term.name for term in found])
    if twice is not None:
        raise ConfigError(f"verify.verifier: '{text}' names '{twice}' twice; give it one weight")
    same = _repeated([term.reward for term in found])
    if same is not None:
        raise ConfigError(
            f"verify.verifier: '{text}' has two rewards called '{same}'; give each its own name, such as 'math as ok'"
        )
    if "mean" in [term.label for term in found]:
        raise ConfigError(
            f"verify.verifier: '{text}' calls a reward 'mean', but the metric reward/mean is that of the sum; give it "
            "another name"
        )
    return tuple(found) or (Term(text),)


def _repeated(given: Sequence[str]) -> str | None:
    return next((one for i, one in enumerate(given) if one in given[:i]), None)


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
        """The arguments that any of its verifiers takes by name."""
        return frozenset().union(*(self.declared[term.name].asks for term in self.terms))

    @property
    def is_plain(self) -> bool:
        """Whether the reward is that of one verifier with weight 1."""
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
        """The verdict of the sum, from the verdicts of its terms.

        A term that failed counts as its worst case. Status and detail are those of the first error, else of the first
        timeout.
        """
        if self.is_plain:
            return verdicts[0]
        pairs = list(zip(self.terms, verdicts, strict=True))
        own = [self._own(term, False) if v.status in _FAILURES else v.reward for term, v in pairs]
        named = tuple(NamedReward(t.reward, r, t.weight) for t, r in zip(self.terms, own, strict=True))
        failed = [(t, v) for status in _FAILURES for t, v in pairs if v.status == status]
        term, verdict = failed[0] if failed else pairs[0]
        return replace(
            verdict,
            reward=float(sum(one.weight * one.reward for one in named)),
            detail=f"{term.name}: {verdict.detail}" if failed else verdict.detail,
            extracted=next((v.extracted for v in verdicts if v.extracted is not None), None),
            rewards=named,
        )

    def best(self) -> Verdict:
        """The verdict on a response with the largest reward."""
        return self._end(True)

    def worst(self) -> Verdict:
        """The verdict on a response with the smallest reward."""
        return self._end(False)

    def named(self, verdict: Verdict) -> tuple[NamedReward, ...]:
        """The individual reward of each verifier in a verdict of this reward, even if there is only one verifier."""
        return verdict.rewards or tuple(NamedReward(term.reward, verdict.reward) for term in self.terms)

    def deciding(self, name: str) -> Term | None:
        """The term whose reward is called `name`; None if the whole reward decides (an empty name, or one verifier).

        Raises:
            ConfigError: the sum has no reward with this name.
        """
        if not name or self.is_plain:
            return None
        for term in self.terms:
            if term.reward == name:
                return term
        known = ", ".join(term.reward for term in self.terms)
        raise ConfigError(
            f"verify.success: found '{name}', but a sum of verifiers here has the rewards {known}; give one of "
            f"them, or name the deciding reward with `as`, as in 'math as {name} + 0.2*boxed'"
        )

    def _end(self, best: bool) -> Verdict:
        return self.of([Verdict(self._own(term, best)) for term in self.terms])

    def _own(self, term: Term, best: bool) -> float:
        """The individual reward at the end of the verifier's range that makes the sum largest (`best`) or smallest."""
        declared = self.declared[term.name]
        return declared.maximum if best == (term.weight >= 0) else declared.minimum

    def _ends(self, term: Term) -> tuple[float, float]:
        """The term's contribution at both ends of its verifier's range."""
        declared = self.declared[term.name]
        return term.weight * declared.minimum, term.weight * declared.maximum
