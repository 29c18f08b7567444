"""How often graders misjudge answers: the `math` verifier, plain math-verify, and the graders of TRL and verl.

The answers are the pairs of `experiments.bench.answer_pairs`, so the right verdicts are known.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence

from experiments.bench import peers
from experiments.bench.answer_pairs import Pair, pairs
from experiments.grid import markdown_table
from upge.verify import Item, VerifierPool

Grader = Callable[[Sequence[Pair]], list[float]]
TIME_LIMIT = 10
WRONG = ("other value", "permutation", "fragment", "question")
"""The relations of wrong answers to their ground truth."""


def accuracy(count: int) -> str:
    """A Markdown table of the errors that each grader makes on `count` pairs, half of them right."""
    labelled = list(pairs(count))
    of = Counter(pair.relation for pair in labelled)
    rows = [["answers", of["notation"], sum(of[name] for name in WRONG), *(of[name] for name in WRONG), ""]]
    for name, grade in graders().items():
        rewards = zip(labelled, grade(labelled), strict=True)
        errors = Counter(pair.relation for pair, reward in rewards if (reward == 1.0) != pair.is_right)
        rewarded = sum(errors[relation] for relation in WRONG)
        share = f"{(errors['notation'] + rewarded) / count:.2%}"
        rows.append([name, errors["notation"], rewarded, *(errors[relation] for relation in WRONG), share])
    header = ["grader", "right ones refused", "wrong ones rewarded", *WRONG, "errors"]
    return "\n\n".join([markdown_table(header, rows), peers.summary(("TRL", "verl"))])


def graders() -> dict[str, Grader]:
    """The graders that are installed."""
    found: dict[str, Grader] = {"upge `math`": _ours, "math-verify": _each(_math_verify())}
    with contextlib.suppress(ImportError):
        found["TRL `accuracy_reward`"] = _each(_trl())
    for name, file in {"verl `math_verify`": "math_verify.py", "verl `math_reward`": "math_reward.py"}.items():
        with contextlib.suppress(ImportError):
            found[name] = _each(_verl(file))
    return found


def _ours(labelled: Sequence[Pair]) -> list[float]:
    items = [Item(_boxed(pair.answer), pair.gold, pair.prompt) for pair in labelled]
    with VerifierPool("math", workers=1, time_limit=TIME_LIMIT) as pool:
        return [verdict.reward for verdict in pool.score(items)]


def _each(grade: Callable[[str, str], float | None]) -> Grader:
    """A grader of many pairs from one of (response, ground truth). A failure is no reward."""

    def grade_all(labelled: Sequence[Pair]) -> list[float]:
        rewards = []
        for pair in labelled:
            try:
                rewards.append(grade(_boxed(pair.answer), pair.gold) or 0.0)
            except Exception:
                rewards.append(0.0)
        return rewards

    return grade_all


def _boxed(answer: str) -> str:
    return rf"So the answer is $\boxed{{{answer}}}$."


def _math_verify() -> Callable[[str, str], float]:
    """math-verify as in its documentation."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return lambda response, gold: float(
        verify(
            parse(f"${gold}$", parsing_timeout=TIME_LIMIT),
            parse(response, parsing_timeout=TIME_LIMIT),
            timeout_seconds=TIME_LIMIT,
        )
    )


def _trl() -> Callable[[str, str], float | None]:
    from trl.rewards import accuracy_reward

    return lambda response, gold: accuracy_reward([[{"content": response}]], [f"${gold}$"])[0]


def _verl(file: str) -> Callable[[str, str], float]:
    """A grader of verl, of `verl/utils/reward_score`; math_verify without the process that gives it a timeout."""
    module = peers.load_file(f"verl/utils/reward_score/{file}", "verl")
    if file == "math_verify.py":
        return lambda response, gold: module._verify_in_subprocess(rf"\boxed{{{gold}}}", response)
    return module.compute_score
