"""Deciding whether an expression in positive symbols is zero, and its value at a point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import sympy as sp
from sympy import Expr, Symbol


def number(value: float | int) -> sp.Rational:
    """A setting as the rational that its decimal digits say: 0.2 is 1/5. One written with all the digits that a float
    has is the simple fraction that they stand for: 0.14285714285714285 is 1/7."""
    simple = Fraction(value).limit_denominator(1000)
    if len(repr(value)) > 14 and abs(simple - Fraction(value)) < 1e-15:
        return sp.Rational(simple.numerator, simple.denominator)
    return sp.Rational(str(value))


def total(terms) -> Expr:
    """Their sum as an expression."""
    return sp.Add(*terms)


def mean(terms) -> Expr:
    """Their mean as an expression."""
    terms = list(terms)
    return sp.Add(*terms) / len(terms)


def product(terms) -> Expr:
    """Their product as an expression."""
    return sp.Mul(*terms)


def value_at(expression: Expr, point: Mapping[Symbol, Expr], memory: dict[Expr, float] | None = None) -> float:
    """The expression in float64 at a point: as the parts themselves compute, without their code. `memory` keeps values
    of sums and powers from call to call."""
    memory = {} if memory is None else memory
    if expression not in memory:
        memory[expression] = _value(expression, point, memory)
    return memory[expression]


def _value(expression: Expr, point: Mapping[Symbol, Expr], memory: dict[Expr, float]) -> float:
    if expression.is_Symbol:
        return float(point[expression])
    if expression.is_Number or expression.is_NumberSymbol:
        return float(expression)
    values = [value_at(argument, point, memory) for argument in expression.args]
    if expression.is_Add:
        return math.fsum(values)
    if expression.is_Mul:
        return math.prod(values)
    if isinstance(expression, sp.exp):
        return math.exp(values[0])
    if expression.is_Pow:
        return values[0] ** values[1]
    if isinstance(expression, sp.log):
        return math.log(values[0])
    raise TypeError(f"{expression.func} is none of the functions that objectives and parts are made of here")


def gradient(expression: Expr, variables: Sequence[Symbol]) -> dict[Symbol, Expr]:
    """The derivative by each variable: term by term, each only by the variables that it holds.

    What holds none of them is differentiated as one symbol: it may be large.
    """
    names: dict[Expr, Symbol] = {}
    hidden: dict[Expr, Expr] = {}
    live = set(variables)

    def hide(part: Expr) -> Expr:
        if part not in hidden:
            if part.is_Atom:
                hidden[part] = part
            else:
                arguments = [hide(argument) for argument in part.args]
                moves = any(a.free_symbols & live for a in arguments)
                hidden[part] = part.func(*arguments) if moves else names.setdefault(part, sp.Dummy(real=True))
        return hidden[part]

    slopes: dict[Symbol, list[Expr]] = {x: [] for x in variables}
    for front, term in _terms(hide(sp.sympify(expression)), sp.Integer(1), live):
        for x in term.free_symbols & live:
            slopes[x].append(front * sp.diff(term, x))
    back = {symbol: part for part, symbol in names.items()}
    return {x: sp.Add(*found).xreplace(back) for x, found in slopes.items()}


def _terms(expression: Expr, front: Expr, live: set[Symbol]) -> Iterator[tuple[Expr, Expr]]:
    """(front, term) pairs whose products add up to the expression; no front holds a live symbol."""
    if expression.is_Add:
        for term in expression.args:
            yield from _terms(term, front, live)
        return
    if expression.is_Mul:
        moving = [argument for argument in expression.args if argument.free_symbols & live]
        if len(moving) == 1:
            rest = sp.Mul(*(argument for argument in expression.args if argument is not moving[0]))
            yield from _terms(moving[0], front * rest, live)
            return
    yield front, expression


def is_zero(expression: Expr) -> bool:
    """True if the expression vanishes identically.

    Exponentials, logarithms and roots are renamed: e^{c·t} to E_t^c, log x to L_x, the root of a sum to one of a new
    positive symbol. What is left is a rational function, and its numerator is expanded. A True is a proof; a False may
    in principle come from a relation that the renaming hides.
    """
    if expression == 0:
        return True
    names: dict[Expr, Symbol] = {}
    expression = _renamed(expression, names)
    roots = _roots(expression)
    if roots:
        expression = expression.xreplace({x: Symbol(f"{x.name}root", positive=True) ** n for x, n in roots.items()})
    numerator = sp.fraction(sp.together(expression))[0]
    return sp.expand(numerator) == 0


def _renamed(expression: Expr, names: dict[Expr, Symbol]) -> Expr:
    """The expression without exponentials, logarithms and roots of sums, from the inside out."""
    if expression.is_Atom:
        return expression

    def name(key: Expr) -> Symbol:
        return names.setdefault(key, Symbol(f"_{len(names)}", positive=True))

    if isinstance(expression, sp.exp):
        exponent = sp.expand(expression.args[0])
        powers = [term.as_coeff_Mul() for term in sp.Add.make_args(exponent)]
        factors = [_power(term, sp.Integer(1) * coefficient, names, name) for coefficient, term in powers]
        return sp.Mul(*factors)
    if isinstance(expression, sp.log):
        inner = sp.expand_log(sp.log(sp.factor(sp.together(expression.args[0]))), force=True)
        return inner.replace(lambda e: isinstance(e, sp.log), lambda e: name(e))
    arguments = [_renamed(argument, names) for argument in expression.args]
    if expression.is_Pow and not arguments[1].is_Integer:
        base = _factored(arguments[0])
        rational, rest = base.as_coeff_Mul()
        roots = [_root(factor, arguments[1], name) for factor in sp.Mul.make_args(rest)]
        return sp.Mul(rational ** arguments[1], *roots)
    return expression.func(*arguments)


@lru_cache(maxsize=4096)
def _factored(base: Expr) -> Expr:
    return sp.factor(sp.together(base))


def _power(term: Expr, coefficient: Expr, names: dict[Expr, Symbol], name) -> Expr:
    """e^{coefficient·term}; of a logarithm it is a power, of anything else a power of a new symbol."""
    if isinstance(term, sp.log):
        return _renamed(sp.Pow(term.args[0], coefficient), names)
    return name(sp.exp(term, evaluate=False)) ** coefficient


def _root(factor: Expr, exponent: Expr, name) -> Expr:
    """factor^exponent; a sum gets a name together with its own power, so that no root of a square loses its sign."""
    base, power = factor.as_base_exp()
    return base ** (power * exponent) if base.is_Symbol else name(factor) ** exponent


def _roots(expression: Expr) -> dict[Symbol, int]:
    """Symbol → the least common denominator of its exponents, where that is not 1."""
    found: dict[Symbol, int] = {}
    for power in expression.atoms(sp.Pow):
        base, exponent = power.args
        if base.is_Symbol and exponent.is_Rational and exponent.q > 1:
            found[base] = math.lcm(found.get(base, 1), int(exponent.q))
    return found
