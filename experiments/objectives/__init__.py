"""The objectives as their papers print them, in symbols, and what each is an objective of.

`STATEMENTS` says: this file of algorithms/, with these corrections and overrides, has this objective. A statement is
proven by deriving the factor in front of ∇π_θ from the objective and comparing it with the product of the file's parts.
Constants are those of the files, whose headers say where from. Nothing in an objective knows the parts: an advantage, a
clip or an average is written out as in the paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from sympy import Expr

import algorithms
from experiments.objectives import corrected, demonstrations, rollouts, written
from upge import Algorithm
from upge.theory.symbolic import Proof, World, prove


@dataclass(frozen=True)
class Statement:
    """An algorithm and its objective.

    Attributes:
        algorithm: the name of its file.
        objective: world → J, to be maximised.
        overrides: of the file's settings, as on the command line.
        corrections: names of files in algorithms/corrections.
        terms: those of its terms that the objective is of; none named = all.
    """

    algorithm: str
    objective: Callable[[World], Expr]
    overrides: tuple[str, ...] = ()
    corrections: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people and tests."""
        return " ".join((self.algorithm, *self.corrections, *self.terms, *self.overrides[:1]))

    def load(self) -> Algorithm:
        """The algorithm, cut down to `terms` where some are named."""
        algorithm = algorithms.load(self.algorithm, self.overrides, self.corrections)
        if not self.terms:
            return algorithm
        return dataclasses.replace(algorithm, terms={name: algorithm.terms[name] for name in self.terms})

    @property
    def pairs(self) -> bool:
        """Whether it learns from preference pairs, so that the batch of its proof must have some."""
        return self.load().needs.preference_pairs

    def prove(self) -> Proof:
        """See `upge.theory.symbolic.prove`."""
        return prove(self.load(), self.objective, pairs=self.pairs)


_ROLLOUTS = "reinforce reinforce_plus_plus rloo ppo grpo dr_grpo cispo gspo sapo gmpo opmd asymre relift dpo"
_DEMONSTRATIONS = (
    "sft dft iw_sft offline_rl luffy rl_plus srft hpt hpt_offpolicy hpt_soft superrl chord_mu chord_phi amft"
)
_CORRECTIONS = "tis icepop mis mis_geometric dual_clip kl_k1 kl_k2 kl_k3 entropy kl_reward dynamic_sampling"
# A limit that the short responses of a proof come near; the buffer is a share of it.
_NEAR = (
    f"terms.rl.estimator.advantage.limit={written.LIMIT}",
    f"terms.rl.estimator.advantage.buffer={written.BUFFER / written.LIMIT}",
)
STATEMENTS = (
    *(Statement(name, getattr(rollouts, name)) for name in _ROLLOUTS.split()),
    *(Statement(name, getattr(demonstrations, name)) for name in _DEMONSTRATIONS.split()),
    Statement("dapo", rollouts.dapo, _NEAR),
    Statement(
        "iw_sft",
        demonstrations.iw_sft_sequence,
        ("terms.sft.estimator.denominator={_target_: upge.SequenceReferencePolicy, power: 2.0, low: 0.0, high: 16.0}",),
    ),
    Statement("srft", demonstrations.srft_offline, terms=("offline",)),
    *(Statement("dr_grpo", getattr(corrected, name), corrections=(name,)) for name in _CORRECTIONS.split()),
    Statement("dr_grpo", corrected.overlong, _NEAR, ("overlong",)),
)


def statement(name: str) -> Statement:
    """The statement of that name.

    Raises:
        KeyError: there is none.
    """
    return {found.name: found for found in STATEMENTS}[name]


__all__ = ["STATEMENTS", "Statement", "statement"]
