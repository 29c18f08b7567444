"""Sampling a benchmark: every response from a seed of its own, verified and written while others are generated."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from upge.data import Problem, Prompting
from upge.errors import DataError
from upge.evaluation.samples import Sample, SampleFile
from upge.evaluation.suite import Benchmark
from upge.rollout import Rollout, Sampler, Sampling
from upge.train.order import stream_seed
from upge.trajectories import SUCCESS_REWARD
from upge.verify import Item, Verdict, VerifierPool

#: Responses in one call of the sampler, which keeps their tokens until its end: at 8192 tokens about half a GiB.
CHUNK = 1024


@dataclass(frozen=True)
class Questions:
    """The problems of a benchmark as a model is asked them.

    Fields:
        benchmark: where they come from.
        texts: per problem the prompt in its template.
        prompt_ids: the same in tokens.
    """

    benchmark: Benchmark
    texts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, benchmark: Benchmark, prompting: Prompting, max_prompt_tokens: int) -> Questions:
        """Those of `benchmark`.

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
        return cls(benchmark, tuple(prompting.text(p) for p in problems), tuple(ids))

    def missing(self, file: SampleFile) -> list[tuple[int, int]]:
        """(index of the problem, number of the response) of what `file` lacks, the longest prompts first.

        Raises:
            DataError: the file is damaged or holds samples of other problems.
        """
        problems = self.benchmark.problems
        asked = {p.id: (text, p.answer) for p, text in zip(problems, self.texts, strict=True)}
        done = file.done(asked)
        order = sorted(range(len(problems)), key=lambda i: -len(self.prompt_ids[i]))
        everything = [(i, copy) for i in order for copy in range(self.benchmark.samples)]
        return [(i, copy) for i, copy in everything if (problems[i].id, copy) not in done]


@dataclass(frozen=True)
class Runner:
    """Puts questions to a model and writes what comes of it.

    A response depends on the seed, the benchmark's name, the problem's id and its own number, not on what else is
    sampled with it: an evaluation that was interrupted and continued has the samples of one that was not, up to
    rounding where two tokens nearly tie.

    Fields:
        sampler, prompting, sampling: the model, how it is spoken to, and how tokens are drawn.
        pool: the verifiers.
        seed: of the whole evaluation.
        wrote: called after every sample that is written, from a thread of its own.
    """

    sampler: Sampler
    prompting: Prompting
    sampling: Sampling
    pool: VerifierPool
    seed: int
    wrote: Callable[[Sample], None]

    def run(self, questions: Questions, file: SampleFile, chunk: int = CHUNK) -> None:
        """Draws the responses that `file` lacks, at most `chunk` in one call of the sampler, and closes it.

        Whatever ends it early, a signal's exception included: responses that were complete are verified and written
        first.

        Raises:
            DataError: the file is damaged, holds samples of other problems or cannot be written.
        """
        missing = questions.missing(file)
        with file, ThreadPoolExecutor(1, "samples") as writer:
            for start in range(0, len(missing), chunk):
                self._draw(questions, missing[start : start + chunk], file, writer)

    def _draw(
        self, questions: Questions, wanted: Sequence[tuple[int, int]], file: SampleFile, writer: ThreadPoolExecutor
    ) -> None:
        benchmark, waiting = questions.benchmark, deque[Future[None]]()

        def arrived(index: int, _: int, rollout: Rollout) -> None:
            number, copy = wanted[index]
            problem = benchmark.problems[number]
            (response,) = self.prompting.decode([rollout.token_ids])
            verdict = self.pool.submit(Item(response, problem.answer, problem.prompt, problem.verifier))
            place = (benchmark.name, problem, questions.texts[number], copy)
            waiting.append(writer.submit(self._write, file, place, rollout, response, verdict))
            while waiting and waiting[0].done():
                waiting.popleft().result()

        seeds = [stream_seed(self.seed, benchmark.name, benchmark.problems[i].id, copy) for i, copy in wanted]
        try:
            self.sampler.sample([questions.prompt_ids[i] for i, _ in wanted], 1, self.sampling, seeds, arrived)
        finally:
            for writing in waiting:
                writing.result()

    def _write(
        self,
        file: SampleFile,
        place: tuple[str, Problem, str, int],
        rollout: Rollout,
        response: str,
        pending: Future[Verdict],
    ) -> None:
        """Waits for the verdict and writes the sample; in a thread of its own, so that generation waits for neither."""
        benchmark, problem, text, copy = place
        verdict = pending.result()
        sample = Sample(
            benchmark=benchmark,
            id=problem.id,
            level=problem.level,
            sample=copy,
            prompt=text,
            answer=problem.answer,
            response=response,
            extracted=verdict.extracted,
            reward=float(verdict.reward),
            correct=verdict.reward > SUCCESS_REWARD,
            status=verdict.status,
            detail=verdict.detail,
            tokens=len(rollout.token_ids),
            finished=rollout.finished,
        )
        file.append([sample])
        self.wrote(sample)
