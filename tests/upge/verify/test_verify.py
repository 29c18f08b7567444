"""The mathematical verifier against a table and against real ground truths; verifiers by name."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.verify_pools import OWN, ROOT, boxed
from upge.errors import ConfigError
from upge.verify import VerifierPool, load
from upge.verify.math import _SIMPLE, MathVerifier, _equal, _is_plain
from upge.verify.normalize import loose, normalize, spell

DATA = ROOT.parent / "shared" / "data"

# --- the math verifier ---------------------------------------------------------------------------------------------

RIGHT = [
    ("142", "142.0"), ("142.0", "142"), ("1000", "1,000"), ("1,000", "1000"), ("1{,}000", "1000"), ("1 000", "1000"),
    ("- 5", "-5"), ("\u22125", "-5"), ("05", "5"), ("+5", "5"), (".5", "0.5"), ("5.", "5"), ("204", r"\boxed{204}"),
    ("0.50", "1/2"), (r"\frac12", "0.5"), (r"\dfrac{3}{4}", "3/4"), (r"\tfrac34", r"\frac{3}{4}"),
    ("0.333333", "1/3"), (r"1\frac{3}{4}", "7/4"), (r"\frac{\frac{1}{2}}{3}", "1/6"), ("-1./3", r"-\frac13"),
    ("3+5=8", "8"), ("x = 8", "8"), ("2^{10}", "1024"), (r"\sqrt{4}", "2"), ("5!", "120"),
    (r"1.60\cdot 10^{-19}", r"1.6\times 10^{-19}"), ("$5$", "5"), (r"\(5\)", "5"), (r"\text{5}", "5"), (r"\$5", "5"),
    (r"5\%", "5"), (r"5^\circ", "5"), (r"5\text{ cm}", "5"), (r"5 \mathrm{~cm}", "5"),
    (r"\left(1, 2\right)", "(1,2)"), ("1<x<2", "(1,2)"), (r"x \in (1,2)", "(1,2)"), (r"x \ge 2", r"[2,\infty)"),
    (r"\{2,1\}", r"\{1,2\}"), ("2, 1", "1, 2"), (r"\left\{1,2,3\right\}", "1,2,3"),
    (r"(-\infty,1]\cup[2,\infty)", r"\left(-\infty, 1\right] \cup \left[2,\infty\right)"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"), ("(x+1)^2", "x^2+2x+1"), ("3i+2", "2+3i"), (r"2\pi", r"2 \pi"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), (r"\text{(C)}", "C"),
    (r"\textbf{C}", "C"), ("Evelyn", r"\text{Evelyn}"), (r"\emptyset", r"\emptyset"), ("237.5\\%", "237.5"),
    ("0.05", "5\\%"), (r"60^\circ, 120^\circ", "60,120"), ("60, 120", "60,120"), ("90°", "90"),
    (r"-2 \text{ or } -12", "-2{or}-12"), (r"2, 3, \text{ and } 4", "2,3,{}4"), ("3 and 2", "2,3"),
    (r"\approx 8.24", "8.24"), (r"\text{A5}_{11}", "{A5}_{11}"), (r"\text{(E)},", "{(E)},"), (r"\sin x", r"\sinx"),
    (r"\sin^2 t", r"\sin^2t"), (r"\begin{pmatrix} 4 \\ -3 \end{pmatrix}", r"\begin{pmatrix}4\-3\end{pmatrix}"),
    ("52_8", "52_{8}"), ("52", "52_8"), (r"\frac{1}{29322216}", r"\frac{1}{29,322,216}"),
    (r"\arcsin(10/13)", "np.arcsin(10/13)"), ("5!", "5!"), (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
    (r"\frac{\sin x}{\cos x}", r"\tan x"), (r"\sum_{k=1}^{4} k = 10", r"\sum_{k=1}^{4}k=10"),
]  # fmt: skip
WRONG = [
    ("6", "5"), ("", "5"), ("0.33", "1/3"), ("1000000.1", "1000000"), ("5 or 6", "5"), ("5,6", "56"),
    ("1,2,3", "1,2"), ("3+5", "8"), (r"3 \times 5", "15"), ("(3)(5)", "15"), ("5-0", "5"),
    (r"\frac{1}{4}+\frac{1}{4}", "1/2"), (r"1.7\times 10^{-19}", r"1.6\times 10^{-19}"), ("0", r"1.6\times 10^{-19}"),
    ("0.00000002", "0.00000001"), ("(2,1)", "(1,2)"), ("[1,2]", "[1,2)"), ("x^2+1", "x^2+2x+1"), ("D", "C"),
    (r"\text{Carla}", r"\text{Evelyn}"),
    (r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), (r"\frac{5}{0}", "5"),
    ("nan", "5"), (r"\infty", "5"), ("$", "5"), ("\\\\", "5"), ("True", "1"), ("\ud800", "5"), ("3.14", r"\pi"),
    ("x" * 5000, "5"), ("60120", "60, 120"), ("12345", "12 and 345"), ("1, 000", "1000"), (r"5\text{ million}", "5"),
    ("5", r"5\text{ million}"), ("53_8", "52_8"), ("52_7", "52_8"), ("5\\%", "6"),
    (r"5\text{ apples and } 6 \text{ pears}", "5"), (r"4\text{ or 5}", "4"), (r"5\text{ is not right}", "5"),
    (r"\sin(\pi/6)", "1/2"), (r"\log_2 8", "3"), (r"\sum_{k=1}^{10} k", "55"), (r"\int_0^1 x dx", "1/2"),
    (r"\max(3,5)", "5"), (r"\lfloor 3.7\rfloor", "3"), (r"\gcd(10,15)", "5"), (r"17 \mod 12", "5"),
    (r"x=\sum_{k=1}^{10} k", "55"), (r"\det\begin{pmatrix}1&2\\3&4\end{pmatrix}", "-2"),
    (r"\int x dx", r"\frac{x^2}{2}"),
]  # fmt: skip


@pytest.mark.parametrize("expected, given, answer", [(1.0, *c) for c in RIGHT] + [(0.0, *c) for c in WRONG])
def test_math_table(expected: float, given: str, answer: str) -> None:
    verifier = MathVerifier()
    assert verifier(boxed(given), answer) == expected
    assert verifier.glance(given, answer) in (None, expected), "the short cut disagrees with the verifier"


def test_a_glance_at_two_numbers_sees_what_math_verify_sees() -> None:
    rng, known = random.Random(0), 0
    for _ in range(150):
        base = rng.choice([1e-4, 0.37, 5, 1234]) * rng.random()
        gold = rng.choice([f"{base:.6f}", f"{base:.3f}", f"{round(base)}", rf"\frac{{{round(base * 7)}}}{{7}}"])
        near = [f"{base:.5f}", f"{base:.2f}", f"{base + 1e-6:.7f}", f"{round(base * 7)}/7", str(round(base))]
        given = rng.choice(near)
        seen = MathVerifier().glance(given, gold)
        known += seen is not None
        assert seen in (None, float(_equal(normalize(gold), normalize(given)))), (gold, given)
    assert known > 50


PROMPTED = [
    ("Simplify 6/8.", "6/8", "3/4", 0.0),
    ("Simplify $\\frac{6}{8}$.", r"\frac{6}{8}", "3/4", 0.0),
    ("Simplify $\\frac{6}{8}$.", r"\frac{3}{4}", "0.75", 1.0),
    ("A third is $1/3$. What is it?", r"\frac{1}{3}", "0.333333", 1.0),
    ("Simplify $\\sqrt{12}$.", r"\sqrt {12}", r"2\sqrt{3}", 0.0),
    ("Find \\sqrt{12} now", r"\sqrt{12}", r"2\sqrt{3}", 0.0),
    ("Find 2\\sqrt{12}", r"\sqrt{12}", r"2\sqrt{3}", 1.0),
    ("Factor $x^2 + 2x + 1$.", "x^2+2x+1", "(x+1)^2", 0.0),
    ("Factor $x^2 + 2x + 1$.", "(1+x)^2", "(x+1)^2", 1.0),
    ("Expand $(x+1)^2$", "(x+1)^2 = (x+1)^2", "x^2+2x+1", 0.0),
    ("Expand $(x+1)^2$", "(x+1)^2 = 1+2x+x^2", "x^2+2x+1", 1.0),
    ("Write $2x-y+1=0$ as $y=mx+b$.", "2x-y+1=0", "y=2x+1", 0.0),
    ("Compute 5!", "5!", "120", 0.0),
    ("In how many orders can 5 books stand?", "5!", "120", 1.0),
    ("Which is larger, \\(2^{10}\\) or 1000?", "2^{10}", "1024", 0.0),
    ("What is $|-5|$?", "|-5|", "5", 0.0),
    (r"With $0 \le t \le \pi/2$, find $t$.", r"\pi/2", r"\frac{\pi}{2}", 1.0),
    ("At x+1", "x+1", "1+x", 1.0),
    ("The angle is 90^\\circ; which is it?", r"90^\circ", "90", 1.0),
    ("Where is $x = 5$?", "x=5", "5", 1.0),
    ("Find the point (1, 2).", "1, 2", "(1,2)", 1.0),
]


@pytest.mark.parametrize(("prompt", "given", "answer", "reward"), PROMPTED)
def test_the_question_is_not_its_answer(prompt: str, given: str, answer: str, reward: float) -> None:
    assert MathVerifier()(boxed(given), answer, prompt) == reward


@pytest.mark.parametrize("response", ["5", "the answer is 5", r"\boxed{5", r"\boxed{5} or rather \boxed{", ""])
def test_a_response_without_a_complete_box_earns_nothing(response: str) -> None:
    assert load("math")(response, "5") == 0.0


def test_the_last_box_of_a_long_text_decides() -> None:
    text = r"\boxed{3} " + "word " * 200_000 + r"\boxed{\frac{2}{4}}" + " word" * 200_000
    assert (MathVerifier()(text, "1/2"), MathVerifier()(text, "3")) == (1.0, 0.0)


def test_verifier_never_raises_on_noise() -> None:
    pieces = r"\frac \sqrt { } ( ) [ ] ^ _ 1 2 x - + , = < \le \text $ \ \\ & . % ! | \pi e i / \log \binom".split()
    rng, verifier = random.Random(0), MathVerifier()
    noise = [boxed("".join(rng.choices(pieces, k=rng.randint(1, 12)))) for _ in range(150)]
    noise += [boxed("{" * 5000 + "}" * 5000), r"\boxed{" * 5000, boxed(r"\sqrt{" * 60 + "1" + "}" * 60), "\0\ud800"]
    assert {verifier(text, "(7,8)") for text in noise} == {0.0}


@pytest.mark.parametrize(
    "answer", ["72", "-3.5", "1,000", r"\frac{3}{4}", "3/4", r"x \in [1,2)", r"\text{Evelyn}", "C"]
)
def test_check_answer_accepts(answer: str) -> None:
    assert load("math").check_answer(answer) is None
    assert load("math")(boxed(answer), answer) == 1.0


UNREADABLE = ["", "  ", "$$", "+", "-", ".", "\\\\", r"\frac{", "$t(0,4]$", "1+" * 600 + "1"]


@pytest.mark.parametrize("answer", UNREADABLE)
def test_check_answer_refuses(answer: str) -> None:
    with pytest.raises(ValueError, match="does not parse as mathematics; give one final answer") as caught:
        load("math").check_answer(answer)
    assert repr(answer)[1:10] in str(caught.value)


def test_check_answer_of_a_number_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number is recognised without the parser."""
    monkeypatch.setattr("upge.verify.math.read", None)
    for number in range(100):
        MathVerifier().check_answer(str(number))


def test_what_is_taken_to_parse_without_a_look_does() -> None:
    for answer in [
        "-12",
        ".5",
        "3/4",
        r"\frac{-3}{4}",
        r"2\sqrt{3}",
        r"-\pi",
        r"-\frac{\sqrt{3}}{2}",
        r"\frac{\pi}{4}",
    ]:
        assert _is_plain(answer) or _SIMPLE.fullmatch(answer), answer
        assert _equal(answer, answer), answer


def test_normalise_is_idempotent() -> None:
    for text in [text for case in RIGHT + WRONG for text in case]:
        assert normalize(normalize(text)) == normalize(text)
        assert spell(spell(text)) == spell(text) and loose(loose(text)) == loose(text)


# --- loading -------------------------------------------------------------------------------------------------------


def test_load_by_name() -> None:
    assert isinstance(load("math"), MathVerifier)
    for name in ("math", "math_last", "number", "choice", "regex", "reasoning_gym"):
        assert load(name)("", "5") == 0.0
    assert (load("math")("it is 5", "5"), load("math_last")("it is 5", "5")) == (0.0, 1.0)
    assert load(f"{OWN}.length")("12345", "") == 0.5
    strict = load(f"{OWN}.Strict")
    assert strict("a", "a") == 1.0 and strict.calls == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "did you mean 'math'?"),
        ("", "known: boxed, choice, math"),
        ("no_such_package.verifier", "there is no module 'no_such_package'"),
        (f"{OWN}.lenght", "did you mean 'length'?"),
        (f"{OWN}.number", "it is a int, not a callable"),
        (f"{OWN}.NeedsMore", "cannot be made without arguments"),
        (f"{OWN}.too_few", "it must accept (response, answer, prompt) or some of"),
        ("__main__.verifier", "move it into a module"),
        ("a..b", "there is no such verifier"),
    ],
)
def test_load_refuses(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert str(caught.value).startswith(f"verify.verifier: found '{name}'") and message in str(caught.value)


def test_load_tells_a_broken_module_from_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_verifiers.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="importing 'broken_verifiers' failed.*a_module_that_is_not_there"):
        load("broken_verifiers.verifier")


# --- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (DATA / "eval" / "math500.json").exists(), reason="MATH-500 is not here")
def test_math500_answers_parse_and_verify_against_themselves() -> None:
    answers = [row["answer"] for row in json.loads((DATA / "eval" / "math500.json").read_text())]
    verifier = MathVerifier()
    assert [answer for answer in answers if verifier.check_answer(answer) is not None] == []
    assert [answer for answer in answers if verifier(boxed(answer), answer) != 1.0] == []
    # An exact match hides what the parser makes of an answer: here it is asked.
    assert [answer for answer in answers if not _equal(normalize(answer), normalize(answer))] == []


@pytest.mark.skipif(not (DATA / "eval" / "math500.json").exists(), reason="MATH-500 is not here")
def test_answers_of_other_problems_are_wrong() -> None:
    answers = [row["answer"] for row in json.loads((DATA / "eval" / "math500.json").read_text())][:80]
    pairs = list(zip(answers, answers[1:], strict=False))
    with VerifierPool("math", workers=2, time_limit=10.0) as pool:
        verdicts = pool.score([(boxed(given), answer) for given, answer in pairs])
    by_chance = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.reward]
    assert {verdict.status for verdict in verdicts} == {"ok"}
    assert [(g, a) for g, a in by_chance if normalize(g) != normalize(a.rpartition("=")[2])] == []
