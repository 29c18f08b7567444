r"""Random pairs of a ground truth and an answer whose verdict is known by construction.

An example is a value in several notations. Two notations of one value are a right pair. Wrong pairs are another value
of the same kind, a permutation, a fragment, and the text of the question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator
from fractions import Fraction
from math import gcd
from typing import NamedTuple

Random = random.Random


class Example(NamedTuple):
    """A value with its notations, the first of which is the ground truth's in questions.

    Attributes:
        value: equal for equal values of the same kind.
        notations: texts that mean it.
        permuted: texts with the same parts in another order.
        fragments: parts of the texts.
        questions: (prompt, the text of the prompt that a lazy answer repeats).
    """

    value: Hashable
    notations: tuple[str, ...]
    permuted: tuple[str, ...] = ()
    fragments: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()


class Pair(NamedTuple):
    """A ground truth and an answer.

    Attributes:
        kind: the name of the kind of answer, a key of `KINDS`.
        relation: "notation" for a right answer; "other value", "permutation", "fragment" or "question" for a wrong one.
    """

    kind: str
    relation: str
    gold: str
    answer: str
    prompt: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether the answer is right."""
        return self.relation == "notation"


def _wide(text: str) -> str:
    """A text in full-width characters, as in Chinese text."""
    return "".join(chr(ord(c) + 0xFEE0) if 0x20 < ord(c) < 0x7F else c for c in text)


def _raised(number: int) -> str:
    return "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(number))


def _integers(rng: Random, count: int, low: int = -12, high: int = 12) -> list[int]:
    return rng.sample(range(low, high + 1), count)


def _signed(number: int) -> str:
    return f"+{number}" if number >= 0 else str(number)


def _integer(rng: Random) -> Example:
    n, a = rng.randint(-999, 9_999_999), rng.randint(2, 99)
    texts = (str(n), f"{n:,}", f"{n}.0", f"x={n}", rf"{n}\text{{ cm}}", _wide(str(n)), f"${n}$", f"{n}个")
    part = (str(n)[:-1],) if len(str(n)) > 2 else ()
    questions = (
        (f"Solve $3x{_signed(a)}={3 * n + a}$.", f"3x{_signed(a)}={3 * n + a}"),
        (f"{n - a}+{a}=?", f"{n - a}+{a}"),
    )
    return Example(n, texts, (), part, questions)


def _fraction(rng: Random) -> Example:
    value = Fraction(rng.randint(2, 40), rng.randint(2, 30))
    p, q, k = value.numerator, value.denominator, rng.randint(2, 5)
    if q == 1:
        return _fraction(rng)
    texts = (rf"\frac{{{p}}}{{{q}}}", f"{p}/{q}", rf"\dfrac{{{k * p}}}{{{k * q}}}", rf"x=\tfrac{{{p}}}{{{q}}}")
    if p > q:
        texts += (rf"{p // q}\frac{{{p % q}}}{{{q}}}", f"{p // q} {p % q}/{q}")
    question = (rf"Simplify $\frac{{{k * p}}}{{{k * q}}}$.", rf"\frac{{{k * p}}}{{{k * q}}}")
    return Example(
        value, texts, (rf"\frac{{{q}}}{{{p}}}",), (str(p), f"{p}:{q}", rf"7^\frac{{{p}}}{{{q}}}"), (question,)
    )


def _decimal(rng: Random) -> Example:
    digits, places = rng.randint(11, 999) * 10 + rng.randint(1, 9), rng.randint(1, 3)
    value = Fraction(digits, 10**places)
    texts = (f"{float(value)}", rf"\frac{{{digits}}}{{{10**places}}}", f"{digits}e-{places}", f"{float(value)}0")
    texts += (rf"{digits}\times 10^{{-{places}}}", f"x={float(value)}")
    return Example(value, texts, (), (str(digits), str(digits // 10**places)))


def _percentage(rng: Random) -> Example:
    n = rng.randint(1, 99)
    return Example(n, (rf"{n}\%", f"0.{n:02d}", f"{n}%", rf"{n}\text{{ percent}}", _wide(f"{n}%")), (), (f"0.{n:03d}",))


def _surd(rng: Random) -> Example:
    a, b, c = rng.choice((4, 8, 9)), rng.choice((2, 3, 5, 6, 7, 10)), rng.choice((1, 7, 11, 13))
    plain, tail = rf"{a}\sqrt{{{b}}}", f"/{c}" if c > 1 else ""
    texts = (rf"\frac{{{plain}}}{{{c}}}" if c > 1 else plain, f"{a}√{b}{tail}", f"{a}*sqrt({b}){tail}")
    texts += (rf"\sqrt{{{a * a * b}}}{tail}", rf"\frac{{{a}}}{{{c}}}\sqrt{{{b}}}", f"{plain}{tail}", f"x={plain}{tail}")
    questions = ((rf"Simplify $\sqrt{{{a * a * b}}}$.", rf"\sqrt{{{a * a * b}}}"),) if c == 1 else ()
    return Example((a, b, c), texts, (rf"{b}\sqrt{{{a}}}{tail}",), (rf"\sqrt{{{b}}}", str(a)), questions)


def _multiple_of_pi(rng: Random) -> Example:
    value = Fraction(rng.randint(2, 30), rng.randint(1, 12))
    p, q = value.numerator, value.denominator
    tail = f"/{q}" if q > 1 else ""
    texts = (
        rf"\frac{{{p}\pi}}{{{q}}}" if q > 1 else rf"{p}\pi",
        f"{p}pi{tail}",
        f"{p}π{tail}",
        f"{p}*pi{tail}",
        rf"\pi\cdot {p}{tail}",
    )
    return Example(value, texts, (), (str(p), f"{p}p"))


def _polynomial(rng: Random) -> Example:
    a, c = rng.sample(range(2, 10), 2)
    b = rng.choice((-9, -7, -5, 4, 8))
    texts = (
        f"{a}x^2{_signed(b)}x+{c}",
        f"{c}{_signed(b)}x+{a}x^{{2}}",
        f"{a}x²{_signed(b)}x+{c}",
        f"{a}*x**2{_signed(b)}*x+{c}",
        f"x({a}x{_signed(b)})+{c}",
        f"y={a}x^2{_signed(b)}x+{c}",
    )
    return Example((a, b, c), texts, (f"{c}x^2{_signed(b)}x+{a}",), (f"{a}x^2", str(c), f"{a}x^2{_signed(b)}x"))


def _product(rng: Random) -> Example:
    a, b = sorted(_integers(rng, 2, 1, 9))
    expanded = f"x^2+{a + b}x+{a * b}"
    texts = (f"(x+{a})(x+{b})", f"({b}+x)(x+{a})", rf"(x+{b})\cdot (x+{a})", f"(x+{a})*(x+{b})")
    return Example((a, b), texts, (), (f"x+{a}", f"x+{a},x+{b}"), ((f"Factor ${expanded}$.", expanded),))


def _function(rng: Random) -> Example:
    a, b, c = rng.sample(range(2, 10), 3)
    name, plain = rng.choice(((r"\sin", "sin"), (r"\cos", "cos"), (r"\ln", "ln"), (r"\exp", "exp")))
    texts = (
        f"{a}{name}({b}x)+{c}",
        f"{c}+{a}{name} {b}x",
        f"{a}*{plain}({b}*x)+{c}",
        rf"{a}\cdot {name}\left({b}x\right)+{c}",
    )
    return Example((name, a, b, c), texts, (f"{b}{name}({a}x)+{c}",), (f"{name}({b}x)", str(c)))


def _degrees(rng: Random) -> Example:
    d = rng.choice([d for d in range(5, 85) if d not in (15, 18, 30, 36, 45, 54, 60, 72, 75)])
    angle = Fraction(d, 180)
    texts = (rf"\sin {d}^\circ", rf"\sin {d}°", rf"\cos {90 - d}^{{\circ}}", rf"\sin({d}^\circ)", f"sin({d}°)")
    texts += (rf"\sin\frac{{{angle.numerator}\pi}}{{{angle.denominator}}}",)
    return Example(d, texts, (rf"\cos {d}^\circ",) if d != 45 else (), (rf"\sin {d}", str(d)))


def _complex(rng: Random) -> Example:
    a, b = rng.sample(range(2, 12), 2)
    texts = (f"{a}+{b}i", f"{b}i+{a}", rf"{a}+{b}\mathrm{{i}}", f"{a}+{b}*i", f"i({b}-{a}i)", f"z={a}+{b}i")
    return Example((a, b), texts, (f"{b}+{a}i",), (str(a), f"{b}i", str(a + b), f"{a}-{b}i"))


def _interval(rng: Random) -> Example:
    a, b = sorted(_integers(rng, 2))
    left, right = rng.choice("(["), rng.choice(")]")
    less, more = (r"\le" if left == "[" else "<"), (r"\le" if right == "]" else "<")
    rising = {r"\le": r"\ge", "<": ">"}
    texts = (
        f"{left}{a},{b}{right}",
        rf"\left{left}{a}, {b}\right{right}",
        f"{a}{less} x{more} {b}",
        rf"x\in {left}{a},{b}{right}",
        f"{b}{rising[more]} x{rising[less]} {a}",
        rf"x{rising[less]} {a}\text{{ and }}x{more} {b}",
    )
    other = {"(": "[", "[": "("}[left]
    return Example(
        (a, b, left, right), texts, (f"{left}{b},{a}{right}", f"{other}{a},{b}{right}"), (str(b), rf"\{{{a},{b}\}}")
    )


def _union(rng: Random) -> Example:
    a, b = sorted(_integers(rng, 2))
    texts = (
        rf"(-\infty,{a})\cup({b},\infty)",
        rf"x<{a}\text{{ or }}x>{b}",
        rf"({b},\infty)\cup(-\infty,{a})",
        f"x>{b} or x<{a}",
        f"(-∞, {a}) ∪ ({b}, ∞)",
    )
    return Example(
        (a, b), texts, (rf"(-\infty,{b})\cup({a},\infty)",), (rf"(-\infty,{a})", f"{a}<x<{b}", rf"({a},{b})")
    )


def _point(rng: Random) -> Example:
    numbers = _integers(rng, rng.choice((2, 3)))
    inner = ",".join(map(str, numbers))
    texts = (f"({inner})", rf"\left({', '.join(map(str, numbers))}\right)", _wide(f"({inner})"), f"P=({inner})")
    parts = (str(numbers[0]), rf"\{{{inner}\}}", f"({','.join(map(str, numbers[:-1]))})")
    return Example(tuple(numbers), texts, (f"({','.join(map(str, numbers[::-1]))})",), parts)


def _list(rng: Random) -> Example:
    numbers = _integers(rng, rng.choice((2, 3, 4)))
    shuffled = rng.sample(numbers, len(numbers))
    texts = (", ".join(map(str, numbers)), ", ".join(map(str, shuffled)), rf"\{{{','.join(map(str, shuffled))}\}}")
    texts += (
        rf"{', '.join(map(str, numbers[:-1]))}\text{{ and }}{numbers[-1]}",
        " or ".join(f"x={n}" for n in shuffled),
    )
    parts = (str(numbers[-1]), ", ".join(map(str, numbers[1:])), "".join(map(str, map(abs, numbers))))
    return Example(frozenset(numbers), texts, (), parts)


def _plus_minus(rng: Random) -> Example:
    a, b = rng.randint(1, 9), rng.choice((2, 3, 5, 7))
    plus, minus = rf"{a}+\sqrt{{{b}}}", rf"{a}-\sqrt{{{b}}}"
    texts = (rf"{a}\pm\sqrt{{{b}}}", f"{plus}, {minus}", f"{minus}, {plus}", f"{a}±√{b}", rf"x={a}\pm\sqrt {b}")
    texts += (rf"\frac{{{2 * a}\pm\sqrt{{{4 * b}}}}}{{2}}",)
    return Example((a, b), texts, (rf"\sqrt{{{b}}}\pm {a}",), (plus, minus, rf"\sqrt{{{b}}}"))


def _line(rng: Random) -> Example:
    m, b = rng.sample(range(2, 10), 2)
    texts = (f"y={m}x+{b}", f"{m}x+{b}", f"y-{m}x={b}", f"{m}x-y+{b}=0", f"y = {b} + {m}*x")
    question = (f"Write ${2 * m}x-2y=-{2 * b}$ as $y=mx+b$.", f"{2 * m}x-2y=-{2 * b}")
    return Example((m, b), texts[:1] + texts[2:], (f"x={m}y+{b}", f"y={b}x+{m}"), (str(b), f"{m}x"), (question,))


def _matrix(rng: Random) -> Example:
    a, b, c, d = _integers(rng, 4)
    inner = rf"{a}&{b}\\{c}&{d}"
    texts = tuple(rf"\begin{{{name}}}{inner}\end{{{name}}}" for name in ("pmatrix", "bmatrix"))
    texts += (
        rf"A=\begin{{pmatrix}} {a} & {b} \\ {c} & {d} \end{{pmatrix}}",
        rf"\left(\begin{{array}}{{cc}}{inner}\end{{array}}\right)",
    )
    return Example(
        (a, b, c, d), texts, (rf"\begin{{pmatrix}}{a}&{c}\\{b}&{d}\end{{pmatrix}}",), (str(d), f"({a},{b},{c},{d})")
    )


def _vector(rng: Random) -> Example:
    a, b = _integers(rng, 2)
    texts = (rf"\begin{{pmatrix}}{a}\\{b}\end{{pmatrix}}", rf"\begin{{bmatrix}}{a}\\{b}\end{{bmatrix}}", f"({a},{b})")
    return Example((a, b), texts, (rf"\begin{{pmatrix}}{b}\\{a}\end{{pmatrix}}",), (str(a), rf"\{{{a},{b}\}}"))


def _ratio(rng: Random) -> Example:
    a, b, c = rng.sample(range(1, 12), 3)
    k, divisor = rng.randint(2, 4), gcd(a, b, c)
    texts = (f"{a}:{b}:{c}", f"{k * a}:{k * b}:{k * c}", f"{a} : {b} : {c}", f"x={a}:{b}:{c}", _wide(f"{a}:{b}:{c}"))
    value = (a // divisor, b // divisor, c // divisor)
    return Example(
        value, texts, (f"{c}:{b}:{a}",), (f"{a}:{b}", rf"\frac{{{a}}}{{{b}}}", f"{a}/{b}/{c}", f"({a},{b},{c})")
    )


def _word(rng: Random) -> Example:
    letters = rng.sample("ABCDFGHKLMNPRST", rng.choice((4, 5)))
    word = "".join(letters)
    swapped = word[1] + word[0] + word[2:]
    texts = (word, rf"\text{{{word}}}", word.lower(), rf"\textbf{{{word}}}", rf"\mathrm{{{word.title()}}}")
    return Example(word, texts, (swapped, word[::-1]), (word[:-1], word[0]))


def _clock(rng: Random) -> Example:
    hour, minute = rng.sample(range(1, 10), 2)
    half = rng.choice(("a", "p"))
    time = f"{hour}:{minute:02d}"
    texts = (rf"{time}\text{{ {half}.m.}}", f"{time} {half}m", f"{time} {half.upper()}M", time)
    return Example((hour, minute, half), texts[:3], (f"{minute}:{hour:02d} {half}m",), (str(hour), f"{hour}/{minute}"))


KINDS: dict[str, Callable[[Random], Example]] = {
    make.__name__.strip("_").replace("_", " "): make
    for make in (
        *(_integer, _fraction, _decimal, _percentage, _surd, _multiple_of_pi, _polynomial, _product, _function),
        *(_degrees, _complex, _interval, _union, _point, _list, _plus_minus, _line, _matrix, _vector, _ratio, _word),
        _clock,
    )
}


def pairs(count: int, seed: int = 0) -> Iterator[Pair]:
    """As many right as wrong pairs of all kinds in turn, the same for the same seed."""
    rng = random.Random(seed)
    for number in range(count):
        kind = list(KINDS)[number // 2 % len(KINDS)]
        example = KINDS[kind](rng)
        if number % 2 == 0:
            gold, answer = rng.sample(example.notations, 2)
            yield Pair(kind, "notation", gold, answer)
        else:
            yield _wrong(rng, kind, example)


def _wrong(rng: Random, kind: str, example: Example) -> Pair:
    gold = rng.choice(example.notations)
    relations = ("other value", "permutation", "fragment", "question")
    choices = {"permutation": example.permuted, "fragment": example.fragments, "question": example.questions}
    relation = rng.choice([name for name in relations if choices.get(name, True)])
    if relation == "question":
        prompt, answer = rng.choice(example.questions)
        return Pair(kind, relation, example.notations[0], answer, prompt)
    if relation != "other value":
        return Pair(kind, relation, gold, rng.choice(choices[relation]))
    other = example
    while other.value == example.value:
        other = KINDS[kind](rng)
    return Pair(kind, relation, gold, rng.choice(other.notations))
