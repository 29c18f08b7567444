"""Expressions: what parses, bounds of sizes, and equality by value and by sympy."""

from __future__ import annotations

import math

import pytest
import sympy

from experiments.bench.verifier import EVIDENT_BOMBS, HIDDEN_BOMBS
from tests.verify_pools import boxed
from upge.verify import Item, VerifierPool
from upge.verify.magnitude import have_other_sizes, magnitude_of
from upge.verify.normalize import spell
from upge.verify.notation import write
from upge.verify.scalar import _equal_by_value, are_equal, expression
from upge.verify.tokens import UnreadableError, tokens_of

FINITE = [
    "7", "-12", r"\frac{2}{3}", "-0.004", "1.5", r"2\pi", "e^{-3}", "2^{10}", r"(-3)^{5}", r"2^{-\frac{1}{2}}",
    r"\sqrt{5}",
    r"\frac{1}{\sqrt{7}}", "3+5", "3-5", r"10^{6}-1", r"1-\sqrt{2}", "5!", "20!", r"\frac{7!}{5!}", r"\binom{10}{3}",
    r"\binom{5}{5}", r"\binom{40}{20}", r"-\frac{3^{20}}{2^{7}}", r"\pi^{e}", r"e^{e^{2}}", r"(0.5)^{30}",
    r"2^{3^{2}}",
    r"\left(\frac{1}{3}\right)^{-4}", r"3!!", r"100^{0.5}", r"(2-5)^{3}", r"(1+\sqrt{3})^{4}", r"2^{1-5}",
]  # fmt: skip


def parsed(text: str) -> sympy.Expr:
    actual = expression(write(tokens_of(spell(text))).latex)
    assert actual is not None, text
    return actual


@pytest.mark.parametrize("text", FINITE)
def test_bounds_hold(text: str) -> None:
    expression = parsed(text)
    size, value = magnitude_of(expression), complex(expression.evalf(30))
    assert size is not None
    assert size.low <= math.log(abs(value)) <= size.high
    assert size.sign in (0, (value.real > 0) - (value.real < 0))
    assert not size.is_whole or abs(value - round(value.real)) < 1e-6 * abs(value)


NO_SIZE = ["0", "x", "x^2+1", r"\sin 3", "i", r"\sum_{k=1}^{5} k", "2^{i}", "(1-1)!", r"(\frac12)!"]


@pytest.mark.parametrize("text", NO_SIZE)
def test_of_what_has_no_size_here_nothing_is_said(text: str) -> None:
    assert magnitude_of(parsed(text)) is None


def test_huge_sizes() -> None:
    tower, inverse = magnitude_of(parsed("9^{9^{9^9}}")), magnitude_of(parsed("3^{-9^{9^9}}"))
    assert tower is not None and tower[1:] == (math.inf, 1, True) and 1e280 < tower.low < math.inf
    assert inverse is not None and inverse.low == -math.inf and -math.inf < inverse.high < -1e280
    near = magnitude_of(parsed("9^{9^{9^9}}-9^{9^{9^9}}+3.5"))
    assert near is not None and near.low == -math.inf and near.high == math.inf


#: Signs of a factorial one after another have no reading; with brackets they have.
READABLE_BOMBS = [bomb.replace("42!!!!!!", "(((42!)!)!)!") for bomb in EVIDENT_BOMBS]
APART = [
    *[("3.5", bomb) for bomb in READABLE_BOMBS], *[(r"-\frac{2\pi}{3}", bomb) for bomb in READABLE_BOMBS],
    ("3.5", "3^{-9^{9^9}}"), ("10^{100}", "9^{9^{9^9}}"), ("0.01", "9^{9^{9^9}}"), ("2^{100}", "-2^{9^{9^9}}"),
    ("9^{9^{9^9}}", "5"), ("3^{-9^{9^9}}", "5"),
    ("x^2+1", "7"), ("7", "x^2+1"), ("x^2+2x+1", "(x+2)^2"), (r"\sqrt{2}", r"\sqrt{3}"), ("2+3i", "2-3i"),
    (r"\frac{x}{y}", r"\frac{y}{x}"), ("2x", "2y"), (r"\sin x+1", r"\cos x+1"), ("1/3", "0.33"), ("|x|", "x"),
    (r"\sqrt{(x-5)^2}", "x-5"), ("x", "y"), (r"\sqrt{2}", "1.41"), ("10^{20}", "10^{20}+1"),
]  # fmt: skip
EQUAL = [
    ("1/3", "0.333333"), ("(x+1)^2", "x^2+2x+1"), (r"\log((x-5)^2)", r"2\log(x-5)"), (r"\sqrt[3]{-8}", "-2"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"), ("2i", "(1+i)^2"), (r"\sqrt{-4}", "2i"), ("0.5x", r"\frac{x}{2}"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"), (r"\sin(x+y)", r"\sin x\cos y+\cos x\sin y"), ("10^{20}", "(10^{10})^2"),
    (r"\lfloor n/2\rfloor", r"\lfloor\frac{n}{2}\rfloor"), ("e^{2x}", r"\exp(2x)"), (r"\binom{5}{2}", "10"),
    (r"\tan^2 x+1", r"\frac{1}{\cos^2 x}"), ("4.5e33", r"4.5\cdot 10^{33}"), ("x^{1/3}", r"\sqrt[3]{x}"),
]  # fmt: skip
NOT_KNOWN = [
    # Equal, in whatever form, and whatever size.
    ("2^{10^{10}}", "4^{5\\cdot 10^{9}}"), ("1", "1^{9^{9^9}}"), ("1", r"(-1)^{9^{9^9}-1}"),
    ("3.5", "9^{9^{9^9}}-9^{9^{9^9}}+3.5"), ("10^9", r"\frac{(10^9)!}{(10^9-1)!}"),
    ("2", r"\frac{9^{9^{9^9}}}{2^{-1}9^{9^{9^9}}}"), ("0", "3^{-9^{9^9}}"), (r"\sum_{k=1}^{5} k", "3"),
    # A part that is 0, which no number of digits shows.
    ("x+1", r"x+((x+1)^2-x^2-2x-1)^{\frac{1}{90}}+1"), (r"2+\sqrt3", r"2+\sqrt3+(\sin^2 3+\cos^2 3-1)^{1/90}"),
    ("x+1", r"10^{200}+x+1-10^{200}"),
    # Not to be evaluated.
    ("3.5", r"i^{9^{9^9}}"), ("3.5", r"\sin(10^{10^{10}})"), ("3.5", "9^{9^{9^9}}x"), ("x^2", "9^{9^{9^9}}x"),
]  # fmt: skip


def known(gold: str, given: str) -> bool | None:
    """What is known of two expressions without sympy."""
    is_decimal = "." in gold + given
    if have_other_sizes(parsed(gold), parsed(given)):
        return False
    return _equal_by_value(parsed(gold), parsed(given), is_decimal)


@pytest.mark.timeout(100)
def test_what_is_known_by_value() -> None:
    assert [pair for pair in APART if known(*pair) is not False] == []
    assert [pair for pair in EQUAL if known(*pair) is not True] == []
    assert [pair for pair in NOT_KNOWN if known(*pair) is not None] == []


def test_sympy_decides_on_the_rest() -> None:
    equal = [
        ("55", r"\sum_{k=1}^{10} k"),
        ("x", "x+x-x"),
        (r"\frac{1}{2}", r"\int_0^1 x dx"),
        ("1", r"\cos 0"),
        ("0", "x-x"),
    ]
    other = [("54", r"\sum_{k=1}^{10} k"), ("x+1", "x+x-x"), (r"\frac{1}{3}", r"\int_0^1 x dx"), ("0", r"\frac{x}{0}")]
    assert [pair for pair in equal if not are_equal(*map(parsed, pair))] == []
    assert [pair for pair in other if are_equal(*map(parsed, pair))] == []


#: Spelling of the parser, and texts that mean it.
SPELLINGS = {
    r"\frac{1}{2}\sqrt[3]{\variable{x}}": [r"\frac12\sqrt[3]x", r"\dfrac{1}{2}\sqrt[3]{x}", "½∛x"],
    r"7\cdot \sin((\pi )\cdot \variable{x}/ 5)": ["7*sin(pi*x/5)", r"7\cdot\sin(\pi\cdot x/5)"],
    r"(1+\frac{1}{4})": ["1 1/4", r"1\frac14", r"1 \frac{1}{4}"],
    r"(\frac{3}{9})": [r"0.\overline{3}"],
    r"(\frac{25}{10}\cdot 10^{-3})": ["2.5e-3", "2.5E-3"],
    r"\sin(2\variable{x})\variable{y_{1}}": [r"\sin(2x)y_1", r"\sin{2x}y_{1}"],
    r"\sin(\frac{(\pi )}{6})/ 2": [r"\sin\frac\pi6/2"],
    r"\sin^{2}(\variable{x})": [r"\sin^2 x", r"\sin^{2}x", "sin^2(x)"],
    r"\binom{\variable{n}}{2}": [r"\binom n2", r"\dbinom{n}{2}"],
    r"\variable{x}^{10}": ["x^10", "x^{10}", "x**10", "x¹⁰"],
    r"e^{2(I)(\pi )}": [r"e^{2i\pi}", r"\mathrm{e}^{2\mathrm{i}\pi}"],
}


def test_notations_have_one_spelling() -> None:
    for latex, texts in SPELLINGS.items():
        assert {text: write(tokens_of(spell(text))).latex for text in texts} == dict.fromkeys(texts, latex)


@pytest.mark.parametrize(
    "text",
    [
        "2 3",
        "x)",
        "(x",
        "5+",
        r"\frac{1}{",
        r"\sqrt{}",
        r"\sin",
        r"x\to 2",
        "x=2",
        "1,2",
        r"\star x",
        r"x\text{ or}",
        "007",
    ],
)
def test_what_is_not_an_expression(text: str) -> None:
    try:
        latex = write(tokens_of(spell(text))).latex
    except UnreadableError:
        return
    assert expression(latex) is None


def test_evident_bombs_cost_no_time_and_hidden_ones_the_limit() -> None:
    with VerifierPool("math", workers=2, time_limit=1.5) as pool:
        evident = pool.score([Item(boxed(bomb), answer) for bomb in EVIDENT_BOMBS for answer in ("3.5", r"2\sqrt{3}")])
        hidden = pool.score([Item(boxed(bomb), "3.5") for bomb in HIDDEN_BOMBS])
    assert {(verdict.reward, verdict.status) for verdict in evident} == {(0.0, "ok")}
    assert [verdict.reward for verdict in hidden] == [0.0] * len(HIDDEN_BOMBS)
    assert [verdict.status for verdict in hidden].count("timeout") >= 3, "or one of them runs out of memory first"
