"""The figures of an evaluation: accuracy, pass@k, and what to know before believing them, from its samples alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upge.errors import DataError
from upge.evaluation.intervals import RESAMPLES, Interval, intervals
from upge.evaluation.passk import pass_at_k, powers_of_two
from upge.evaluation.samples import Sample

NO_LEVEL = "no level"
NONE = ("", 0.0)
#: Characters that are kept of an answer, with its length.
LONG_ANSWER = 40
#: A larger share of responses with the same wrong answer is worth a note, from so many problems on.
MANY_ALIKE, ENOUGH_PROBLEMS = 0.5, 10


@dataclass(frozen=True)
class Outcomes:
    """What became of the samples of one benchmark, without their texts: P problems, sorted by id, n samples each.

    Fields:
        benchmark: its name.
        ids, levels, answers: of the problems; a level is None where the problem has none.
        correct, finished: of each sample, as in `Sample`.
        tokens: length of each response.
        timeouts, errors: how many verifications ended so; their samples count as wrong.
        commonest: the wrong answer that was read in more responses than any other, and their share of all.
    """

    benchmark: str
    ids: tuple[str, ...]
    levels: tuple[str | None, ...]
    answers: tuple[str, ...]
    correct: Bool[Tensor, "P n"]
    finished: Bool[Tensor, "P n"]
    tokens: Int[Tensor, "P n"]
    timeouts: int
    errors: int
    commonest: tuple[str, float] = NONE

    @classmethod
    def of(
        cls, benchmark: str, samples: Iterable[Sample], n: int | None = None, ids: Collection[str] | None = None
    ) -> Outcomes:
        """Gathers the samples 0 to n−1 of every problem.

        Args:
            samples: in any order; numbers from n on are passed over.
            n: samples per problem; None takes the largest number that any problem has.
            ids: the problems that must be there; None takes those that have samples.

        Raises:
            DataError: no samples, some that are missing (an evaluation that is not finished has no figures), or some
                that contradict each other about their problem.
        """
        problems: dict[str, dict[int, Sample]] = {id: {} for id in sorted(ids or ())}
        for sample in samples:
            _belongs(sample, benchmark, problems, ids)
            if n is None or sample.sample < n:
                problems.setdefault(sample.id, {})[sample.sample] = _without_texts(sample)
        n = n or max((max(rows, default=-1) + 1 for rows in problems.values()), default=0)
        _complete(benchmark, problems, n)
        rows = [[problems[id][number] for number in range(n)] for id in sorted(problems)]
        every = [sample for row in rows for sample in row]
        status = Counter(sample.status for sample in every)
        given = Counter(sample.extracted for sample in every if sample.extracted and not sample.correct)
        return cls(
            benchmark,
            ids=tuple(row[0].id for row in rows),
            levels=tuple(row[0].level for row in rows),
            answers=tuple(row[0].answer for row in rows),
            correct=torch.tensor([[sample.correct for sample in row] for row in rows]),
            finished=torch.tensor([[sample.finished for sample in row] for row in rows]),
            tokens=torch.tensor([[sample.tokens for sample in row] for row in rows]),
            timeouts=status["timeout"],
            errors=status["error"],
            commonest=next(((answer, count / len(every)) for answer, count in given.most_common(1)), NONE),
        )

    @property
    def samples(self) -> int:
        """n, the number of samples per problem."""
        return self.correct.shape[1]

    def average(self) -> Float[Tensor, "P 1"]:
        """The share of each problem's samples that are correct; its mean over problems is avg@n."""
        return self.correct.double().mean(dim=1, keepdim=True)

    def pass_at(self, ks: Sequence[int]) -> Float[Tensor, "P K"]:
        """The unbiased pass@k of each problem."""
        return pass_at_k(torch.full((len(self.ids),), self.samples), self.correct.sum(dim=1), ks)


@dataclass(frozen=True)
class Accuracy:
    """Of some problems, with 95 % bootstrap intervals over them: avg@n, and pass@k for k = 1, 2, 4, … and n."""

    problems: int
    samples: int
    avg: Interval
    pass_at: Mapping[int, Interval]


@dataclass(frozen=True)
class Figures(Accuracy):
    """Of one benchmark.

    Fields:
        pass_at_every: pass@k for every k = 1, 2, 3, …, n, without intervals.
        levels: as in `Accuracy` by difficulty level, in their order; empty if no problem has one.
        unfinished: share of the responses that were cut off at the length limit.
        timeouts, errors: how many answers the verifier gave up on or failed at.
        tokens: mean length of a response.
        commonest: the wrong answer of more responses than any other, and their share of all.
    """

    pass_at_every: Sequence[float]
    levels: Mapping[str, Accuracy]
    unfinished: float
    timeouts: int
    errors: int
    tokens: float
    commonest: tuple[str, float]


def figures(outcomes: Outcomes, resamples: int = RESAMPLES, seed: int = 0) -> Figures:
    """All that one benchmark has to say."""
    everyone = _accuracy(outcomes, list(range(len(outcomes.ids))), resamples, seed)
    return Figures(
        **vars(everyone),
        pass_at_every=outcomes.pass_at(range(1, outcomes.samples + 1)).mean(dim=0).tolist(),
        levels={level: _accuracy(outcomes, rows, resamples, seed) for level, rows in by_level(outcomes.levels).items()},
        unfinished=1 - outcomes.finished.double().mean().item(),
        timeouts=outcomes.timeouts,
        errors=outcomes.errors,
        tokens=outcomes.tokens.double().mean().item(),
        commonest=outcomes.commonest,
    )


def average(suite: Sequence[Outcomes], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean over benchmarks of their avg@n, each benchmark counting alike, with problems resampled within each."""
    return intervals({one.benchmark: one.average() for one in suite}, resamples, seed)[0]


def suite_scores(
    suite: Sequence[Outcomes],
    groups: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of scores.json.

    Args:
        suite: the benchmarks, in reading order.
        groups: benchmark → the group whose average it enters, such as in or out of distribution.
        settings: benchmark → how its samples were drawn; what makes scores comparable only where it is equal.
    """
    benchmarks = {
        one.benchmark: {
            "group": groups[one.benchmark],
            "settings": dict(settings[one.benchmark]),
            **asdict(figures(one, resamples, seed)),
        }
        for one in suite
    }
    averages = {}
    for group in dict.fromkeys(groups[one.benchmark] for one in suite):
        members = [one for one in suite if groups[one.benchmark] == group]
        found = asdict(average(members, resamples, seed))
        averages[group] = {"benchmarks": [one.benchmark for one in members], "avg": found}
    return {"benchmarks": benchmarks, "averages": averages}


def same_answer(commonest: Sequence[Any], problems: int) -> str | None:
    """A sentence on a policy that hardly looks at its problems; None where answers differ or problems are few."""
    answer, share = commonest
    if share <= MANY_ALIKE or problems < ENOUGH_PROBLEMS:
        return None
    return f"{100 * share:.1f} % of the responses give the same wrong answer, {answer}."


def by_level(levels: Sequence[str | None]) -> dict[str, list[int]]:
    """Level → the positions that have it, levels in natural order (2 before 10), problems without one last.

    Empty if none has a level.
    """
    found: dict[str, list[int]] = {}
    for position, level in enumerate(levels):
        found.setdefault(NO_LEVEL if level is None else level, []).append(position)
    ordered = sorted(found, key=lambda level: (level == NO_LEVEL, natural(level)))
    return {} if list(found) == [NO_LEVEL] else {level: found[level] for level in ordered}


def natural(text: str) -> tuple:
    """A sorting key that reads digits as numbers."""
    parts = re.split(r"(\d+)", text)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)


def _accuracy(outcomes: Outcomes, rows: Sequence[int], resamples: int, seed: int) -> Accuracy:
    ks = powers_of_two(outcomes.samples)
    # One resampling for all columns: avg@n and the whole curve.
    values = torch.cat([outcomes.average(), outcomes.pass_at(ks)], dim=1)[list(rows)]
    avg, *curve = intervals({outcomes.benchmark: values}, resamples, seed)
    return Accuracy(len(rows), outcomes.samples, avg, dict(zip(ks, curve, strict=True)))


def _without_texts(sample: Sample) -> Sample:
    """Samples of an evaluation of thousands per problem would not fit in memory with their texts."""
    answer = sample.extracted and " ".join(sample.extracted.split())
    if answer and len(answer) > LONG_ANSWER:
        answer = f"{answer[:LONG_ANSWER]}… ({len(answer)} characters)"
    return Sample(**{**vars(sample), "prompt": "", "response": "", "extracted": answer, "detail": ""})


def _belongs(sample: Sample, benchmark: str, problems: Mapping, ids: Collection[str] | None) -> None:
    if sample.benchmark != benchmark:
        raise DataError(f"{benchmark}: found samples of '{sample.benchmark}' among its own; each has a file of its own")
    if ids is not None and sample.id not in problems:
        raise DataError(f"{benchmark}: found samples of problem '{sample.id}', which is not one of its problems")
    for known in (problems.get(sample.id) or {}).values():
        if (known.answer, known.level) != (sample.answer, sample.level):
            raise DataError(
                f"{benchmark}: samples {known.sample} and {sample.sample} of problem '{sample.id}' disagree about its "
                "answer or level; the file mixes two versions of the data: evaluate again into a new folder"
            )
        break


def _complete(benchmark: str, problems: Mapping[str, Mapping[int, Sample]], n: int) -> None:
    if not problems or n == 0:
        raise DataError(f"{benchmark}: there are no samples; run its evaluation")
    short = {id: len(rows) for id, rows in problems.items() if len(rows) < n}
    if short:
        id, has = next(iter(short.items()))
        raise DataError(
            f"{benchmark}: {len(short)} of {len(problems)} problems have fewer than {n} samples (problem '{id}' has "
            f"{has}); the evaluation is not finished: start it again with the same output to complete it"
        )
