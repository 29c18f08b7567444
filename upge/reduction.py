"""w: how tokens, trajectories and questions are averaged.

A reduction is called with the batch and the trajectories that count, and returns the weight of every token, [B, T].
Its divisors are counts over the whole batch, taken before the batch is split into micro-batches or ranks, so the
gradient does not depend on the split. `over` says which trajectories count: 'term' = those with a non-zero coefficient
in the term itself; 'batch' = those with a non-zero coefficient in any term, so that several terms share one divisor.
Formulas mark the counts of 'batch' with the subscript `all`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upge.components.base import Component
from upge.errors import ConfigError
from upge.formula import Formula
from upge.views import TrajectoryView, View, group_sum

Over = Literal["term", "batch"]
PerToken = Literal["mean", "sum", "fixed"]


class Reduction(Component):
    """The weights w of a term's tokens.

    Every concrete reduction has the field `over`.
    """

    over: Over

    @property
    def counts_demonstrations(self) -> bool:
        """True: a reduction counts the trajectories that it is called with, whatever they are."""
        return True

    def count_formula(self, text: str, latex: str) -> Formula:
        """A count in the formula, marked if it is over the trajectories of all terms."""
        return Formula(f"{text}_all", f"{latex}_{{all}}") if self.over == "batch" else Formula(text, latex)

    @abstractmethod
    def __call__(self, batch: View, active: Bool[Tensor, "B"]) -> Float[Tensor, "B T"]:
        """[B, T] the weight of each token, in float64: 0 outside `active`, the trajectories that count."""


def _spread(per_trajectory: Tensor, batch: TrajectoryView, active: Tensor) -> Tensor:
    """[B] → [B, T]: each trajectory's weight on all its tokens, if the trajectory is active."""
    return per_trajectory[:, None] * (batch.response_mask & active[:, None])


def _token_rule(tokens: PerToken, length: int | None, batch: TrajectoryView) -> Tensor:
    """[B] weight of a token within its response: 1/|τ|, 1, or 1/length."""
    if tokens == "mean":
        return 1.0 / batch.lengths.clamp(min=1).double()
    weight = 1.0 / length if tokens == "fixed" and length is not None else 1.0
    return torch.full((len(batch),), weight, dtype=torch.float64, device=batch.response_mask.device)


def _check_length(part: Component, tokens: PerToken, length: int | None) -> None:
    if (tokens == "fixed") != (length is not None):
        raise ConfigError(
            f"{type(part).__name__}: tokens={tokens!r}, length={length}; tokens: fixed needs `length`, and the other "
            "values do not take it"
        )
    if length is not None and length < 1:
        raise ConfigError(f"{type(part).__name__}.length: {length} must be at least 1")


def _rule_formula(tokens: PerToken, length: int | None) -> tuple[str, str]:
    return {"mean": ("·|τ|", r"|\tau|"), "sum": ("", ""), "fixed": (f"·{length}", str(length))}[tokens]


@dataclass(frozen=True)
class TokenMean(Reduction):
    """w = 1/Σ|τ|: all tokens have the same weight, so long responses count more."""

    over: Over = "term"
    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TrajectoryView, active: Bool[Tensor, "B"]) -> Float[Tensor, "B T"]:
        total = (batch.lengths * active).sum().clamp(min=1).double()
        return _spread((1.0 / total).expand(len(batch)), batch, active)

    def formula(self) -> Formula:
        total = self.count_formula("Σ", r"\sum")
        return Formula(f"1/{total.text}|τ|", rf"\frac{{1}}{{{total.latex}|\tau|}}")


@dataclass(frozen=True)
class SequenceMean(Reduction):
    """w = 1/(N·|τ|) for N trajectories: all responses count the same.

    Attributes:
        tokens: 'mean' as above; 'sum': w = 1/N.
    """

    over: Over = "term"
    tokens: Literal["mean", "sum"] = "mean"
    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TrajectoryView, active: Bool[Tensor, "B"]) -> Float[Tensor, "B T"]:
        number = active.sum().clamp(min=1).double()
        return _spread(_token_rule(self.tokens, None, batch) / number, batch, active)

    def formula(self) -> Formula:
        number, (text, latex) = self.count_formula("N", "N"), _rule_formula(self.tokens, None)
        whole = f"({number.text}{text})" if text else number.text
        return Formula(f"1/{whole}", rf"\frac{{1}}{{{number.latex}{latex}}}")


@dataclass(frozen=True)
class FixedLength(Reduction):
    """w = 1/(N·length) for N trajectories (arXiv 2503.20783).

    The divisor is constant, so a token's weight does not depend on the length of its response.

    Attributes:
        length: the divisor in tokens, usually the response limit.
    """

    length: int
    over: Over = "term"
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length(self, "fixed", self.length)

    def __call__(self, batch: TrajectoryView, active: Bool[Tensor, "B"]) -> Float[Tensor, "B T"]:
        number = active.sum().clamp(min=1).double()
        return _spread(_token_rule("fixed", self.length, batch) / number, batch, active)

    def formula(self) -> Formula:
        number = self.count_formula("N", "N")
        return Formula(f"1/({number.text}·{self.length})", rf"\frac{{1}}{{{number.latex}\cdot {self.length}}}")


@dataclass(frozen=True)
class QuestionMean(Reduction):
    """w = 1/(Q·n_q) × token rule: all Q questions count the same, and so do the n_q trajectories of one question.

    Q counts the questions that have at least one trajectory that counts.

    Attributes:
        tokens: the token rule: 'mean' = 1/|τ|, 'sum' = 1, 'fixed' = 1/length.
        length: the divisor of 'fixed', in tokens.
        within: what n_q counts: 'question' = all trajectories of the question that count; 'kind' = only those of the
            same kind, rollouts or demonstrations; 'none' = nothing, n_q = 1: the trajectories of a question add up.
    """

    tokens: PerToken = "mean"
    length: int | None = None
    over: Over = "batch"
    within: Literal["question", "kind", "none"] = "question"
    reads: ClassVar[frozenset[str]] = frozenset({"group", "is_demonstration"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length(self, self.tokens, self.length)

    def __call__(self, batch: TrajectoryView, active: Bool[Tensor, "B"]) -> Float[Tensor, "B T"]:
        index = batch.group_index
        questions = (group_sum(active.double(), index) > 0).sum().clamp(min=1).double()
        if self.within == "kind":
            index = 2 * index + batch.is_demonstration
        number = group_sum(active.double() * (self.within != "none"), index)
        per_trajectory = _token_rule(self.tokens, self.length, batch) / (questions * number.clamp(min=1))[index]
        return _spread(per_trajectory, batch, active)

    def formula(self) -> Formula:
        questions, members = self.count_formula("Q", "Q"), self.count_formula("·n", "n")
        if self.within != "question":
            members = Formula("·n_kind", "n_{kind}") if self.within == "kind" else Formula("", "")
        text, latex = _rule_formula(self.tokens, self.length)
        divisor = r"\,".join(filter(None, (questions.latex, members.latex, latex)))
        return Formula(f"1/({questions.text}{members.text}{text})", rf"\frac{{1}}{{{divisor}}}")
