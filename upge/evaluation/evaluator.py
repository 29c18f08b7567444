"""Evaluation of a policy: responses to problems, each with its own seed, verified while others are generated.

`Evaluator` writes every sample of a benchmark to a file and continues after an interruption.
`training_accuracy` measures accuracy during training, on all ranks and in memory. Both draw with a `VerifiedSampler`,
and both compute pass@k with `upge.evaluation.scores`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from upge.data import Example, Prompting
from upge.errors import DataError
from upge.evaluation.samples import Sample, SampleFile
from upge.evaluation.scores import pass_at_k
from upge.evaluation.suite import Benchmark
from upge.rollout import Sampling
from upge.rollout.verified_sampling import PendingRollout, VerifiedRollouts, VerifiedSampler
from upge.train.config import RunConfig
from upge.train.distributed import World, gather_results
from upge.train.prompt_order import stream_seed

#: Responses per call of the sampler, which holds their tokens until the call ends: about half a GiB at 8192 tokens.
CHUNK = 1024


@dataclass(frozen=True)
class Questions:
    """The prompts of a benchmark for one model.

    Attributes:
        benchmark: with its problems.
        texts: the prompt of each problem in the model's template.
        examples: the prompt of each problem in tokens.
    """

    benchmark: Benchmark
    texts: tuple[str, ...]
    examples: tuple[Example, ...]

    @classmethod
    def of(cls, benchmark: Benchmark, prompting: Prompting, max_prompt_tokens: int) -> Questions:
        """The prompts of a benchmark.

        Raises:
            DataError: a prompt is longer than `max_prompt_tokens`.
        """
        problems = benchmark.problems
        ids = prompting.prompt_ids(problems)
        long = [i for i in range(len(ids)) if len(ids[i]) > max_prompt_tokens]
        if long:
            worst = max(long, key=lambda i: len(ids[i]))
            raise DataError(
                f"suite.benchmarks.{benchmark.name}: {problems[worst].where or problems[worst].id}: the prompt has "
                f"{len(ids[worst])} tokens, the limit is suite.max_prompt_tokens={max_prompt_tokens} ({len(long)} of "
                f"{len(ids)} prompts are longer; this is the longest); raise it"
            )
        examples = tuple(Example(problem, tuple(own)) for problem, own in zip(problems, ids, strict=True))
        return cls(benchmark, tuple(prompting.text(p) for p in problems), examples)

    @property
    def prompt_ids(self) -> tuple[tuple[int, ...], ...]:
        """The prompt of each problem in tokens."""
        return tuple(example.prompt_ids for example in self.examples)

    def missing(self, file: SampleFile) -> list[tuple[int, int]]:
        """(index of the problem, number of the response) of each response that `file` lacks, longest prompts first.

        Raises:
            DataError: the file is damaged or contains samples of other problems.
        """
        problems = self.benchmark.problems
        expected = {p.id: (text, p.answer) for p, text in zip(problems, self.texts, strict=True)}
        done = file.done(expected)
        order = sorted(range(len(problems)), key=lambda i: -len(self.examples[i].prompt_ids))
        wanted = [(i, copy) for i in order for copy in range(self.benchmark.samples)]
        return [(i, copy) for i, copy in wanted if (problems[i].id, copy) not in done]


@dataclass(frozen=True)
class Evaluator:
    """Samples responses to the problems of benchmarks, verifies them, and writes the samples to files.

    A response depends on the seed, the benchmark's name, the problem's id and its own number, but not on the responses
    that are sampled with it. An evaluation that was interrupted and continued therefore has the same samples as one
    that was not, up to rounding where two tokens nearly tie.

    Attributes:
        sampler, sampling: the model with the verifiers, and the sampling settings.
        seed: the seed of the whole evaluation.
        wrote: called after each sample is written, from the writer's thread.
    """

    sampler: VerifiedSampler
    sampling: Sampling
    seed: int
    wrote: Callable[[Sample], None]

    def run(self, questions: Questions, file: SampleFile, chunk: int = CHUNK) -> None:
        """Sample the responses that `file` lacks and close the file.

        If an exception ends it early, including one raised by a signal handler, complete responses are verified and
        written first.

        `chunk` is the maximum number of responses per call of the sampler.

        Raises:
            DataError: the file is damaged, contains samples of other problems, or cannot be written.
        """
        missing = questions.missing(file)
        with file, ThreadPoolExecutor(1, "samples") as writer:
            for start in range(0, len(missing), chunk):
                self._draw(questions, missing[start : start + chunk], file, writer)

    def _draw(
        self, questions: Questions, wanted: Sequence[tuple[int, int]], file: SampleFile, writer: ThreadPoolExecutor
    ) -> None:
        benchmark, waiting = questions.benchmark, deque[Future[None]]()

        def arrived(response: PendingRollout) -> None:
            waiting.append(writer.submit(self._write, file, questions, *wanted[response.index], response))
            while waiting and waiting[0].done():
                waiting.popleft().result()

        seeds = [stream_seed(self.seed, benchmark.name, benchmark.problems[i].id, copy) for i, copy in wanted]
        try:
            self.sampler.stream([questions.examples[i] for i, _ in wanted], 1, self.sampling, seeds, arrived)
        finally:
            for writing in waiting:
                writing.result()

    def _write(self, file: SampleFile, questions: Questions, number: int, copy: int, response: PendingRollout) -> None:
        """Wait for the verdict and write the sample. It runs in a separate thread, so that generation continues."""
        problem = questions.benchmark.problems[number]
        verdict = response.verdict.result()
        self.sampler.first_error(verdict.error)
        sample = Sample(
            benchmark=questions.benchmark.name,
            id=problem.id,
            level=problem.level,
            sample=copy,
            prompt=questions.texts[number],
            answer=problem.answer,
            response=response.text,
            extracted=verdict.extracted,
            reward=float(verdict.reward),
            correct=self.sampler.passed(verdict),
            status=cast(Literal["ok", "timeout", "error"], verdict.status),
            detail=verdict.detail,
            tokens=len(response.rollout.token_ids),
            finished=response.rollout.finished,
        )
        file.append([sample])
        self.wrote(sample)


def training_accuracy(
    config: RunConfig, examples: Sequence[Example], sampler: VerifiedSampler, world: World
) -> dict[str, Any]:
    """The accuracy of the sampler's current weights, for a line of evaluations.jsonl.

    Each rank samples responses to a part of the problems. The seeds depend neither on the training step nor on the
    ranks, so two evaluations of the same weights agree.

    Args:
        config: the run's settings; `eval` has the number of samples per problem and the sampling settings.
        examples: the evaluation problems, in tokens.
        sampler: the model and the verifiers.
        world: the ranks of the run, which must all call this.

    Returns:
        {"samples": k, "temperature", "timeouts", "errors", "levels": {level: shares}, "all": shares}, the same on every
        rank, where `shares` is the result of `accuracy`, and timeouts and errors are numbers of responses without a
        verdict, which count as wrong.

    Raises:
        VerifierError, RunError: a rank's verifiers cannot run, or sampling ended early; raised on all ranks.
    """
    own = list(range(world.rank, len(examples), world.size))
    limits = config.rollout.max_response_tokens, sampler.prompting.stop_token_ids
    sampling = Sampling(config.eval.temperature, config.eval.top_p, *limits)
    seeds = [stream_seed(config.seed, "evaluation", i) for i in own]
    problems = [examples[i] for i in own]

    def solved(rollouts: VerifiedRollouts) -> list[list[bool]]:
        """For each problem, whether each of its responses is correct."""
        return [[sampler.passed(verdict) for _, verdict in group] for group in rollouts.groups]

    def measure() -> tuple[list[tuple[int, bool, list[bool]]], Counter[str], str]:
        greedy = sampler.sample(problems, 1, Sampling(0.0, 1.0, *limits), seeds)
        sampled = sampler.sample(problems, config.eval.samples, sampling, seeds)
        rows = [(i, first, rest) for i, (first,), rest in zip(own, solved(greedy), solved(sampled), strict=True)]
        verdicts = (verdict for one in (greedy, sampled) for group in one.groups for _, verdict in group)
        return rows, Counter(verdict.status for verdict in verdicts), greedy.first_error or sampled.first_error

    of_ranks = gather_results(world, measure)
    status = sum((counts for _, counts, _ in of_ranks), Counter[str]())
    if world.is_main:
        sampler.first_error(next((error for *_, error in of_ranks if error), ""))
    levels: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        levels.setdefault(example.problem.level or "all", []).append(index)
    of_problems = {index: (first, rest) for part, _, _ in of_ranks for index, first, rest in part}
    first, correct = (torch.tensor([of_problems[i][j] for i in range(len(examples))], dtype=torch.bool) for j in (0, 1))
    correct = correct.reshape(len(examples), config.eval.samples)
    return {
        "samples": config.eval.samples,
        "temperature": config.eval.temperature,
        "timeouts": status["timeout"],
        "errors": status["error"],
        "levels": {level: accuracy(first[rows], correct[rows]) for level, rows in levels.items()},
        "all": accuracy(first, correct),
    }


def accuracy(greedy: Bool[Tensor, " P"], correct: Bool[Tensor, "P k"]) -> dict[str, float]:
    """The accuracy on P problems with k samples each, as fractions of the problems.

    Args:
        greedy: [P] whether the greedy response is correct.
        correct: [P, k] whether each sampled response is correct.

    Returns:
        `problems`: P; `greedy`: the fraction solved by the greedy response; `pass@k`: the fraction with at least one
        correct sample; `mean@k`: the mean fraction of correct samples. All fractions are 0 without problems.
    """
    problems, k = correct.shape
    counts = correct.sum(dim=1)
    passed = pass_at_k(torch.full_like(counts, k), counts, [k])[:, 0] if problems else torch.zeros(0)
    shares = {"greedy": greedy.double(), f"pass@{k}": passed, f"mean@{k}": counts.double() / k}
    return {"problems": problems} | {name: sum(values.tolist()) / max(problems, 1) for name, values in shares.items()}
