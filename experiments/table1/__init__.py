"""Table 1 of arXiv 2509.04419: statements that an algorithm has a written objective, and rows derived from them.

Each of `STATEMENTS` says that a file of algorithms/, with corrections and overrides, has an objective. It is proven by
deriving the factor of ∇π_θ from the objective and comparing it with the product of the file's parts. Constants are
those of the files, whose headers name their sources. Objectives do not use the parts: an advantage, a clip or an
average is written out as in the paper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy as sp
from sympy import Expr, Symbol

import algorithms
from experiments.table1 import corrections, demonstrations, rollouts, variants
from upge import Algorithm, Term
from upge.errors import ConfigError
from upge.theory.symbolic import Proof, Row, World, derive, factors, is_zero, prove, worlds


@dataclass(frozen=True)
class Statement:
    """An algorithm and its objective.

    Attributes:
        algorithm: the name of its file.
        objective: world → J, to be maximized.
        overrides: overrides of the file's settings, as on the command line.
        corrections: names of files in algorithms/corrections.
        terms: the terms that the objective covers; empty = all.
    """

    algorithm: str
    objective: Callable[[World], Expr]
    overrides: tuple[str, ...] = ()
    corrections: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A name for messages and tests."""
        return " ".join((self.algorithm, *self.corrections, *self.terms, *self.overrides[:1]))

    def load(self) -> Algorithm:
        """The algorithm, with only `terms` if some are named."""
        algorithm = algorithms.load(self.algorithm, self.overrides, self.corrections)
        terms = {name: algorithm.terms[name] for name in self.terms or algorithm.terms}
        return replace(algorithm, terms=terms)

    @functools.cached_property
    def proof(self) -> Proof:
        """See `upge.theory.symbolic.prove`."""
        algorithm = self.load()
        return prove(algorithm, self.objective, pairs=algorithm.needs.preference_pairs)


_ROLLOUTS = "reinforce reinforce_plus_plus rloo ppo grpo dr_grpo cispo gspo sapo gmpo opmd asymre relift dpo gdpo spo"
_VARIANTS = "opd maxrl dppo vespo luspo dro real exgrpo"
_IMITATION = "sft dft iw_sft offline_rl luffy rl_plus srft hpt hpt_offpolicy hpt_soft superrl chord_mu chord_phi amft"
_IMITATION += " uft gac"
_CORRECTIONS = "tis icepop mis mis_geometric dual_clip kl_k1 kl_k2 kl_k3 entropy kl_reward dynamic_sampling"
_CORRECTIONS += " ratio_kl sequence_mask overlong_filter optimal_baseline"
# A limit that the short responses of a proof reach; the buffer is a share of it.
_LIMIT, _BUFFER = f"limit={rollouts.LIMIT}", f"buffer={rollouts.BUFFER / rollouts.LIMIT}"
_NEAR = (f"terms.rl.estimator.advantage.{_LIMIT}", f"terms.rl.estimator.advantage.{_BUFFER}")
_NEAR_BY_CORRECTION = (f"correction.overlong.{_LIMIT}", f"correction.overlong.{_BUFFER}")
STATEMENTS = (
    *(Statement(name, getattr(rollouts, name)) for name in _ROLLOUTS.split()),
    *(Statement(name, getattr(variants, name)) for name in _VARIANTS.split()),
    *(Statement(name, getattr(demonstrations, name)) for name in _IMITATION.split()),
    Statement("dapo", rollouts.dapo, _NEAR),
    Statement(
        "iw_sft",
        demonstrations.iw_sft_sequence,
        ("terms.sft.estimator.denominator={_target_: upge.SequenceReferencePolicy, power: 2.0, low: 0.0, high: 16.0}",),
    ),
    Statement("srft", demonstrations.srft_offline, terms=("offline",)),
    *(Statement("dr_grpo", getattr(corrections, name), corrections=(name,)) for name in _CORRECTIONS.split()),
    Statement("dr_grpo", corrections.overlong, _NEAR_BY_CORRECTION, ("overlong",)),
    Statement("opd", variants.iw_opd, corrections=("iw_opd",)),
)


def statement(name: str) -> Statement:
    """The statement with this name.

    Raises:
        KeyError: there is no such statement.
    """
    return {one.name: one for one in STATEMENTS}[name]


#: Symbols of a displayed gradient: π_θ and π_old of the token, its Â, the mean ratio of its response.
THETA, OLD, ADVANTAGE, RATIO = (Symbol(name, positive=True) for name in ("π_θ", "π_old", "Â", "s"))


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: its name in the paper.
        proof: the name of the statement that it is derived from.
        term: the term of the algorithm that the row shows.
        note: how the shipped file differs from the paper's row.
    """

    name: str
    proof: str
    term: str
    note: str

    @property
    def part(self) -> Term:
        """The term."""
        return statement(self.proof).load().terms[self.term]


@dataclass(frozen=True)
class Reading:
    """The derived gradient of a token in one region.

    Attributes:
        gradient: the factor of ∇π_θ, divided by the weight of the average, in π_θ, π_old, Â and s.
        reference: π_ref; None if the token is masked.
        where: the condition on r = π_θ/π_old; empty if there is only one region.
    """

    gradient: Expr
    reference: Expr | None
    where: str = ""


@functools.cache
def readings(method: Method) -> tuple[Reading, ...]:
    """The different regions of a method, those in which the token is not masked first.

    Raises:
        ConfigError: the objective's Â differs from that of the algorithm's part.
    """
    cells: dict[Expr, list[Reading]] = {}
    claim = statement(method.proof)
    algorithm = claim.load()
    # One prompt, so that the batch has few symbols: two rollouts and a demonstration of two tokens each.
    shape = (((2, 2), (2,)),)
    for world in worlds(60, shape=shape, opaque=True, pairs=algorithm.needs.preference_pairs):
        row = next(r for r in world.rows if r.is_demonstration == (algorithm.terms[method.term].source != "rollouts"))
        slope = derive(claim.objective, world)[row.p[0]]
        term = factors(algorithm, world)[method.term]
        advantage = term.advantage[row.index][0]
        for symbol in slope.free_symbols & set(world.advantages):
            written = world.advantages[symbol]
            if not is_zero(written - advantage):
                raise ConfigError(f"{method.name}: Â is {advantage} by the parts and {written} as written")
        gradient = _readable(slope / (term.gate[row.index][0] * term.reduction[row.index][0]), world, row)
        symbol = ADVANTAGE if ADVANTAGE in gradient.free_symbols or gradient == 0 else advantage
        factor = _readable(term.shape[row.index][0], world, row)
        reference = None if gradient == 0 else sp.simplify(symbol * factor / gradient)
        cells.setdefault(gradient, []).append(Reading(gradient, reference, _where(world, row)))
    moving, stopped = [], []
    for same in cells.values():
        bounds = sorted(set.intersection(*(set(cell.where.split(" and ")) for cell in same)))
        (stopped if same[0].reference is None else moving).append(replace(same[0], where=" and ".join(bounds)))
    if len(moving) == 1:
        moving = [replace(moving[0], where="")]
    return (*sorted(moving, key=lambda r: r.where), *(replace(one, where="") for one in stopped))


def _readable(expression: Expr, world: World, row: Row) -> Expr:
    """The expression in π_θ and π_old of the row's first token, Â, and s, which replaces the other tokens."""
    if set(row.q[1:]) & expression.free_symbols:
        last = sp.Mul(*row.ratios[:-1]) * row.p[-1] / RATIO ** len(row)
        expression = sp.powdenest(sp.simplify(expression.subs(row.q[-1], last)), force=True)
    names = {row.p[0]: THETA, row.q[0]: OLD} | dict.fromkeys(world.advantages, ADVANTAGE)

    def monic(power: Expr) -> Expr:
        leading = sp.Poly(power.base, THETA).LC()
        return leading**power.exp * sp.expand(power.base / leading) ** power.exp

    result = sp.factor(sp.simplify(expression.xreplace(names))).replace(
        lambda e: e.is_Pow and e.base.is_Add and e.base.has(THETA), monic
    )
    strange = result.free_symbols - {THETA, OLD, ADVANTAGE, RATIO}
    if strange:
        raise ConfigError(f"the gradient has {sorted(map(str, strange))} besides π_θ, π_old, Â and s: {result}")
    return result


def _where(world: World, row: Row) -> str:
    """The bounds on the token's own ratio in this world, as text."""
    ratio, bounds = Symbol("r", positive=True), []
    for question, negative in world.asked.items():
        own = world.thaw(question)
        if own.free_symbols == {row.p[0], row.q[0]}:
            inner = sp.simplify(own.subs(row.p[0], ratio * row.q[0]))
            (bound,) = sp.solve(inner, ratio)
            below = (sp.diff(inner, ratio) > 0) == negative
            bounds.append(f"r < {bound}" if below else f"r > {bound}")
    return " and ".join(bounds)
