"""Proofs that an objective's gradient is the product of the parts: the factor in front of ∇π_θ, derived and compared.

Three results are compared for every token, in every cell that the points visit:
1. ∂J/∂π_θ of the objective J, by sympy, stop-gradients held fixed;
2. Σ_terms gate · w · 1_stable · (1/π_ref) · Â · f′ from the rules of the algorithm's parts: equal to 1 as expressions;
3. the same factors from the parts' own code, in float64 at the cell's point, and their gradient by autograd: equal to 2
   up to rounding.
So the parts' code computes the objective's gradient, on the whole cell and not only at its point.

Two bounds that should be equal, such as 1.2 and 1.21, matter only for ratios between them, and a random point rarely
lies there. Therefore the bounds of objective and parts are computed from the questions that were asked, and every gap
between two bounds is visited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import sympy as sp
import torch
from sympy import Expr, Float, Symbol, log
from torch import Tensor

from upge.algorithm import Algorithm
from upge.theory.symbolic import advantages, ratios, weights  # noqa: F401  (they register rules)
from upge.theory.symbolic.algebra import gradient, is_zero, substituted, symbols, value_at
from upge.theory.symbolic.rules import Tokens, evaluate
from upge.theory.symbolic.world import BoundaryPoint, Row, World

#: J(world): the objective to maximize, as in its paper, written with the world's symbols.
Objective = Callable[[World], Expr]


#: A proof ends after this many consecutive points without a new pair of derived factor and product.
_QUIET = 8
#: The points in each gap between two bounds.
_PER_GAP = 2
#: Bounds are searched at log-ratios up to _RANGE in size, and are equal if they differ by less than _SAME.
_RANGE, _SAME = math.log(1e6), 1e-8


def bound_of(question: Expr, world: World) -> float | None:
    """The log-ratio at which the sign of a question changes, if all ratios of the batch have the same value; else None.

    Args:
        world: the batch. Its ratios are π_θ/π_old, π_θ/π_0 and π_old/π_sampler.
    """
    kinds = {symbol.name[0] for symbol in symbols(question)}
    # An advantage that depends on log-probs has no bound in common with another question.
    if not kinds & set("qfs") or ("R" in kinds and question.has(log)):
        return None
    known = {x: Float(world.point[x]) for x in symbols(question) if x.name[0] in "Rvh"}
    short = substituted(question, known)

    def below(log_ratio: float) -> bool:
        return value_at(short, _at(world, symbols(short), log_ratio)) < 0

    low, high = -_RANGE, _RANGE
    start = below(low)
    if start == below(high):
        return None
    while high - low > _SAME / 10:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) == start else (low, middle)
    return (low + high) / 2


def _at(world: World, chosen: Iterable[Symbol], log_ratio: float) -> dict[Symbol, float]:
    """The values of symbols if all ratios have one value: π_θ is that of the world, the other policies follow."""
    steps = {"q": 1, "f": 1, "s": 2}
    point: dict[Symbol, float] = {}
    for symbol in chosen:
        kind, place = symbol.name[0], symbol.name[1:]
        if kind in steps:
            p = world.point[Symbol(f"p{place}", positive=True)]
            point[symbol] = float(p) * math.exp(-steps[kind] * log_ratio)
        else:
            point[symbol] = float(world.point[symbol])
    return point


def levels_between(bounds: Iterable[float]) -> list[Fraction]:
    """A ratio in each gap between the given log-bounds, one below the lowest, and one above the highest.

    A bound counts only if two questions share it: the bounds of a clip recur for every token, whereas an advantage that
    depends on probabilities changes its sign at a ratio that no other question shares.
    """
    ordered, several = sorted(bounds), []
    for left, right in zip(ordered, ordered[1:], strict=False):
        if right - left < _SAME and (not several or right - several[-1] >= _SAME):
            several.append(right)
    if not several:
        return []
    edges = [several[0] - 0.2, *several, several[-1] + 0.2]
    middles = [(left + right) / 2 for left, right in zip(edges, edges[1:], strict=False)]
    return [Fraction(math.exp(middle)).limit_denominator(10**9) for middle in middles]


class Factors(NamedTuple):
    """The factors of a term, one expression per row and token; `gate` includes the term's coefficient."""

    mask: Tokens
    denominator: Tokens
    advantage: Tokens
    shape: Tokens
    gate: Tokens
    reduction: Tokens

    def product(self, i: int, t: int) -> Expr:
        """gate · w · mask · (1/π_ref) · Â · f′ of token t in row i: the factor in front of ∇π_θ."""
        numerator = self.gate[i][t] * self.reduction[i][t] * self.mask[i][t] * self.advantage[i][t] * self.shape[i][t]
        return numerator / self.denominator[i][t]


@dataclass(frozen=True)
class Mismatch:
    """A variable for which the derived factor and the product of the parts differ.

    Attributes:
        variable: p<row>_<token> or h<row>_<token>.
    """

    variable: Symbol
    derived: Expr
    product: Expr


@dataclass(frozen=True)
class Proof:
    """The result of `prove`.

    Attributes:
        compared: the number of pairs of derived expression and product, over all variables and cells.
        cells: the number of visited cells; within a cell all questions have the same answers.
        one_sided: questions with the same answer at every point, so that the other side was not visited.
        rounding: the largest relative difference between a factor's rule and the part's own float64 value.
    """

    algorithm: str
    compared: int
    cells: int
    one_sided: tuple[Expr, ...]
    mismatches: tuple[Mismatch, ...]
    rounding: float

    @property
    def holds(self) -> bool:
        """True if every pair is equal, both sides of every question were visited, and rules agree with parts."""
        return self.compared > 0 and not self.mismatches and not self.one_sided and self.rounding < 1e-12


def derive(objective: Objective, world: World) -> dict[Symbol, Expr]:
    """∂J/∂x for each live symbol x, in the world's cell; for a π_θ it is the factor in front of ∇π_θ."""
    return {x: world.thaw(slope) for x, slope in gradient(objective(world), world.live).items()}


def factors(algorithm: Algorithm, world: World) -> dict[str, Factors]:
    """The factors of every term by the rules of its parts, in the world's cell.

    Raises:
        ConfigError: a part has no symbolic form.
    """
    gates: dict[str, list[Expr]] = {}
    active_by_term: dict[str, list[Row]] = {}
    for name, term in algorithm.terms.items():
        gates[name] = [number * sp.Rational(str(term.coefficient)) for number in evaluate(term.gate, world)]
        active_by_term[name] = [row for row in _source(world, term.source) if gates[name][row.index] != 0]
    active_in_any = [row for row in world.rows if any(row in rows for rows in active_by_term.values())]
    by_term: dict[str, Factors] = {}
    for name, term in algorithm.terms.items():
        estimator, active = term.estimator, active_by_term[name]
        advantage = evaluate(estimator.advantage, world)
        reduction = evaluate(term.reduction, world, active if term.reduction.over == "term" else active_in_any)
        by_term[name] = Factors(
            mask=evaluate(estimator.mask, world, advantage),
            denominator=evaluate(estimator.denominator, world),
            advantage=advantage,
            shape=evaluate(estimator.likelihood, world, *[advantage] * estimator.likelihood.sees_advantages),
            gate=[[gates[name][row.index] if row in active else sp.Integer(0)] * len(row) for row in world.rows],
            reduction=[[x if row in active else sp.Integer(0) for x in reduction[row.index]] for row in world.rows],
        )
    return by_term


def product(algorithm: Algorithm, world: World, terms: dict[str, Factors] | None = None) -> dict[Symbol, Expr]:
    """The factor in front of the gradient of each live symbol, by the rules of the parts.

    It is the sum of the products of all terms, plus the derivatives of the regularizers. `terms` are the factors of the
    terms; None = compute them here, as in `compare`.
    """
    terms = factors(algorithm, world) if terms is None else terms
    products: dict[Symbol, Expr] = {x: sp.Integer(0) for x in world.live}
    for row in world.rows:
        for t, p in enumerate(row.p):
            products[p] = sp.Add(*(term.product(row.index, t) for term in terms.values()))
    active_in_any = [row for row in world.rows if any(t.gate[row.index][0] != 0 for t in terms.values())]
    for regularizer in algorithm.regularizers.values():
        active = [row for row in _source(world, regularizer.source) if row in active_in_any]
        divided_over = active if regularizer.reduction.over == "term" else active_in_any
        penalties = evaluate(regularizer, world)
        reduction = evaluate(regularizer.reduction, world, divided_over)
        scale = sp.Rational(str(regularizer.coefficient))
        for row in active:
            for t, penalty in enumerate(penalties[row.index]):
                for x in (row.p[t], row.h[t]):
                    products[x] -= scale * reduction[row.index][t] * sp.diff(penalty, x)
    return products


def compare(algorithm: Algorithm, world: World, terms: dict[str, Factors] | None = None) -> float:
    """The largest difference between the rules at the world's point and the parts' own code.

    The difference is relative to max(1, size). It covers each factor of each term on active rows, and the whole
    gradient by autograd.
    """
    batch = world.batch(algorithm.initial_state())
    assert batch.logprobs is not None and batch.entropies is not None
    estimate = algorithm.estimate(batch)
    live = (batch.logprobs, batch.entropies)
    by_logprob, by_entropy = torch.autograd.grad(estimate.loss, live, allow_unused=True, materialize_grads=True)
    differences = [0.0]

    def note(expression: Expr, computed: Tensor) -> None:
        expected = world.value(expression)
        differences.append(abs(expected - float(computed)) / max(1.0, abs(expected)))

    terms = factors(algorithm, world) if terms is None else terms
    for name, term in terms.items():
        computed = estimate.terms[name]
        for row in world.rows:
            for t in range(len(row)):
                i, at = row.index, (row.index, t)
                note(term.gate[i][t] * term.reduction[i][t], computed.gate[at] * computed.reduction[at])
                if term.gate[i][t] * term.reduction[i][t] != 0:
                    note(term.mask[i][t], computed.mask[at])
                    note(term.denominator[i][t], computed.log_denominator[at].exp())
                    note(term.advantage[i][t], computed.advantages[at])
                    note(term.shape[i][t], computed.shape[at])
    products = product(algorithm, world, terms)
    for row in world.rows:
        for t in range(len(row)):
            note(row.p[t] * products[row.p[t]], -by_logprob[row.index, t])
            note(products[row.h[t]], -by_entropy[row.index, t])
    return _largest(differences)


def prove(algorithm: Algorithm, objective: Objective, points: int = 100, **settings: Any) -> Proof:
    """Derive the factor of every token from an objective and compare it with the product of an algorithm's parts.

    The comparison runs in the cells of points of a ragged batch. It visits random points until every question has been
    answered both ways and the last points have shown nothing new. Then it visits each gap between two bounds, of the
    objective or of the parts. It skips points on a kink.

    Args:
        points: maximum number of random points.
        **settings: the arguments of `World`.

    Raises:
        ConfigError: a part has no symbolic form.
    """
    search = _Search(algorithm, objective)
    for seed in range(points):
        if search.quiet >= _QUIET and search.both_sides:
            break
        search.visit(World(seed, **settings))
    visited: set[Fraction] = set()
    while points and (fresh := [level for level in levels_between(search.bounds.values()) if level not in visited]):
        visited |= set(fresh)
        for level in fresh:
            for seed in range(_PER_GAP):
                search.visit(World(seed, level=level, **settings))
    return search.proof()


class _Search:
    """The state of a proof: the questions, expressions and cells visited so far."""

    def __init__(self, algorithm: Algorithm, objective: Objective) -> None:
        self.algorithm, self.objective = algorithm, objective
        self.answers: dict[Expr, set[bool]] = {}
        self.bounds: dict[Expr, float] = {}
        self.seen: set[tuple[Symbol, Expr, Expr]] = set()
        self.cells: set[frozenset[tuple[Expr, bool]]] = set()
        self.mismatches: list[Mismatch] = []
        self.rounding, self.quiet = 0.0, 0

    @property
    def both_sides(self) -> bool:
        """True if every question was answered both ways."""
        return all(len(given) == 2 for given in self.answers.values())

    def visit(self, world: World) -> None:
        """Derive the factors in the cell of the world's point and compare them."""
        try:
            derived, terms = derive(self.objective, world), factors(self.algorithm, world)
        except BoundaryPoint:
            return
        products = product(self.algorithm, world, terms)
        pairs = [pair for x in world.live if (pair := (x, derived[x], products[x])) not in self.seen]
        self.mismatches += [Mismatch(*pair) for pair in pairs if not is_zero(pair[1] - pair[2])]
        self.seen, self.quiet = self.seen.union(pairs), 0 if pairs else self.quiet + 1
        self.rounding = _largest([self.rounding, compare(self.algorithm, world, terms)])
        self.cells.add(frozenset(world.asked.items()))
        for question, answer in world.asked.items():
            if question not in self.answers:
                bound = bound_of(question, world)
                self.bounds |= {} if bound is None else {question: bound}
            self.answers.setdefault(question, set()).add(answer)

    def proof(self) -> Proof:
        """The result."""
        one_sided = tuple(question for question, given in self.answers.items() if len(given) == 1)
        return Proof(
            self.algorithm.name, len(self.seen), len(self.cells), one_sided, tuple(self.mismatches), self.rounding
        )


def _largest(numbers: Sequence[float]) -> float:
    """The largest number; NaN if one is NaN, which Python's `max` may drop."""
    return float(torch.tensor(numbers, dtype=torch.float64).max())


def _source(world: World, source: str) -> list[Row]:
    """The rows of a source."""
    if source == "all":
        return list(world.rows)
    if source == "preference_pairs":
        return [row for row in world.rows if row.preference != 0]
    return world.rollouts if source == "rollouts" else [r for r in world.demonstrations if r.preference >= 0]
