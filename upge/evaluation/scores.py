"""The scores of an evaluation, computed from its samples: accuracy, pass@k, and numbers that qualify them.

pass@k is the probability that at least one of k responses, drawn without replacement from n, is correct. With c correct
responses among n, its unbiased estimate is (Chen et al., arXiv 2107.03374)

    pass@k = 1 − C(n−c, k)/C(n, k)

Legend: P problems, n samples per problem, K values of k.
"""

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
from upge.evaluation.intervals import Interval, intervals
from upge.evaluation.samples import Sample

NO_LEVEL = "no level"
NONE = ("", 0.0)
#: A longer answer is cut to this many characters.
LONG_ANSWER = 40
#: A larger share of responses with the same wrong answer is reported, with at least this many problems.
MANY_ALIKE, ENOUGH_PROBLEMS = 0.5, 10


def pass_at_k(samples: Int[Tensor, " P"], correct: Int[Tensor, " P"], ks: Sequence[int]) -> Float[Tensor, "P K"]:
    """pass@k of P problems for every k in `ks`, in float64, with a relative error of about 1e-12.

    Args:
        samples: [P] n, the number of responses to each problem; it may differ between problems.
        correct: [P] c, the number of correct responses.
        ks: the K values of k, each from 1 to the smallest n.

    Raises:
        ValueError: a k is below 1 or above a problem's n, or a c is below 0 or above n.
    """
    return torch.expm1(log_fail_at_k(samples, correct, ks)).abs()  # expm1 is never positive; abs also removes −0


def log_fail_at_k(samples: Int[Tensor, " P"], correct: Int[Tensor, " P"], ks: Sequence[int]) -> Float[Tensor, "P K"]:
    """log(1 − pass@k), with a relative error of about 1e-12 even where pass@k rounds to 1; −inf where k > n − c.

    C(n−c, k)/C(n, k) = ∏_{i<k} (1 − c/(n−i)). The logarithms of all factors have the same sign, so their sum has no
    cancellation, unlike differences of log-factorials. The partial sums give all k at once.

    Args, Returns and Raises are those of `pass_at_k`.
    """
    _check_counts(samples, correct, ks)
    # Problems with equal counts share a row, so there are at most n + 1 rows per n.
    counts, row = torch.unique(torch.stack([samples, correct]).long(), dim=1, return_inverse=True)
    n, c = counts.to(torch.float64).unsqueeze(-1)
    drawn = torch.arange(max(ks), dtype=torch.float64)
    # Once at most c responses remain, all of them are correct, and the factor stays 0.
    logarithms = torch.log1p(-(c / (n - drawn)).clamp(max=1.0)).cumsum(dim=1)
    return logarithms[:, [k - 1 for k in ks]][row]


def powers_of_two(n: int) -> tuple[int, ...]:
    """1, 2, 4, … up to n, and n itself: the values of k at which pass@k is reported.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; pass@k needs at least one sample")
    return tuple(dict.fromkeys([2**power for power in range(n.bit_length())] + [n]))


def _check_counts(samples: Tensor, correct: Tensor, ks: Sequence[int]) -> None:
    for name, counts in (("samples", samples), ("correct", correct)):
        if counts.ndim != 1 or counts.is_floating_point() or counts.dtype == torch.bool:
            raise ValueError(f"{name}: found {counts.dtype} of shape {list(counts.shape)}, expected integers [P]")
    if len(samples) != len(correct):
        raise ValueError(f"samples has {len(samples)} problems and correct has {len(correct)}; give one count for each")
    if len(samples) == 0:
        raise ValueError("there are no problems; pass@k needs at least one")
    if not ks:
        raise ValueError("ks is empty; give at least one k")
    for problem, (n, c) in enumerate(zip(samples.tolist(), correct.tolist(), strict=True)):
        if not 0 <= c <= n:
            raise ValueError(f"problem {problem} has {c} correct responses of {n}; the count must be from 0 to {n}")
    least = int(samples.min())
    for k in ks:
        if not 1 <= k <= least:
            raise ValueError(f"k is {k}, but pass@k needs 1 ≤ k ≤ n, and the smallest n is {least}")


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of the samples of one benchmark, without texts: P problems, sorted by id, with n samples each.

    Attributes:
        benchmark: its name.
        ids: [P] the problems' ids.
        levels: [P] the problems' levels; None if a problem has none.
        answers: [P] the problems' reference answers.
        correct, finished: [P, n] as in `Sample`.
        tokens: [P, n] the lengths of the responses.
        timeouts, errors: the numbers of verifications that timed out and that failed; their samples count as wrong.
        commonest: the most frequent wrong answer, and its share of all responses.
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
        """Gather the samples 0 to n−1 of every problem.

        Args:
            benchmark: its name.
            samples: in any order; samples with numbers from n on are ignored.
            n: samples per problem; None = the largest number of any problem.
            ids: the problems that must be present; None = those that have samples.

        Raises:
            DataError: there are no samples, some are missing (an unfinished evaluation has no scores), or samples of
                one problem disagree about its answer or level.
        """
        problems: dict[str, dict[int, Sample]] = {id: {} for id in sorted(ids or ())}
        for sample in samples:
            _check_belongs(sample, benchmark, problems, ids)
            if n is None or sample.sample < n:
                problems.setdefault(sample.id, {})[sample.sample] = _without_texts(sample)
        n = n or max((max(rows, default=-1) + 1 for rows in problems.values()), default=0)
        _check_complete(benchmark, problems, n)
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
        """[P, 1] the fraction of each problem's samples that are correct; its mean over problems is avg@n."""
        return self.correct.double().mean(dim=1, keepdim=True)

    def pass_at(self, ks: Sequence[int]) -> Float[Tensor, "P K"]:
        """[P, K] the unbiased pass@k of each problem."""
        return pass_at_k(torch.full((len(self.ids),), self.samples), self.correct.sum(dim=1), ks)


@dataclass(frozen=True)
class Accuracy:
    """The accuracy on P problems with n samples each, with 95 % intervals over problems.

    Attributes:
        avg: avg@n.
        pass_at: k → pass@k, for k = 1, 2, 4, … and n.
    """

    problems: int
    samples: int
    avg: Interval
    pass_at: Mapping[int, Interval]


@dataclass(frozen=True)
class BenchmarkScores(Accuracy):
    """The scores of one benchmark.

    Attributes:
        pass_at_every: pass@k for k = 1, 2, 3, …, n, without intervals.
        levels: difficulty level → the accuracy on its problems, in natural order; empty if no problem has a level.
        unfinished: the share of responses that were cut off at the length limit.
        timeouts, errors, commonest: as in `Outcomes`.
        tokens: the mean length of a response.
    """

    pass_at_every: Sequence[float]
    levels: Mapping[str, Accuracy]
    unfinished: float
    timeouts: int
    errors: int
    tokens: float
    commonest: tuple[str, float]


def benchmark_scores(outcomes: Outcomes) -> BenchmarkScores:
    """The scores of one benchmark, with intervals over its problems."""
    overall = _accuracy(outcomes, list(range(len(outcomes.ids))))
    return BenchmarkScores(
        **vars(overall),
        pass_at_every=outcomes.pass_at(range(1, outcomes.samples + 1)).mean(dim=0).tolist(),
        levels={level: _accuracy(outcomes, rows) for level, rows in by_level(outcomes.levels).items()},
        unfinished=1 - outcomes.finished.double().mean().item(),
        timeouts=outcomes.timeouts,
        errors=outcomes.errors,
        tokens=outcomes.tokens.double().mean().item(),
        commonest=outcomes.commonest,
    )


def average(suite: Sequence[Outcomes]) -> Interval:
    """The unweighted mean of the benchmarks' avg@n, with its interval over problems."""
    return intervals({one.benchmark: one.average() for one in suite})[0]


def suite_scores(
    suite: Sequence[Outcomes],
    groups: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of scores.json.

    Args:
        suite: the benchmarks, in the order of display.
        groups: benchmark → the group whose average includes it, such as in or out of distribution.
        settings: benchmark → its sampling settings; scores are comparable only if these are equal.
    """
    benchmarks = {
        one.benchmark: {
            "group": groups[one.benchmark],
            "settings": dict(settings[one.benchmark]),
            **asdict(benchmark_scores(one)),
        }
        for one in suite
    }
    averages: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(groups[one.benchmark] for one in suite):
        members = [one for one in suite if groups[one.benchmark] == group]
        avg = asdict(average(members))
        averages[group] = {"benchmarks": [one.benchmark for one in members], "avg": avg}
    return {"benchmarks": benchmarks, "averages": averages}


def same_answer(commonest: Sequence[Any], problems: int) -> str | None:
    """A sentence about a policy that gives most problems the same wrong answer, from `Outcomes.commonest`.

    None if the answer's share is at most `MANY_ALIKE`, or there are fewer than `ENOUGH_PROBLEMS` problems.
    """
    answer, share = commonest
    if share <= MANY_ALIKE or problems < ENOUGH_PROBLEMS:
        return None
    return f"{100 * share:.1f} % of the responses give the same wrong answer, {answer}."


def by_level(levels: Sequence[str | None]) -> dict[str, list[int]]:
    """Level → the positions of the problems that have it, with levels in natural order (2 before 10).

    Problems without a level come last. Empty if no problem has a level.
    """
    positions: dict[str, list[int]] = {}
    for position, level in enumerate(levels):
        positions.setdefault(NO_LEVEL if level is None else level, []).append(position)
    ordered = sorted(positions, key=lambda level: (level == NO_LEVEL, natural(level)))
    return {} if list(positions) == [NO_LEVEL] else {level: positions[level] for level in ordered}


def natural(text: str) -> tuple[tuple[int, str], ...]:
    """A sorting key that compares runs of digits as numbers."""
    parts = re.split(r"(\d+)", text)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)


def _accuracy(outcomes: Outcomes, rows: Sequence[int]) -> Accuracy:
    ks = powers_of_two(outcomes.samples)
    values = torch.cat([outcomes.average(), outcomes.pass_at(ks)], dim=1)[list(rows)]
    avg, *curve = intervals({outcomes.benchmark: values})
    return Accuracy(len(rows), outcomes.samples, avg, dict(zip(ks, curve, strict=True)))


def _without_texts(sample: Sample) -> Sample:
    """The sample without its texts: with thousands of samples per problem, the texts would not fit in memory."""
    answer = sample.extracted and " ".join(sample.extracted.split())
    if answer and len(answer) > LONG_ANSWER:
        answer = f"{answer[:LONG_ANSWER]}… ({len(answer)} characters)"
    return Sample(**{**vars(sample), "prompt": "", "response": "", "extracted": answer, "detail": ""})


def _check_belongs(
    sample: Sample, benchmark: str, problems: Mapping[str, Mapping[int, Sample]], ids: Collection[str] | None
) -> None:
    if sample.benchmark != benchmark:
        raise DataError(
            f"{benchmark}: found samples of '{sample.benchmark}' in its file; give each benchmark its own samples file"
        )
    if ids is not None and sample.id not in problems:
        raise DataError(f"{benchmark}: found samples of problem '{sample.id}', which is not one of its problems")
    for known in (problems.get(sample.id) or {}).values():
        if (known.answer, known.level) != (sample.answer, sample.level):
            raise DataError(
                f"{benchmark}: samples {known.sample} and {sample.sample} of problem '{sample.id}' disagree about its "
                "answer or level, so the file mixes two versions of the data; evaluate again into a new folder"
            )
        break


def _check_complete(benchmark: str, problems: Mapping[str, Mapping[int, Sample]], n: int) -> None:
    if not problems or n == 0:
        raise DataError(f"{benchmark}: there are no samples; run its evaluation first")
    short = {id: len(rows) for id, rows in problems.items() if len(rows) < n}
    if short:
        id, has = next(iter(short.items()))
        raise DataError(
            f"{benchmark}: {len(short)} of {len(problems)} problems have fewer than {n} samples (problem '{id}' has "
            f"{has}); the evaluation is not finished: start it again with the same output to complete it"
        )
