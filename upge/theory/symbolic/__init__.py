"""The factor in front of ∇π_θ, derived with sympy from a written objective and compared with the product of the parts.

    from upge.theory import symbolic

    def objective(world):                               # J, to be maximized; here: the mean log-likelihood of experts
        rows = world.demonstrations
        return sum(sympy.log(p) for row in rows for p in row.p) / sum(map(len, rows))

    proof = symbolic.prove(algorithm, objective)        # algorithm: an upge.Algorithm
    assert proof.holds, proof.mismatches

See `world` for the batch of symbols and how clips and minima are taken case by case, `rules` for the symbolic form of
each part and how to add one, `proof` for what is compared with what.
"""

from upge.theory.symbolic.algebra import is_zero, mean, number, product, total, value_at
from upge.theory.symbolic.proof import Factors, Mismatch, Proof, compare, derive, factors, prove
from upge.theory.symbolic.proof import product as product_of_parts
from upge.theory.symbolic.rules import evaluate, has_rule, per_row, per_token, rule
from upge.theory.symbolic.world import LEVELS, SHAPE, BoundaryPoint, Row, World, worlds

__all__ = [
    "LEVELS",
    "SHAPE",
    "BoundaryPoint",
    "Factors",
    "Mismatch",
    "Proof",
    "Row",
    "World",
    "compare",
    "derive",
    "evaluate",
    "factors",
    "has_rule",
    "is_zero",
    "mean",
    "number",
    "per_row",
    "per_token",
    "product",
    "product_of_parts",
    "prove",
    "rule",
    "total",
    "value_at",
    "worlds",
]
