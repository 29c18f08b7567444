"""Verification: finding the box, the math verifier against a table and against real data, verifiers by name."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from upge.errors import ConfigError
from tests.verify_pools import boxed
from upge.verify import VerifierPool, last_boxed, load
from upge.verify.math import _SIMPLE, MathVerifier, _equal, _is_plain
from upge.verify.normal import normalise

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
OWN = "tests.verify_examples"


# --- boxes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{ 7 } and more text }", "7"),
        (r"\boxed {3}", "3"),
        (r"\fbox{4}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{1} wait, \boxed{2", None),
        (r"\boxed 5", None),
        (r"boxed{5}", None),
        (r"\boxed", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


# --- the math verifier ---------------------------------------------------------------------------------------------

RIGHT = [
    ("142", "142.0"), ("142.0", "142"), ("1000", "1,000"), ("1,000", "1000"), ("1{,}000", "1000"), ("1 000", "1000"),
    ("- 5", "-5"), ("\u22125", "-5"), ("05", "5"), ("+5", "5"), (".5", "0.5"), ("5.", "5"), ("204", r"\boxed{204}"),
    ("0.50", "1/2"), (r"\frac12", "0.5"), (r"\dfrac{3}{4}", "3/4"), (r"\tfrac34", r"\frac{3}{4}"),
    ("0.333333", "1/3"), (r"1\frac{3}{4}", "7/4"), (r"\frac{\frac{1}{2}}{3}", "1/6"), ("-1./3", r"-\frac13"),
    ("3+5=8", "8"), ("x = 8", "8"), ("2^{10}", "1024"), (r"\sqrt{4}", "2"), ("5!", "120"),
    (r"1.60\cdot 10^{-19}", r"1.6\times 10^{-19}"),
    ("$5$", "5"), (r"\(5\)", "5"), (r"\text{5}", "5"), (r"\$5", "5"), (r"5\%", "5"), (r"5^\circ", "5"),
    (r"5\text{ cm}", "5"), (r"5 \mathrm{~cm}", "5"),
    (r"\left(1, 2\right)", "(1,2)"), ("1<x<2", "(1,2)"), (r"x \in (1,2)", "(1,2)"), (r"x \ge 2", r"[2,\infty)"),
    (r"\{2,1\}", r"\{1,2\}"), ("2, 1", "1, 2"), (r"\left\{1,2,3\right\}", "1,2,3"),
    (r"(-\infty,1]\cup[2,\infty)", r"\left(-\infty, 1\right] \cup \left[2,\infty\right)"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"), ("(x+1)^2", "x^2+2x+1"), ("3i+2", "2+3i"), (r"2\pi", r"2 \pi"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\text{(C)}", "C"), (r"\textbf{C}", "C"), ("Evelyn", r"\text{Evelyn}"), (r"\emptyset", r"\emptyset"),
]  # fmt: skip
WRONG = [
    ("6", "5"), ("", "5"), ("0.33", "1/3"), ("1000000.1", "1000000"), ("5 or 6", "5"), ("5,6", "56"), ("1,2,3", "1,2"),
    ("3+5", "8"), (r"3 \times 5", "15"), ("(3)(5)", "15"), ("5-0", "5"), (r"\frac{1}{4}+\frac{1}{4}", "1/2"),
    (r"1.7\times 10^{-19}", r"1.6\times 10^{-19}"), ("0", r"1.6\times 10^{-19}"), ("0.00000002", "0.00000001"),
    ("(2,1)", "(1,2)"), ("[1,2]", "[1,2)"), ("x^2+1", "x^2+2x+1"), ("D", "C"), (r"\text{Carla}", r"\text{Evelyn}"),
    (r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\frac{5}{0}", "5"), ("nan", "5"), (r"\infty", "5"), ("$", "5"), ("\\\\", "5"), ("True", "1"), ("\ud800", "5"),
    ("3.14", r"\pi"), ("x" * 5000, "5"),
]  # fmt: skip


@pytest.mark.parametrize("expected, given, answer", [(1.0, *c) for c in RIGHT] + [(0.0, *c) for c in WRONG])
def test_math_table(expected: float, given: str, answer: str) -> None:
    verifier = MathVerifier()
    assert verifier(boxed(given), answer) == expected
    assert verifier.quick(boxed(given), answer) in (None, expected), "the short cut disagrees with the verifier"


@pytest.mark.parametrize("response", ["5", "the answer is 5", r"\boxed{5", r"\boxed{5} or rather \boxed{", ""])
def test_a_response_without_a_complete_box_earns_nothing(response: str) -> None:
    assert load("math")(response, "5") == 0.0


def test_the_last_box_of_a_long_text_decides() -> None:
    text = r"\boxed{3} " + "word " * 200_000 + r"\boxed{\frac{2}{4}}" + " word" * 200_000
    begin = time.perf_counter()
    assert (MathVerifier()(text, "1/2"), MathVerifier()(text, "3")) == (1.0, 0.0)
    assert time.perf_counter() - begin < 5.0


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


UNREADABLE = ["", "  ", "$$", "+", "-", ".", "\\\\", r"\frac{", "np.arcsin(10/13)", "1+" * 600 + "1"]


@pytest.mark.parametrize("answer", UNREADABLE)
def test_check_answer_refuses(answer: str) -> None:
    with pytest.raises(ValueError, match="does not parse as mathematics; give one final answer") as caught:
        load("math").check_answer(answer)
    assert repr(answer)[1:10] in str(caught.value)


def test_check_answer_of_a_number_is_cheap() -> None:
    verifier, begin = MathVerifier(), time.perf_counter()
    for number in range(10_000):
        verifier.check_answer(str(number))
    assert time.perf_counter() - begin < 2.0


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
        assert normalise(normalise(text)) == normalise(text)


# --- loading -------------------------------------------------------------------------------------------------------


def test_load_by_name() -> None:
    assert isinstance(load("math"), MathVerifier)
    assert load(f"{OWN}.length")("12345", "") == 0.5
    strict = load(f"{OWN}.Strict")
    assert strict("a", "a") == 1.0 and strict.calls == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "did you mean 'math'?"),
        ("", "known: math"),
        ("no_such_package.verifier", "there is no module 'no_such_package'"),
        (f"{OWN}.lenght", "did you mean 'length'?"),
        (f"{OWN}.number", "it is a int, not a callable"),
        (f"{OWN}.NeedsMore", "cannot be made without arguments"),
        (f"{OWN}.too_few", "it must accept (response, answer, prompt)"),
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


@pytest.mark.skipif(not (DATA / "gsm8k").exists(), reason="GSM8K is not here")
def test_gsm8k_answers_verify_against_themselves() -> None:
    lines = (DATA / "gsm8k" / "train.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"].rpartition("####")[2].strip() for line in lines]
    sample = random.Random(0).sample(answers, 100)
    items = [(boxed(answer), answer, None) for answer in answers]
    items += [(boxed(rf"\frac{{{2 * int(a.replace(',', ''))}}}{{2}}"), a, None) for a in sample]
    with VerifierPool("math", workers=2, time_limit=10.0) as pool:
        verdicts = pool.score(items)
    assert [item for item, verdict in zip(items, verdicts, strict=True) if verdict != Verdict(1.0)] == []
    for answer in answers:
        assert MathVerifier().check_answer(answer) is None


@pytest.mark.skipif(not (DATA / "eval" / "math500.json").exists(), reason="MATH-500 is not here")
def test_math500_answers_parse_and_verify_against_themselves() -> None:
    answers = [row["answer"] for row in json.loads((DATA / "eval" / "math500.json").read_text())]
    verifier = MathVerifier()
    assert [answer for answer in answers if verifier.check_answer(answer) is not None] == []
    assert [answer for answer in answers if verifier(boxed(answer), answer) != 1.0] == []
    # An exact match hides what the parser makes of an answer: here it is asked.
    assert [answer for answer in answers if not _equal(normalise(answer), normalise(answer))] == []


@pytest.mark.skipif(not (DATA / "eval" / "math500.json").exists(), reason="MATH-500 is not here")
def test_answers_of_other_problems_are_wrong() -> None:
    answers = [row["answer"] for row in json.loads((DATA / "eval" / "math500.json").read_text())][:80]
    pairs = list(zip(answers, answers[1:], strict=False))
    with VerifierPool("math", workers=2, time_limit=10.0) as pool:
        verdicts = pool.score([(boxed(given), answer, None) for given, answer in pairs])
    by_chance = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.reward]
    assert {verdict.status for verdict in verdicts} == {"ok"}
    assert [(g, a) for g, a in by_chance if normalise(g) != normalise(a.rpartition("=")[2])] == []
