"""What the math verifier says without evaluating: sizes, values, and a parser that reads the same in less time."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import sympy

from experiments.bench.verifier import EVIDENT_BOMBS, HIDDEN_BOMBS
from tests.upge.verify.test_verify import DATA, RIGHT, WRONG
from tests.verify_pools import ROOT, boxed
from upge.verify import Item, VerifierPool, load
from upge.verify.inequality import are_unequal, magnitude_of
from upge.verify.math import ANSWERS, _parse
from upge.verify.normalize import normalize

FINITE = [
    "7", "-12", r"\frac{2}{3}", "-0.004", "1.5", r"2\pi", "e^{-3}", "2^{10}", r"(-3)^{5}", r"2^{-\frac{1}{2}}",
    r"\sqrt{5}",
    r"\frac{1}{\sqrt{7}}", "3+5", "3-5", r"10^{6}-1", r"1-\sqrt{2}", "5!", "20!", r"\frac{7!}{5!}", r"\binom{10}{3}",
    r"\binom{5}{5}", r"\binom{40}{20}", r"-\frac{3^{20}}{2^{7}}", r"\pi^{e}", r"e^{e^{2}}", r"(0.5)^{30}",
    r"2^{3^{2}}",
    r"\left(\frac{1}{3}\right)^{-4}", r"3!!", r"100^{0.5}", r"(2-5)^{3}", r"(1+\sqrt{3})^{4}", r"2^{1-5}",
]  # fmt: skip


def parsed(text: str) -> sympy.Expr:
    return _parse(normalize(text))[0]


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


APART = [
    *[("3.5", bomb) for bomb in EVIDENT_BOMBS], *[(r"-\frac{2\pi}{3}", bomb) for bomb in EVIDENT_BOMBS],
    ("3.5", "3^{-9^{9^9}}"), ("10^{100}", "9^{9^{9^9}}"), ("0.01", "x=9^{9^{9^9}}"), ("2^{100}", "-2^{9^{9^9}}"),
    ("9^{9^{9^9}}", "5"), ("3^{-9^{9^9}}", "5"),
    ("x^2+1", "7"), ("7", "x^2+1"), ("x^2+2x+1", "(x+2)^2"), (r"\sqrt{2}", r"\sqrt{3}"), ("2+3i", "2-3i"),
    (r"\frac{x}{y}", r"\frac{y}{x}"), ("2x", "2y"), (r"\sin x+1", r"\cos x+1"), ("2+2x", "y=3+2x"),
]  # fmt: skip
NOT_KNOWN = [
    # Equal, in whatever form, and whatever size.
    ("9^{9^{9^9}}", "9^{9^{9^9}}"), ("2^{10^{10}}", "4^{5\\cdot 10^{9}}"), ("1", "1^{9^{9^9}}"),
    ("1", r"(-1)^{9^{9^9}-1}"),
    ("3.5", "9^{9^{9^9}}-9^{9^{9^9}}+3.5"), ("10^9", r"\frac{(10^9)!}{(10^9-1)!}"),
    ("2", r"\frac{9^{9^{9^9}}}{2^{-1}9^{9^{9^9}}}"),
    ("5", r"5\%"), (r"5\%", "0.05"), ("1/3", "0.333333"), ("0", "3^{-9^{9^9}}"), ("0.000001", "0.0000005"),
    ("0", "0.0000004"),
    ("(x+1)^2", "x^2+2x+1"), (r"\sqrt{(x-5)^2}", "x-5"), (r"\log((x-5)^2)", r"2\log(x-5)"),
    ("x=5", "5"), ("5", "x=5"), ("2x=10", "x=5"), (r"10^{9}x=1", "x=10^{-9}"),
    # Not expressions.
    ("x", "y"), ("e", r"\text{E}"), ("abc", r"\text{abc}"), ("(1,2)", "(3,4)"), (r"\{1,2\}", "9^{9^{9^9}}"),
    ("x>3", "x>4"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}3\\2\end{pmatrix}"), ("f(x)", "f(y)"),
    (r"\sum_{k=1}^{5} k", "3"),
    # A part that is 0, which no number of digits shows, and a side of a branch cut that none of them decides.
    ("x+1", r"x+((x+1)^2-x^2-2x-1)^{\frac{1}{90}}+1"), (r"2+\sqrt3", r"2+\sqrt3+(\sin^2 3+\cos^2 3-1)^{1/90}"),
    ("1+2i", r"\sqrt{4e^{-i\pi}}+1"), ("x+1", r"10^{200}+x+1-10^{200}"),
    # Not to be evaluated, but equal.
    (r"1+e^{e^{e^{e^{e^x}}}}", r"e^{e^{e^{e^{e^x}}}}+1"), (r"1+\sin(x^{x^{x^{x}}})", r"\sin(x^{x^{x^{x}}})+1"),
    # Not to be evaluated.
    ("3.5", r"i^{9^{9^9}}"), ("3.5", r"\sin(10^{10^{10}})"), ("3.5", "9^{9^{9^9}}x"), ("x^2", "9^{9^{9^9}}x"),
]  # fmt: skip


@pytest.mark.timeout(100)
def test_what_differs_is_known_at_once_and_nothing_else() -> None:
    assert [(g, a) for g, a in APART if not are_unequal(parsed(g), parsed(a))] == []
    assert [(g, a) for g, a in NOT_KNOWN if are_unequal(parsed(g), parsed(a))] == []


def test_no_answer_that_is_right_is_refused() -> None:
    pairs = [(normalize(answer), normalize(given)) for given, answer in RIGHT] + list(ANSWERS)
    for gold, given in pairs:
        found = _parse(gold), _parse(given)
        if all(found) and are_unequal(found[0][0], found[1][0]):
            assert (given, gold) not in RIGHT and load("math")(boxed(given), gold) == 0.0, (gold, given)


def test_evident_bombs_cost_no_time_and_hidden_ones_the_limit() -> None:
    with VerifierPool("math", workers=2, time_limit=1.5) as pool:
        evident = pool.score([Item(boxed(bomb), answer) for bomb in EVIDENT_BOMBS for answer in ("3.5", r"2\sqrt{3}")])
        hidden = pool.score([Item(boxed(bomb), "3.5") for bomb in HIDDEN_BOMBS])
    assert {(verdict.reward, verdict.status) for verdict in evident} == {(0.0, "ok")}
    assert [verdict.reward for verdict in hidden] == [0.0] * len(HIDDEN_BOMBS)
    assert [verdict.status for verdict in hidden].count("timeout") >= 3, "or one of them runs out of memory first"


READ = r"""
import json, sys
from sympy import srepr
from upge.verify.math import use_sll_prediction
from upge.verify.math import _parse
texts = json.loads(sys.stdin.read())
exact = [[srepr(part) for part in _parse(text)] for text in texts]
from math_verify.parser import parse_latex_cached
parse_latex_cached.cache_clear(), _parse.cache_clear()
use_sll_prediction(), use_sll_prediction()
sll = [[srepr(part) for part in _parse(text)] for text in texts]
print(json.dumps([text for text, a, b in zip(texts, exact, sll) if a != b]), sum(map(bool, exact)))
"""


def test_the_hasty_parser_reads_the_same() -> None:
    texts = [text for pair in [*RIGHT, *WRONG, *ANSWERS] for text in pair if len(text) < 200]
    texts += [r"1+2+\dots+n=n(n+1)/2", r"\widehat{AE}", r"\emph{not}", r"\frac{1}{", "a=5,b=a", "a=5, b=a+1, c=b/2"]
    if (DATA / "eval" / "math500.json").exists():
        rows = json.loads((DATA / "eval" / "math500.json").read_text())
        texts += [str(row["answer"]) for row in rows][::3]
    texts = [normalize(text) for text in texts if "\ud800" not in text]
    command = [sys.executable, "-c", READ]
    done = subprocess.run(command, input=json.dumps(texts), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    differing, _, count = done.stdout.rpartition(" ")
    assert json.loads(differing) == [] and int(count) > 150
