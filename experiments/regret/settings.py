"""The settings of a measurement of regret: its own keys, those of a diagnosis that apply, and those of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.diagnose import settings as diagnose
from upge.algorithm import Algorithm
from upge.config import Settings, from_tree, key, meanings, parse, split
from upge.errors import ConfigError, nearest
from upge.gates import ConstantGate, Gate, ProductOf
from upge.measure.diagnosis import thresholds
from upge.term import Term

#: The algorithm whose two terms give the two directions of a prompt; its gates are replaced.
SIGNALS = "hpt_soft"
#: Keys that this command shares with a diagnosis.
SHARED = ("prompts", "group_size", "step", "policies", "run", "output")
_DEFAULTS = {"prompts": 128}
_MEANINGS = {"output": "folder of the results; empty = the next free regrets/MODEL-DATA"}
#: The largest number of a key.
_MOST = 10**7


@dataclass(frozen=True)
class RegretConfig(Settings):
    """What is measured, and the sizes of the samples."""

    gates: list = key(
        ["hpt", "superrl", "hpt_soft", "amft", "chord_mu"],
        "algorithms whose gates are measured; each needs one term on rollouts and one on demonstrations",
    )
    mixtures: list = key(
        [0, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1],
        "shares w of the demonstration in the constant mixtures (1-w)*rollouts + w*demonstration",
    )
    balance: float = key(
        8.0, "coefficient of the rollouts' term, as algo.terms.rl.coefficient of a run", above=0, limit=10**6,
    )  # fmt: skip
    rounds: int = key(2, "groups of rollouts of each prompt", minimum=1, limit=_MOST)
    held_out: int = key(256, "problems of the evaluation side that gains are measured on", minimum=4, limit=_MOST)
    held_out_samples: int = key(16, "rollouts of each of them", minimum=2, limit=_MOST)
    parts: int = key(16, "parts of the held-out problems, for errors and cross-validation", minimum=3, limit=_MOST)
    sgd_length: float = key(0.01, "length ‖Δθ‖ of a step along the gradient", above=0, limit=10**6)
    adam_length: float = key(0.05, "length ‖Δθ‖ of a step along Adam's direction", above=0, limit=10**6)
    finite: int = key(8, "prompts whose steps are also made in full; 0 = none", minimum=0, limit=_MOST)
    finite_parts: int = key(4, "parts of the held-out problems that such steps are measured on", minimum=1, limit=_MOST)

    @property
    def lengths(self) -> dict[str, float]:
        """Metric → the length of a step."""
        return {"sgd": self.sgd_length, "adam": self.adam_length}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out % self.parts or self.held_out < 2 * self.parts:
            raise ConfigError(
                f"parts: {self.parts} with held_out={self.held_out}; give a divisor of held_out, at most half of it"
            )
        if self.finite_parts > self.parts:
            raise ConfigError(f"finite_parts: {self.finite_parts} is more than parts={self.parts}; give fewer")
        shares = [one for one in self.mixtures if isinstance(one, int | float) and not isinstance(one, bool)]
        if shares != [*self.mixtures] or not shares or not all(0 <= one <= 1 for one in shares):
            raise ConfigError(f"mixtures: {self.mixtures}; give numbers between 0 and 1, such as [0,0.5,1]")
        if not all(isinstance(name, str) for name in self.gates):
            raise ConfigError(f"gates: {self.gates}; give names of algorithms, such as [hpt,hpt_soft]")


@dataclass(frozen=True)
class GatePair:
    """The coefficients of a prompt's two terms.

    Attributes:
        rollouts, demonstrations: the gates of the two terms.
    """

    rollouts: Gate
    demonstrations: Gate


@dataclass(frozen=True)
class Chosen:
    """A checked command line.

    Attributes:
        sample: the settings of model, data and sampling, as those of a diagnosis.
        signals: the algorithm with the two terms, both open.
        rollouts, demonstrations: the names of the two terms.
        gates: name → the pair of gates, of algorithms and of constant mixtures.
    """

    config: RegretConfig
    sample: diagnose.Chosen
    signals: Algorithm
    rollouts: str
    demonstrations: str
    gates: Mapping[str, GatePair]


def choose(arguments: Sequence[str]) -> Chosen:
    """The settings of a command line.

    Raises:
        ConfigError: an unknown key, name or value, by its key.
    """
    own: dict[str, Any] = {}
    rest: list[str] = []
    for name, text in map(split, arguments):
        if name in RegretConfig.__dataclass_fields__:
            own[name] = parse(name, text)
            if name == "gates" and isinstance(own[name], str):
                own[name] = [part for part in own[name].split(",") if part]
        elif name in diagnose.DiagnoseConfig.__dataclass_fields__ and name not in SHARED:
            known = [*RegretConfig.__dataclass_fields__, *SHARED]
            raise ConfigError(f"{name}: unknown key; {nearest(name, known)}")
        else:
            rest.append(f"{name}={text}")
    config = from_tree(RegretConfig, own)
    given = {argument.partition("=")[0] for argument in rest}
    rest += [f"{name}={value}" for name, value in _DEFAULTS.items() if name not in given]
    sample = diagnose.choose([*rest, f"algos=[{SIGNALS}]", "prompts_per_step=1", f"held_out={config.held_out}"])
    if sample.config.prompts < 2:
        raise ConfigError(f"found {sample.config.prompts}, but an interval needs at least 2; give more", "prompts")
    whole = diagnose.algorithm_of(SIGNALS, sample.tree)
    assert isinstance(whole, Algorithm)
    names = two_terms(whole)
    assert names is not None
    terms = {name: dataclasses.replace(term, gate=ConstantGate()) for name, term in whole.terms.items()}
    gates: dict[str, GatePair] = {}
    for name in dict.fromkeys(config.gates):
        gates |= gates_of(name, diagnose.algorithm_of(name, sample.tree, "gates"), sample.config.group_size)
    gates |= {mixture_name(share): GatePair(ConstantGate(1 - share), ConstantGate(share)) for share in config.mixtures}
    signals = dataclasses.replace(whole, terms=terms)
    return Chosen(config, sample, signals, *names, gates)


def mixture_name(share: float) -> str:
    """The name of a constant mixture with this share of the demonstration."""
    return f"constant w={share:g}"


def two_terms(algorithm: Algorithm) -> tuple[str, str] | None:
    """The names of the algorithm's terms on rollouts and on demonstrations; None if it has other terms or more."""
    sources: dict[str, str] = {term.source: name for name, term in algorithm.terms.items()}
    if len(algorithm.terms) != 2 or {*sources} != {"rollouts", "demonstrations"}:
        return None
    return sources["rollouts"], sources["demonstrations"]


def gates_of(name: str, algorithm: Any, group_size: int) -> dict[str, GatePair]:
    """The gates of an algorithm by name, and as "γ=…" at every threshold that separates groups, if they have one.

    Raises:
        ConfigError: it has other terms than one on rollouts and one on demonstrations.
    """
    terms = two_terms(algorithm) if isinstance(algorithm, Algorithm) else None
    if terms is None:
        raise ConfigError(
            f"gates: {name} does not have exactly one term on rollouts and one on demonstrations; leave it out"
        )

    def pair(one: Algorithm) -> GatePair:
        rollouts, demonstrations = (one.terms[term] for term in terms)
        return GatePair(_scaled(rollouts), _scaled(demonstrations))

    variants = thresholds(algorithm, group_size)
    return {name: pair(algorithm)} | {f"γ={share:.3g}": pair(one) for share, one in variants.items()}


def _scaled(term: Term) -> Gate:
    """The gate of a term, times the term's coefficient."""
    return term.gate if term.coefficient == 1 else ProductOf((ConstantGate(term.coefficient), term.gate))


def keys() -> list[tuple[str, Any, str]]:
    """(key, default, meaning) of every setting."""
    others = [row for row in diagnose.keys() if row[0] not in diagnose.DiagnoseConfig.__dataclass_fields__]
    shared = [row for row in meanings(diagnose.DiagnoseConfig) if row[0] in SHARED]
    return [
        *meanings(RegretConfig),
        *((name, _DEFAULTS.get(name, default), _MEANINGS.get(name, meaning)) for name, default, meaning in shared),
        *others,
    ]
