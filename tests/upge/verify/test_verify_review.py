r"""Answers that earned what they should not, or nothing where they are right: gaps that were found by trying."""

from __future__ import annotations

import json
import re

import pytest

from tests.upge.verify.test_verify_gold import DATA, needs_data
from tests.verify_pools import boxed
from upge.verify import final_text, load
from upge.verify.choice import named

#: Ground truth, prompt, answers that leave it to the verifier to work out.
UNDONE = [
    ("8", None, [r"3+5\text{ cm}", r"3+5\%", r"3\text{ }+5", "x-x+3+5", "3+5 cm", "8+x-x", r"8+\theta-\theta"]),
    ("8", None, [r"\begin{vmatrix}8&0\\0&1\end{vmatrix}", r"\begin{Vmatrix}8&0\\0&1\end{Vmatrix}"]),
    ("1", None, [r"\exp(0)"]),
    ("(x+1)^2", "Factor $x^2+2x+1$.", [r"x^2+2x+1\text{ }", "(x^2+2x+1)", "x^{2}+2x+1", "x^2+2x+1", "[x^2+2x+1]"]),
    ("(x+1)^2", "Factor (x^{2}+2x+1).", ["x^2+2x+1", "(x^2+2x+1)"]),
    (r"\frac{3}{4}", "Simplify 6/8.", [r"\frac{6}{8}", "6/8", r"\dfrac68", r"(\frac{6}{8})"]),
    (r"\frac{3}{4}", r"Simplify $\frac{6}{8}$.", [r"\frac{6}{8}", "6/8"]),
    (r"4\sqrt{3}", r"Simplify $\sqrt{48}$.", [r"\sqrt{48}\text{ cm}", r"{\sqrt{48}}", r"\sqrt{48}"]),
    ("1024", "Compute $2^{10}$.", ["2^10", "2^{10}"]),
]
DONE = [
    ("8", ["8", r"8\text{ cm}", "8 cm", r"8\text{ cm}^2", "x = 8", r"x=8\text{ cm}", r"\sqrt{64}", "n=3+5=8"]),
    (r"e^2", [r"\exp(2)", "e^{2}"]),
    (r"\exp(x)", ["e^x"]),
    ("(x+1)^2", ["x^2+2x+1", "(1+x)^2"]),
    (r"\frac{3}{4}", [r"\frac{6}{8}", "0.75"]),
    (r"2^{10}", ["1024", "2^{10}"]),
    (r"\frac{1}{2}", [r"e^{0}/2"]),
]


@pytest.mark.parametrize("gold, prompt, answers", UNDONE)
def test_what_is_left_undone(gold: str, prompt: str | None, answers: list[str]) -> None:
    assert {answer: load("math")(boxed(answer), gold, prompt) for answer in answers} == dict.fromkeys(answers, 0.0)


@pytest.mark.parametrize("gold, answers", DONE)
def test_what_is_done(gold: str, answers: list[str]) -> None:
    assert {answer: load("math")(boxed(answer), gold) for answer in answers} == dict.fromkeys(answers, 1.0)


# --- numbers with an exponent, units, several numbers --------------------------------------------------------------

SAME = [
    ("1000", "1e3"), ("1e3", "1000"), ("6.5e-2", "0.065"), ("0.065", "6.5e-2"), ("4.5e33", r"4.5e33\text{ erg}"),
    ("4.5e33", r"4.5\times 10^{33}\text{ erg}"), ("4.5e33", "4.5E+33"), ("-2e2", "-200"), ("1e-5", r"10^{-5}"),
    *(("18", f"18 {unit}") for unit in ("dollars", "people", "eggs", "cups", "books", "eggs per day")),
    ("5", r"\approx 5"), ("5", r"5\text{ cm}^2"), ("5", r"5\text{ kg m}^{-1}\text{s}^{-2}"),
    ("5", r"\text{Area} = 5"), ("52_8", "52"), ("5", "3+2=5"),
]  # fmt: skip
DIFFERENT = [
    ("4.5e33", r"4.5\cdot e\cdot 33"), ("1e-5", "1.01e-5"), ("1000", "1e4"), ("1e-5", "0"),
    *(("18", f"18 {words}") for words in ("million", "or 19", "dollars or nothing", "is wrong", "dozen", "feet six")),
    *(
        ("5", several)
        for several in (
            r"5\text{ cm, }6\text{ cm}", r"5\text{ apples} 6\text{ pears}", r"5\text{ hours }30\text{ minutes}",
            r"5 \text{ if even, } 6 \text{ otherwise}", r"5 \approx 6", r"5\text{ is wrong}", r"5\text{; }6",
            r"5\text{ cm}, 6", r"5\text{ if even}",
        )
    ),
    ("101", "101_2"), ("101", "101_{2}"), ("101", "x=101_2"), ("52_8", "52_7"),
]  # fmt: skip


@pytest.mark.parametrize("reward, gold, given", [(1.0, *c) for c in SAME] + [(0.0, *c) for c in DIFFERENT])
def test_numbers_with_words_and_exponents(reward: float, gold: str, given: str) -> None:
    assert load("math")(boxed(given), gold) == reward


@needs_data
def test_the_powers_of_ten_of_a_real_set() -> None:
    rows = json.loads((DATA / "eval" / "minerva.json").read_text("utf-8"))
    golds = [str(row["answer"]) for row in rows]
    actual = [(gold, re.fullmatch(r"([+-]?[0-9.]+)[eE]\+?(-?[0-9]+)", gold)) for gold in golds]
    actual = [(gold, match) for gold, match in actual if match]
    assert len(actual) > 30
    math, bad = load("math"), []
    for gold, match in actual:
        right, near = rf"{match[1]} \times 10^{{{match[2]}}}", rf"{float(match[1]) * 1.01:.6g}\times 10^{{{match[2]}}}"
        product = rf"{match[1]}\cdot e\cdot {match[2]}"
        rewards = [math(boxed(answer), gold) for answer in (gold, right, near, product)]
        bad += [(gold, rewards)] if rewards != [1.0, 1.0, 0.0, 0.0] else []
    assert bad == []


@pytest.mark.parametrize(
    "answer, right, wrong",
    [
        ('["5", "x+1"]', ["5", "1+x", "5.0"], ["6", "x", "5, x+1"]),
        (
            '{"value": 9.81, "rtol": 0.01}',
            ["9.8", "9.81", "g=9.75", r"9.81\text{ m/s}^2"],
            ["9.6", "x", "9.8, 9.7", "9+0.8"],
        ),
        ('[{"value": 2, "rtol": 0.1}, "none"]', ["2.1", "None"], ["3", "2.1, none"]),
        ("[1,2]", ["[1, 2]"], ["1", "(1,2)"]),
    ],
)
def test_several_accepted_answers_and_tolerances(answer: str, right: list[str], wrong: list[str]) -> None:
    math = load("math")
    assert math.check_answer(answer) is None
    assert {given: math(boxed(given), answer) for given in right} == dict.fromkeys(right, 1.0)
    assert {given: math(boxed(given), answer) for given in wrong} == dict.fromkeys(wrong, 0.0)


@pytest.mark.parametrize("answer", ['["5", ""]', '{"value": "x", "rtol": 1}', '{"value": 5}', '["$t(0,4]$"]'])
def test_bad_lists_of_answers_are_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="does not parse"):
        load("math").check_answer(answer)


# --- options -------------------------------------------------------------------------------------------------------

PLANETS = "Which planet?\n\nA) Mars\nB) The Sun\nC) 3\nD) None"
COUNTS = "How many?\n\n(a) one\n(b) two\n(c) three"
DIGITS = "How many?\n1) one\n2) two"
HEDGED = [
    "A, else D", "A. else D", "A, maybe D", "A, or perhaps C", "A, plus D", "A) Mars, The Sun, 3, None", "D, maybe A",
    "A. Mars B. The Sun", "A, otherwise option D", "A) Mars or D", "A - The Sun", "A The Sun", "The Sun (A)", "A Venus",
    "A, or d", "A) The Sun", "A (Mars) B (The Sun)",
]  # fmt: skip
MEANT = ["A - Mars", "A \u2013 Mars", "A Mars", "A (Mars)", "Mars (A)", "a) mars", "(A) - Mars", "A: Mars.", "A) Mars"]


def test_hedges_name_nothing() -> None:
    assert {given: named(given, PLANETS) for given in HEDGED} == dict.fromkeys(HEDGED, "")
    assert load("choice")("The answer is A, otherwise option D.", "A", PLANETS) == 0.0
    assert named("1) or 2", DIGITS) == named("1) or 2") == named("C, maybe D") == ""


def test_an_option_with_its_text_is_named() -> None:
    assert {given: named(given, PLANETS) for given in MEANT} == dict.fromkeys(MEANT, "A")
    assert [named(given, COUNTS.upper()) for given in ("b) two", "(b) two", "B")] == ["B"] * 3
    assert named("C because A planet it is") == "C"


@pytest.mark.parametrize("text", ["The correct option is A.", "So the right choice is (A)", "The option is **A**."])
def test_a_stated_option(text: str) -> None:
    assert load("choice")(f"I think.\n{text}", "A", PLANETS) == 1.0
    assert final_text("The wrong option is A") == "The wrong option is A"
