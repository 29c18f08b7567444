"""The answers that the bench of the verifier asks about: real ones, as single ones and in groups, and bombs.

The real ones are human solutions of MATH and GSM8K. A policy's group is made of them: of its responses to a problem
between none and all are right, each number as often, and the wrong ones have one to four different answers, each half
as often as the one before. All texts differ, so only the answers repeat.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from upge.errors import ConfigError
from upge.verify import Item
from upge.verify.math import MathVerifier

EVIDENT_BOMBS = (r"9^{9^{9^9}}", r"10^{10^{10^{10}}}", r"(10^{10})!", r"\binom{10^9}{5\cdot 10^8}", r"42!!!!!!")
"""Answers that nobody can evaluate, and whose size tells that they are not the ground truth."""
HIDDEN_BOMBS = (r"i^{9^{9^9}}", r"\frac{(10^9)!}{(10^9-1)!}", r"(-1)^{9^{9^9}}", r"\{9^{9^{9^9}},2\}", r"1^{9^{9^9}}")
"""Answers that nobody evaluates in time, and whose size tells nothing."""
BOMBS = tuple(bomb for pair in zip(EVIDENT_BOMBS, HIDDEN_BOMBS, strict=True) for bomb in pair)
MOST_WRONG = 4
"""Different wrong answers in a group."""


def single(folder: str) -> list[Item]:
    """Each solution for its own ground truth and for another's, right and wrong ones in an order of chance."""
    solved = solutions(folder)
    items = []
    for number, (prompt, solution, answer) in enumerate(solved):
        _, other, theirs = solved[(number * 7 + 11) % len(solved)]
        items.append(Item(solution, answer, prompt))
        if theirs != answer:
            items.append(Item(other, answer, prompt))
    random.Random(0).shuffle(items)
    return items


def grouped(folder: str, size: int) -> list[Item]:
    """Groups of `size` responses to one problem each, one after the other."""
    chance, solved = random.Random(0), solutions(folder)
    chance.shuffle(solved)
    items = []
    for prompt, solution, answer in solved:
        wrong = [text for _, text, theirs in chance.sample(solved, chance.randint(1, MOST_WRONG)) if theirs != answer]
        right = chance.randint(0, size) if wrong else size
        weights = [0.5**rank for rank in range(len(wrong))]
        texts = [solution] * right + (chance.choices(wrong, weights, k=size - right) if wrong else [])
        chance.shuffle(texts)
        items += [Item(f"Attempt {number}. {text}", answer, prompt) for number, text in enumerate(texts, 1)]
    return items


def parsed(items: list[Item]) -> list[Item]:
    """Those that no comparison of texts or numbers decides."""
    verifier = MathVerifier()
    given = [verifier.extract(item.response) for item in items]
    return [
        i for i, text in zip(items, given, strict=True) if text and verifier.glance(text, i.answer, i.prompt) is None
    ]


def with_bombs(items: list[Item], bombs: list[str]) -> list[Item]:
    """The answers with bombs, as answers to another problem, spread among them."""
    mixed = list(items)
    for number, bomb in enumerate(bombs):
        mixed.insert((2 * number + 1) * len(items) // (2 * len(bombs)), Item(rf"\boxed{{{bomb}}}", "3.5"))
    return mixed


def solutions(folder: str) -> list[tuple[str, str, str]]:
    """(prompt, solution with a box, ground truth): real ones, or without a folder made-up ones.

    Raises:
        ConfigError: the files are not there.
    """
    return list(_real(Path(folder).expanduser()) if folder else _made_up())


def _real(folder: Path) -> Iterator[tuple[str, str, str]]:
    """MATH and GSM8K in turn."""
    import pyarrow.parquet

    math, gsm8k = folder / "math" / "train.parquet", folder / "gsm8k" / "train.jsonl"
    for path in (math, gsm8k):
        if not path.is_file():
            raise ConfigError(f"folder: there is no file '{path}'; give the folder that holds it, or none")
    of_math = pyarrow.parquet.read_table(math).to_pylist()
    of_gsm8k = [json.loads(line) for line in gsm8k.read_text("utf-8").split("\n") if line.strip()]
    for first, second in zip(of_math, of_gsm8k, strict=False):
        if first["answer"]:
            yield first["problem"], first["solution"], first["answer"]
        worked, _, number = (part.strip() for part in second["answer"].rpartition("####"))
        yield second["question"], rf"{worked} So it is $\boxed{{{number}}}$.", number


def _made_up() -> Iterator[tuple[str, str, str]]:
    """Fractions, roots, polynomials and numbers, each in another form than its ground truth."""
    for k in range(1, 1201):
        yield f"Problem {k}", rf"We find $\boxed{{\frac{{{2 * k}}}{{{2 * k + 4}}}}}$.", rf"\frac{{{k}}}{{{k + 2}}}"
        yield f"Problem {k}", rf"We find $\boxed{{(x+{k})^2}}$.", f"x^2+{2 * k}x+{k * k}"
        yield f"Problem {k}", rf"We find $\boxed{{\sqrt{{{k * k * 3}}}}}$.", rf"{k}\sqrt{{3}}"
        yield f"Problem {k}", rf"We find $\boxed{{{k}}}$.", f"{k}"
