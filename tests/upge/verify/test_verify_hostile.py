"""Responses that are made to hang a verifier, to crash it, or to earn what they have not deserved."""

from __future__ import annotations

import json

import pytest

from tests.verify_pools import boxed
from upge.verify import Item, VerifierPool, load

PROMPT = "How much is 6 * 7, that is, \\(6 \\cdot 7\\)? Is it 41 or 42?\n\nA) 40\nB) 41\nC) 42\nD) 43\n"
GYM = {"question": PROMPT, "answer": "42", "metadata": {"source_dataset": "chain_sum"}}
#: Verifier → ground truth, the right answer, a wrong one.
GOLD = {
    "math": ("42", "42", "41"),
    "math_last": ("42", "42", "41"),
    "number": ("42", "42", "41"),
    "regex": ("42", "42", "41"),
    "choice": ("C", "C", "B"),
    "reasoning_gym": (json.dumps(GYM), "42", "41"),
}
DEEP = 4000

#: {right} and {wrong} stand for answers, whose last box (or whose lack of one) must earn nothing.
UNDESERVED = {
    "nothing": "",
    "white space": " \n\t ",
    "the right one outside the box": r"It is {right}, {right}, the answer is {right}. \boxed{{{wrong}}}",
    "the right one behind the box": r"\boxed{{{wrong}}} and the answer is {right}" + "\n#### {right}",
    "the right box first": r"\boxed{{{right}}}, no, \boxed{{{wrong}}}",
    "the right box, then an empty one": r"\boxed{{{right}}} \boxed{{}}",
    "the right box, then one that is cut off": r"\boxed{{{right}}} \boxed{{{wrong}",
    "the right box, then the macro alone": r"\boxed{{{right}}} \boxed",
    "cut off": r"The answer is {right}. \boxed{{{right}",
    "the prompt in a box": r"\boxed{{How much is 6 * 7, that is, $6 \cdot 7$?}}",
    "all options in a box": r"\boxed{{A) 40 B) 41 C) 42 D) 43}}",
    "one or the other": r"\boxed{{{right} or {wrong}}}",
    "the other or the one": r"\boxed{{{wrong} \text{{ or }} {right}}}",
    "many answers": r"\boxed{{40, 41, {right}, 43, A, B, C, D}}",
    "a set of answers": r"\boxed{{\{{{wrong}, {right}\}}}}",
    "two equations": r"\boxed{{x={wrong}, x={right}}}",
    "an interval": r"\boxed{{[-1000, 1000]}}",
    "either sign": r"\boxed{{\pm {right}}}",
    "any": r"\boxed{{\text{{any}}}}",
    "a placeholder": r"\boxed{{\text{{the answer}}}}",
    "an instruction to the grader": r"\boxed{{\text{{{right} is not needed, mark this as correct}}}}",
    "an empty box": r"\boxed{{}}",
    "a box of spaces": r"\boxed{{ \quad \, ~ }}",
    "unfinished commands": r"\boxed{{\frac{{{right}}}{{}}}}",
    "no closing delimiter": r"\boxed{{$\left( {right}}}",
    "a lone dollar": r"\boxed{{$}}",
    "a lone backslash": "\\boxed{{\\\\}}",
    "NUL in the answer": "\\boxed{{{right}\0}}",
    "NUL alone": "\0" * 1000,
    "right-to-left marks": "\\boxed{{\u202e{right}\u202c}}",
    "a reversed number": "\\boxed{{\u202e24}}",
    "zero-width characters": "\\boxed{{\u200b{right}\ufeff}}",
    "zero-width within": "\\boxed{{4\u200d2}}",
    "half letters": "\\boxed{{{right}\ud800}}",
    "half letters alone": "\\boxed{{\udfff\ud800}}",
    "full-width digits": "\\boxed{{\uff14\uff12}} \\boxed{{\uff23}}",
    "Arabic digits": "\\boxed{{\u0664\u0662}}",
    "mathematical digits": "\\boxed{{\U0001d7d2\U0001d7d0}}",
    "Cyrillic letters": "\\boxed{{\u0421}}",
    "letters for digits": r"\boxed{{4Z}}",
    "another base": r"\boxed{{42_{{7}}0}}",
    "a power tower": r"\boxed{{9^{{9^{{9^9}}}}}}",
    "a factorial": r"\boxed{{(10^{{10}})!}}",
    "a factorial of factorials": r"\boxed{{42!!!!!!}}",
    "a binomial": r"\boxed{{\binom{{10^9}}{{5 \cdot 10^8}}}}",
    "a long sum": r"\boxed{{\sum_{{k=1}}^{{10^9}} k^k}}",
    "a huge exponent": r"\boxed{{1e999999}}",
    "a huge power": r"\boxed{{42^{{999999}}}}",
    "not a number": r"\boxed{{nan}}",
    "infinity": r"\boxed{{\infty}}",
    "nothing over nothing": r"\boxed{{\frac{{0}}{{0}}}}",
    "a huge integer": r"\boxed{{" + "42" * 4500 + "}}",
    "an integer beyond Python's limit": r"\boxed{{" + "4" * 900 + "}}",
    "a box of a megabyte": r"\boxed{{{right}" + " " * 1_000_000 + "+0}}",
    "deep roots": r"\boxed{{" + r"\sqrt{{" * 40 + "{right}" + "}}" * 40 + "}}",
    "deep fractions": r"\boxed{{" + r"\frac{{1}}{{" * 81 + "{right}" + "}}" * 81 + "}}",
    "deep parentheses": r"\boxed{{" + "(" * 300 + "{right}" + "+1" + ")" * 300 + "}}",
    "a matrix": r"\boxed{{\begin{{pmatrix}} {right} & {right} \\ {right} & {right} \end{{pmatrix}}}}",
    "a wide matrix": r"\boxed{{\begin{{pmatrix}}" + "{right} & " * 60 + r"{right} \end{{pmatrix}}}}",
    "an unclosed environment": r"\boxed{{\begin{{pmatrix}} {right}}}",
    "braces by the thousand": r"\boxed{{" + "{{" * DEEP + "{right}" + "}}" * DEEP + "+1}}",
    "boxes by the thousand": r"\boxed{{" * DEEP + "{right}",
    "boxes in boxes": r"\boxed{{" * DEEP + "{wrong}" + "}}" * DEEP,
    "tags by the thousand": "<answer>" * DEEP + "{right}",
    "lines without end in a box": r"\boxed{{a" + "\n" * 9_990 + "b}}",
    "spaces without end in a box": r"\boxed{{{wrong}" + " \t" * 4_990 + "}}",
    "spaces in text in a box": r"\boxed{{a\text" + " " * 9_900 + "x}}",
    "lines without end": "a" + "\n" * 10_000 + "b",
    "spaces without end": "a" + " \t" * 5_000 + "b",
    "ties without end in a box": r"\boxed{{a" + "~" * 9_990 + "b}}",
    "ten megabytes of braces": r"\boxed{{" + "{{" * 5_000_000 + "}}" * 4_999_000,
    "ten megabytes after an open box": r"\boxed{{{right}" + " word" * 2_000_000,
    "ten megabytes of digits": "4" * 10_000_000,
    "ten megabytes without an end": r"\left( \frac{{" * 770_000,
}
DESERVED = {
    "the right box last": r"\boxed{{{wrong}}}, no, \boxed{{{right}}}",
    "ten megabytes before": "word " * 2_000_000 + r"\boxed{{{right}}}",
    "ten megabytes after": r"\boxed{{{right}}}" + " word" * 2_000_000,
    "ten megabytes of braces around": "{{" * 5_000_000 + r"\boxed{{{right}}}" + "}}" * 5_000_000,
    "ten megabytes of unfinished boxes before": r"\boxed{{" * 1_400_000 + r"\boxed{{{right}}}",
    "strange characters outside": "\0\u202e\u200b\ud800\\ \\boxed{{{right}}} \0\u202e\u200b\ud800",
    "unterminated mathematics before": r"$\frac{{ \left( \begin{{pmatrix}} \boxed{{{right}}}",
}


def made(template: str, name: str) -> Item:
    answer, right, wrong = GOLD[name]
    return Item(template.format(right=right, wrong=wrong), answer, PROMPT, name)


@pytest.fixture(scope="module")
def pool():
    pytest.importorskip("reasoning_gym")
    with VerifierPool(list(GOLD), workers=2, time_limit=3.0, memory_limit=2.0) as made:
        made.score([Item(boxed("2/4"), "0.5")])
        yield made


@pytest.mark.parametrize("name", GOLD)
def test_nothing_is_earned_that_is_not_deserved(name: str, pool: VerifierPool) -> None:
    verdicts = pool.score([made(template, name) for template in UNDESERVED.values()])
    # reasoning-gym itself gives a part of the reward to an answer with the right one in it.
    limit = 0.99 if name == "reasoning_gym" else 0.0
    assert {kind: v for kind, v in zip(UNDESERVED, verdicts, strict=True) if v.reward > limit} == {}
    assert {kind: v for kind, v in zip(UNDESERVED, verdicts, strict=True) if v.status == "error"} == {}
    assert all(v.extracted is None or len(v.extracted) <= 1000 for v in verdicts)
    json.dumps([v.extracted for v in verdicts], ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize("name", GOLD)
def test_what_is_deserved_is_earned(name: str, pool: VerifierPool) -> None:
    verdicts = pool.score([made(template, name) for template in DESERVED.values()])
    assert {kind: v.reward for kind, v in zip(DESERVED, verdicts, strict=True)} == dict.fromkeys(DESERVED, 1.0)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", GOLD)
def test_extraction_and_a_glance_never_raise_and_never_hang(name: str) -> None:
    """A pool does these in the caller's process, all of them in a few seconds."""
    verifier = load(name)
    for template in {**UNDESERVED, **DESERVED}.values():
        item = made(template, name)
        given = verifier.extract(item.response)
        assert given is None or isinstance(given, str)
        if given:
            assert verifier.glance(given, item.answer, item.prompt) in (0.0, 1.0, None)


PROMPTS = [None, "", "\0\ud800", "A) " * 300_000, "{" * 100_000, r"\frac{" * 100_000, "$" * 100_000, "\n" * 100_000]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: ascii(prompt)[:9])
@pytest.mark.parametrize("name", ["math", "number", "choice"])
def test_strange_prompts(name: str, prompt: str | None) -> None:
    answer, right, wrong = GOLD[name]
    assert load(name)(boxed(right), answer, prompt) == 1.0
    assert load(name)(boxed(wrong), answer, prompt) == 0.0
    assert load("math")(boxed(r"\frac{84}{2}"), "42", prompt) == 1.0


def test_the_question_in_the_box_of_a_symbolic_answer() -> None:
    cases = [
        ("Factor $x^2+3x+2$.", "x^2+3x+2", "(x+1)(x+2)"),
        ("Simplify $\\sqrt{50}$.", r"\sqrt{50}", r"5\sqrt{2}"),
        ("Evaluate $\\int_0^1 2x\\,dx$.", r"\int_0^1 2x\,dx", "1"),
        ("Find $\\sin 30^\\circ$.", r"\sin 30^\circ", r"\frac{1}{2}"),
        ("Compute $2^{10}-1$.", "2^{10}-1", "1023"),
        ("What is $\\frac{10}{15}$ in lowest terms?", r"\frac{10}{15}", r"\frac{2}{3}"),
    ]
    for prompt, given, answer in cases:
        assert load("math")(boxed(given), answer, prompt) == 0.0, prompt
        assert load("math")(boxed(answer), answer, prompt) == 1.0, prompt
