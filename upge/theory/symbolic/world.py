"""A batch of symbols: a few short responses in which every probability, reward and value is a symbol.

An objective with clips and minima is only piecewise smooth. A `World` therefore has one rational point in addition to
its symbols. `less(a, b)` returns the answer at that point and records the question. An expression that is built with
these answers is smooth and valid on the whole cell of points that give the same answers. Many points visit many cells.
Equality is always shown between expressions, never between numbers.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import sympy as sp
import torch
from sympy import Expr, Symbol

from upge.theory.symbolic.algebra import substituted, symbols, value_at
from upge.trajectories import Trajectories

#: (rollout lengths, demonstration lengths) of each question.
Shape = Sequence[tuple[Sequence[int], Sequence[int]]]
#: The lengths are ragged and differ between questions, so that no two reductions agree.
SHAPE: Shape = (((2, 3), (2,)), ((1, 2, 2), (1,)))
#: Ratios of π_θ to another policy: on both sides of every bound in use, on none of them, and far outside.
LEVELS = tuple(Fraction(x) for x in "1/30 2/7 4/7 5/7 8/9 10/9 16/13 10/7 11/7 17/7 29/7 30".split())
#: The weights of the rewards of a world's rows.
REWARD_WEIGHTS = {"first": Fraction(1), "second": Fraction(1, 2)}
#: Ratios that all tokens of a response share, for bounds on its mean ratio as narrow as 3e-4.
NARROW = tuple(Fraction(x) for x in "4/9 8/9 9999/10000 10001/10000 10/9 19/9".split())


class BoundaryPoint(Exception):
    """The two sides of a question are equal at the point but not as expressions: the objective has a kink there."""


@dataclass(frozen=True)
class Row:
    """One response, with a symbol per token for each column.

    Attributes:
        index: its place in `World.rows`.
        p: π_θ of each token, the variables of the derivation.
        q: π_old, the behavior policy.
        f: π_0, the reference policy.
        s: π_sampler, the policy as the sampler reported it.
        n: ν, the teacher.
        v: the critic's values.
        w: the squared norms of the scores.
        u: the remembered value of its question, the same for all rows of the question.
        h: the entropies; they depend on θ, so an objective that does not detach them has a gradient through them.
        reward: the reward.
        others: name → further rewards of a batch with several; `reward` is the one called 'first'.
        group: the number of its question.
        preference: +1 if chosen, -1 if rejected, 0 otherwise.
        finished: False for some responses, which were cut.
        is_replayed: True for some rollouts, which an earlier step sampled.
    """

    index: int
    p: tuple[Symbol, ...]
    q: tuple[Symbol, ...]
    f: tuple[Symbol, ...]
    s: tuple[Symbol, ...]
    n: tuple[Symbol, ...]
    v: tuple[Symbol, ...]
    w: tuple[Symbol, ...]
    h: tuple[Symbol, ...]
    reward: Expr
    u: Symbol
    others: Mapping[str, Expr]
    group: int
    is_demonstration: bool
    preference: int
    finished: bool
    is_replayed: bool

    def __len__(self) -> int:
        return len(self.p)

    @property
    def ratios(self) -> list[Expr]:
        """r_t = π_θ/π_old per token."""
        return [p / q for p, q in zip(self.p, self.q, strict=True)]

    @property
    def rewards(self) -> dict[str, Expr]:
        """All rewards by name; `REWARD_WEIGHTS` has their weights."""
        return {"first": self.reward, **self.others}


class World:
    """Symbols, a point, and the questions asked so far.

    Args:
        seed: determines the point; the symbols are the same for every seed.
        shape: rollout and demonstration lengths per question.
        pairs: whether the first two rollouts of each question are chosen and rejected.
        opaque: whether `advantage` replaces its argument by a symbol, so that a derived factor is readable.
        level: the ratio of all tokens at the point; None = random ratios.
    """

    def __init__(
        self,
        seed: int = 0,
        shape: Shape = SHAPE,
        pairs: bool = False,
        opaque: bool = False,
        level: Fraction | None = None,
    ) -> None:
        self.step, self.opaque, self.level = 7, opaque, level
        self.point: dict[Symbol, Expr] = {}
        self.asked: dict[Expr, bool] = {}
        self.advantages: dict[Symbol, Expr] = {}
        self._random = random.Random(seed)
        self._random_of_teacher = random.Random(-seed - 1)
        random_of_memory = random.Random(-seed - 2)
        self._random_of_rewards = random.Random(seed + 10**6)
        self._twins: dict[Symbol, Symbol] = {}
        self._variables: dict[str, float] = {}
        self._values: dict[Expr, float] = {}
        rows: list[Row] = []
        for group, (rollouts, demonstrations) in enumerate(shape):
            remembered = Symbol(f"u{group}", real=True)
            self.point[remembered] = sp.Rational(random_of_memory.randint(1, 996), 997)
            outcome = self._random.choice(("fail", "succeed", "mixed", "mixed"))
            lengths = [(n, False) for n in rollouts] + [(n, True) for n in demonstrations]
            for place, (length, is_demonstration) in enumerate(lengths):
                preference = {0: 1, 1: -1}.get(place, 0) if pairs else 0
                rows.append(self._row(len(rows), length, group, is_demonstration, preference, outcome))
        self.rows: tuple[Row, ...] = tuple(rows)

    def _row(self, index: int, length: int, group: int, expert: bool, preference: int, outcome: str) -> Row:
        """A row with values at the point; `outcome` is 'fail', 'succeed' or 'mixed'."""
        draw, importance, mismatch, reference = self._random.randint, self._levels(), self._levels(), self._levels()
        columns: dict[str, list[Symbol]] = {name: [] for name in "pqfsnvwh"}
        for t in range(length):
            p = Fraction(draw(1, 997), 1000)
            q = p / importance()
            values = {"p": p, "q": q, "f": p / reference(), "s": q / mismatch()}
            largest = max(Fraction(1), max(values.values()) * Fraction(1000, 999))  # a probability is below 1
            values = {name: value / largest for name, value in values.items()}
            values["n"] = Fraction(self._random_of_teacher.randint(1, 997), 1000)
            values |= {"v": Fraction(draw(-99, 99), 101), "h": Fraction(draw(1, 99), 50)}
            values["w"] = 2 * (1 - values["p"]) ** 2
            for name, value in values.items():
                kind = {"real": True} if name == "v" else {"positive": True}
                symbol = Symbol(f"{name}{index}_{t}", **kind)
                self.point[symbol] = sp.Rational(value.numerator, value.denominator)
                columns[name].append(symbol)
        succeeds = outcome == "succeed" or (outcome == "mixed" and self._random.random() < 0.5)
        reward = Symbol(f"R{index}", real=True)
        # Rewards other than 0 and 1, rarely equal: with equal rewards the standard deviation has a kink.
        self.point[reward] = sp.Rational(draw(600, 2400) if succeeds else draw(-1400, 400), 997)
        second = Symbol(f"S{index}", real=True)
        self.point[second] = sp.Rational(self._random_of_rewards.randint(-900, 1900), 991)
        tokens = {name: tuple(column) for name, column in columns.items()}
        kind = {"is_demonstration": expert, "preference": preference, "finished": index % 3 != 1}
        more = {"u": Symbol(f"u{group}", real=True), "others": {"second": second}}
        more |= {"is_replayed": not expert and index % 3 == 1}
        return Row(index, **tokens, **more, reward=reward, group=group, **kind)

    def _levels(self) -> Callable[[], Fraction]:
        """A source of ratios for the tokens of a row: separate ones, or one that all tokens share."""
        choose = self._random.choice
        shared = choose((None, choose(LEVELS), choose(NARROW))) if self.level is None else self.level
        return lambda: choose(LEVELS) if shared is None else shared

    @property
    def live(self) -> tuple[Symbol, ...]:
        """The symbols that depend on θ: every π_θ and every entropy."""
        return tuple(x for row in self.rows for x in (*row.p, *row.h))

    @property
    def questions(self) -> list[list[Row]]:
        """The rows of each question."""
        groups = sorted({row.group for row in self.rows})
        return [[row for row in self.rows if row.group == g] for g in groups]

    @property
    def rollouts(self) -> list[Row]:
        """All rows that are not demonstrations."""
        return [row for row in self.rows if not row.is_demonstration]

    @property
    def demonstrations(self) -> list[Row]:
        """All demonstrations."""
        return [row for row in self.rows if row.is_demonstration]

    def with_rewards(self, rewards: Sequence[Expr]) -> World:
        """The same world, including its recorded questions, with other rewards; for parts that shape rewards."""
        other = copy.copy(self)
        other.rows = tuple(replace(row, reward=reward) for row, reward in zip(self.rows, rewards, strict=True))
        return other

    def sg(self, expression: Expr) -> Expr:
        """Stop-gradient: replaces every live symbol by a twin that is not differentiated; `thaw` reverses it."""
        for symbol in symbols(sp.sympify(expression)) & set(self.live):
            if symbol not in self._twins:
                twin = Symbol(f"{symbol.name}bar", positive=True)
                self._twins[symbol], self.point[twin] = twin, self.point[symbol]
        return substituted(sp.sympify(expression), self._twins)

    def thaw(self, expression: Expr) -> Expr:
        """The expression with every twin replaced by its live symbol."""
        return substituted(expression, {twin: symbol for symbol, twin in self._twins.items()})

    def advantage(self, row: Row, value: Expr, t: int | None = None) -> Expr:
        """`value`, the advantage of a row or of its token t; in an opaque world, a symbol Â that represents it."""
        if not self.opaque:
            return value
        symbol = Symbol(f"A{row.index}" if t is None else f"A{row.index}_{t}", real=True)
        self.advantages[symbol] = sp.sympify(value)
        self.point[symbol] = sp.Rational(self.value(self.advantages[symbol]))
        return symbol

    def variable(self, name: str, value: float | None = None) -> Symbol:
        """A coefficient that depends on neither tokens nor rewards, such as the current value of a schedule.

        Args:
            name: the symbol's name.
            value: its value at the point; None = keep the value, or use a default.

        Raises:
            ValueError: the same name was given another value before.
        """
        symbol = Symbol(name, positive=True)
        if value is None:
            self.point.setdefault(symbol, sp.Rational(2, 7))
        elif self._variables.setdefault(name, value) != value:
            raise ValueError(f"{name}: {value} and {self._variables[name]}; give each schedule its own name")
        else:
            self.point[symbol] = sp.Rational(value)
        return symbol

    def value(self, expression: Expr) -> float:
        """The expression at the point, in float64."""
        return value_at(expression, self.point, self._values)

    def less(self, left: Expr | float, right: Expr | float) -> bool:
        """Whether left < right at the point. Questions that differ by a constant factor are recorded as one.

        Raises:
            BoundaryPoint: the sides are equal at the point but are not the same expression.
        """
        difference = sp.sympify(left - right)
        question = difference.primitive()[1]
        if question.is_Number:
            return bool(difference < 0)
        if -question in self.asked:
            return not self.asked[-question]
        if question not in self.asked:
            self.asked[question] = self._negative(question)
        return self.asked[question]

    def _negative(self, expression: Expr) -> bool:
        value = self.value(expression)
        if abs(value) < 1e-9:  # perhaps zero: evaluate it again with enough digits
            value = sp.N(expression.xreplace(self.point), 60)
            if abs(value) < sp.Float("1e-50"):
                raise BoundaryPoint(str(expression))
        return bool(value < 0)

    def minimum(self, left: Expr, right: Expr) -> Expr:
        """min(left, right) on the cell."""
        return left if self.less(left, right) else right

    def maximum(self, left: Expr, right: Expr) -> Expr:
        """max(left, right) on the cell."""
        return right if self.less(left, right) else left

    def clip(self, value: Expr, low: Expr | None = None, high: Expr | None = None) -> Expr:
        """clip(value, low, high) on the cell; None leaves a side open."""
        if low is not None and self.less(value, low):
            return sp.sympify(low)
        return sp.sympify(high) if high is not None and self.less(high, value) else value

    def batch(self, state: dict[str, float] | None = None) -> Trajectories:
        """The point as a numerical batch for the parts' own code; log-probs and entropies require a gradient."""
        width = max(map(len, self.rows))

        def column(name: str, log: bool) -> torch.Tensor:
            filled = torch.zeros(len(self.rows), width, dtype=torch.float64)
            for i, row in enumerate(self.rows):
                for t, symbol in enumerate(getattr(row, name)):
                    exact = self.point[symbol]
                    filled[i, t] = math.log(exact) if log else float(exact)
            return filled

        rewards = {
            name: torch.tensor([self.value(row.rewards[name]) for row in self.rows], dtype=torch.float64)
            for name in REWARD_WEIGHTS
        }
        return Trajectories(
            logprobs=column("p", True).requires_grad_(),
            response_mask=torch.arange(width) < torch.tensor([len(row) for row in self.rows])[:, None],
            rewards=rewards["first"],
            named_rewards=rewards,
            reward_weights={name: float(weight) for name, weight in REWARD_WEIGHTS.items()},
            group=torch.tensor([row.group for row in self.rows]),
            is_demonstration=torch.tensor([row.is_demonstration for row in self.rows]),
            finished=torch.tensor([row.finished for row in self.rows]),
            is_replayed=torch.tensor([row.is_replayed for row in self.rows]),
            behavior_logprobs=column("q", True),
            sampler_logprobs=column("s", True),
            reference_logprobs=column("f", True),
            teacher_logprobs=column("n", True),
            values=column("v", False),
            score_norms=column("w", False),
            entropies=column("h", False).requires_grad_(),
            preference=torch.tensor([row.preference for row in self.rows]),
            prompt_value=torch.tensor([self.value(row.u) for row in self.rows], dtype=torch.float64),
            step=self.step,
            state=state or {},
        )


def worlds(points: int = 100, **settings: Any) -> Iterator[World]:
    """Worlds with the same symbols at different points; `settings` are the arguments of `World`."""
    for seed in range(points):
        yield World(seed, **settings)
