"""The tools of symbolic proofs: when an expression is zero, stop-gradients, kinks and the names of variables."""

from __future__ import annotations

import pytest
import sympy as sp
from sympy import Rational, exp, log, sqrt

from upge.theory import symbolic
from upge.theory.symbolic import BoundaryPoint, World, is_zero


def test_zero_is_told_from_what_is_not():
    x, y, z = sp.symbols("x y z", positive=True)
    r, s = sp.symbols("r s", real=True)
    third = Rational(1, 3)
    for expression in (
        (x * y * z) ** third / x - exp((log(x) + log(y) + log(z)) / 3) / x,
        exp(-x / y) * exp(x / y) - 1,
        1 / (1 + exp(-x)) * (1 - 1 / (1 + exp(-x))) - exp(x) / (1 + exp(x)) ** 2,
        sqrt(((r - s) / 2) ** 2 + ((s - r) / 2) ** 2) - sqrt((r**2 - 2 * r * s + s**2) / 2),
        log(x / y) - log(x) + log(y),
        (x**2 - y**2) / (x - y) - x - y,
        exp(Rational(2, 5)) ** third - exp(Rational(2, 15)),
    ):
        assert is_zero(expression), expression
    for expression in (
        (x * y * z) ** third - exp((log(x) + log(y) + log(z)) / 2),
        1 / (1 + exp(-x)) - 1 / (1 + exp(x)),
        sqrt((r - s) ** 2 + 1) - (r - s),
        sqrt(2 * r**2 + 2 * s**2) - sqrt(r**2 + s**2),
        log(x / y) - log(y / x),
        x - y,
    ):
        assert not is_zero(expression), expression


def test_stop_gradients_kinks_and_names():
    world = World(0)
    p, q = world.rows[0].p[0], world.rows[0].q[0]
    assert symbolic.derive(lambda w: w.sg(p**2) * log(p), world)[p] == p
    assert symbolic.derive(lambda w: w.sg(p) + q, world)[p] == 0
    assert world.less(p, p * 2) and not world.less(p * 2, p) and len(world.asked) <= 1
    with pytest.raises(BoundaryPoint):
        world.less(p, world.point[p])
    assert world.clip(p, high=p) == p, "equal as expressions: either will do"
    world.variable("mu", 0.5)
    with pytest.raises(ValueError, match="own name"):
        world.variable("mu", 0.6)
    assert World(3).rows == World(4).rows and World(3).point != World(4).point
