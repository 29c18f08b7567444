"""Expressions in positive symbols: whether one is zero, its gradient, and its value at a point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import cast

import sympy as sp
from sympy import Expr, Symbol

#: The value of each symbol.
Point = Mapping[Symbol, Expr] | Mapping[Symbol, float]


def number(value: float | int) -> sp.Rational:
    """A setting as a rational number: the one that its decimal digits denote, so 0.2 is 1/5.

    A number with all the digits of a float is the simple fraction that it approximates: 0.14285714285714285 is 1/7.
    """
    simple = Fraction(value).limit_denominator(1000)
    if len(repr(value)) > 14 and abs(simple - Fraction(value)) < 1e-15:
        return rational(simple.numerator, simple.denominator)
    return cast(sp.Rational, sp.Rational(str(value)))


# sympy's annotations are too wide for its results on expressions. These functions narrow them.


def rational(numerator: int, denominator: int) -> sp.Rational:
    """The rational number numerator/denominator, for a denominator other than 0."""
    return cast(sp.Rational, sp.Rational(numerator, denominator))


def arguments(expression: Expr) -> tuple[Expr, ...]:
    """The arguments of an expression."""
    return cast(tuple[Expr, ...], expression.args)


def symbols(expression: Expr) -> set[Symbol]:
    """The symbols in an expression."""
    return cast(set[Symbol], expression.free_symbols)


def substituted(expression: Expr, replacements: Mapping[Symbol, Expr]) -> Expr:
    """The expression with symbols replaced."""
    return cast(Expr, expression.xreplace(replacements))


def total(terms: Iterable[Expr | float]) -> Expr:
    """The sum of the terms as an expression."""
    return sp.Add(*terms)


def mean(terms: Iterable[Expr | float]) -> Expr:
    """The mean of the terms as an expression."""
    listed = list(terms)
    return sp.Add(*listed) / len(listed)


def product(terms: Iterable[Expr | float]) -> Expr:
    """The product of the terms as an expression."""
    return sp.Mul(*terms)


def value_at(expression: Expr, point: Point, memory: dict[Expr, float] | None = None) -> float:
    """The value of an expression at a point in float64, computed as the parts do but without their code.

    Args:
        memory: keeps the values of subexpressions between calls at the same point.
    """
    memory = {} if memory is None else memory
    if expression not in memory:
        memory[expression] = _value(expression, point, memory)
    return memory[expression]


def _value(expression: Expr, point: Point, memory: dict[Expr, float]) -> float:
    if isinstance(expression, Symbol):
        return float(point[expression])
    if expression.is_Number or expression.is_NumberSymbol:
        return float(expression)
    values = [value_at(argument, point, memory) for argument in arguments(expression)]
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
    raise TypeError(f"{expression.func} is not supported in objectives and parts")


def gradient(expression: Expr, variables: Sequence[Symbol]) -> dict[Symbol, Expr]:
    """The derivative with respect to each variable, computed term by term.

    A subexpression without any of the variables is treated as one symbol, because it may be large.
    """
    names: dict[Expr, Symbol] = {}
    hidden: dict[Expr, Expr] = {}
    live = set(variables)

    def hide(part: Expr) -> Expr:
        if part not in hidden:
            if part.is_Atom:
                hidden[part] = part
            else:
                children = [hide(argument) for argument in arguments(part)]
                varies = any(symbols(child) & live for child in children)
                hidden[part] = part.func(*children) if varies else names.setdefault(part, sp.Dummy(real=True))
        return hidden[part]

    slopes: dict[Symbol, list[Expr]] = {x: [] for x in variables}
    for front, term in _terms(hide(sp.sympify(expression)), sp.Integer(1), live):
        for x in symbols(term) & live:
            slopes[x].append(front * sp.diff(term, x))
    back = {symbol: part for part, symbol in names.items()}
    return {x: substituted(sp.Add(*terms), back) for x, terms in slopes.items()}


def _terms(expression: Expr, front: Expr, live: set[Symbol]) -> Iterator[tuple[Expr, Expr]]:
    """(front, term) pairs whose products add up to the expression; no front contains a live symbol."""
    if expression.is_Add:
        for term in arguments(expression):
            yield from _terms(term, front, live)
        return
    if expression.is_Mul:
        varying = [argument for argument in arguments(expression) if symbols(argument) & live]
        if len(varying) == 1:
            rest = sp.Mul(*(argument for argument in arguments(expression) if argument is not varying[0]))
            yield from _terms(varying[0], front * rest, live)
            return
    yield front, expression


def is_zero(expression: Expr) -> bool:
    """True if the expression vanishes identically.

    Exponentials, logarithms and roots are replaced by new positive symbols: e^{c·t} by E_t^c, log x by L_x, and the sum
    under a root by a symbol. The result is a rational function, whose numerator is expanded. True is a proof; False may
    in principle result from a relation that the replacement hides.
    """
    if expression == 0:
        return True
    names: dict[Expr, Symbol] = {}
    expression = _renamed(expression, names)
    roots = _roots(expression)
    if roots:
        expression = substituted(expression, {x: Symbol(f"{x.name}root", positive=True) ** n for x, n in roots.items()})
    numerator = sp.fraction(sp.together(expression))[0]
    return sp.expand(numerator) == 0


def _renamed(expression: Expr, names: dict[Expr, Symbol]) -> Expr:
    """The expression with exponentials, logarithms and roots of sums replaced by symbols, from the inside out."""
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
        return cast(Expr, inner.replace(lambda e: isinstance(e, sp.log), lambda e: name(e)))
    children = [_renamed(argument, names) for argument in arguments(expression)]
    if expression.is_Pow and not children[1].is_Integer:
        base = _factored(children[0])
        coefficient, rest = base.as_coeff_Mul()
        roots = [_root(factor, children[1], name) for factor in sp.Mul.make_args(rest)]
        return sp.Mul(coefficient ** children[1], *roots)
    return expression.func(*children)


@lru_cache(maxsize=4096)
def _factored(base: Expr) -> Expr:
    return sp.factor(sp.together(base))


def _power(term: Expr, coefficient: Expr, names: dict[Expr, Symbol], name: Callable[[Expr], Symbol]) -> Expr:
    """e^{coefficient·term}: a power of x if the term is log x, otherwise a power of a new symbol."""
    if isinstance(term, sp.log):
        return _renamed(sp.Pow(term.args[0], coefficient), names)
    return name(sp.exp(term, evaluate=False)) ** coefficient


def _root(factor: Expr, exponent: Expr, name: Callable[[Expr], Symbol]) -> Expr:
    """factor^exponent; a sum and its power become one symbol, so that the root of a square keeps its sign."""
    base, power = factor.as_base_exp()
    return base ** (power * exponent) if base.is_Symbol else name(factor) ** exponent


def _roots(expression: Expr) -> dict[Symbol, int]:
    """Symbol → the least common denominator of its exponents, for symbols where it is not 1."""
    denominators: dict[Symbol, int] = {}
    for power in expression.atoms(sp.Pow):
        base, exponent = power.args
        if isinstance(base, Symbol) and isinstance(exponent, sp.Rational) and exponent.q > 1:
            denominators[base] = math.lcm(denominators.get(base, 1), int(exponent.q))
    return denominators
