"""The evaluator with a sampler that can be watched: when samples are written, from which seeds, in which pieces."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from upge.data import Example, Problem
from upge.errors import DataError
from upge.evaluation import SampleFile
from upge.evaluation.evaluator import Evaluator, Questions, accuracy, training_accuracy
from upge.evaluation.suite import Benchmark
from upge.rollout import Rollout, Sampling
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.config import EvalConfig, RunConfig
from upge.train.prompt_order import stream_seed
from upge.verify import Verdict

PROBLEMS = tuple(
    Problem(id=f"p{i}", prompt="x" * length, answer=str(i), level=None, verifier="math")
    for i, length in enumerate((2, 5, 1, 4))
)


class Watched:
    """Responds to a prompt with the seed, and notes what it was asked; `between` is called before each response."""

    def __init__(self, between=lambda number: None):
        self.calls, self.between = [], between

    def sample(self, prompts, n, sampling, seeds, arrived, interrupted=None):
        assert n == 1
        self.calls.append((list(prompts), list(seeds)))
        for i in reversed(range(len(prompts))):
            self.between(len(prompts) - 1 - i)
            arrived(i, 0, Rollout((seeds[i],), (0.0,), True))


class Words:
    """Speaks in numbers: a prompt is its characters, a response its one token's number."""

    stop_token_ids = (0,)

    def text(self, problem):
        return f"<{problem.prompt}>"

    def prompt_ids(self, problems):
        return [tuple(map(ord, problem.prompt)) for problem in problems]

    def decode(self, responses):
        return [str(ids[0]) for ids in responses]


class Pool:
    """Verdicts that are there at once, or whenever `later` is called."""

    def __init__(self, wait=False):
        self.wait, self.pending, self.items = wait, [], []

    def submit(self, item):
        self.items.append(item)
        future = Future()
        self.pending.append((future, Verdict(1.0 if int(item.response) % 2 else 0.5, "ok", "", item.response)))
        if not self.wait:
            self.later()
        return future

    def later(self):
        while self.pending:
            future, verdict = self.pending.pop(0)
            future.set_result(verdict)


def questions(samples=3, problems=PROBLEMS):
    return Questions.of(Benchmark("bench", "math", samples, problems, len(problems)), Words(), 10)


def evaluator(sampler, pool=None, seed=0, wrote=lambda sample: None):
    return Evaluator(VerifiedSampler(sampler, pool or Pool(), Words()), Sampling(max_tokens=4), seed, wrote)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_samples_say_what_happened(tmp_path):
    file, pool, heard = SampleFile(tmp_path / "bench.jsonl"), Pool(), []
    evaluator(Watched(), pool, wrote=heard.append).run(questions(), file)
    actual = {(sample.id, sample.sample): sample for sample in file.read()}
    assert set(actual) == {(f"p{i}", copy) for i in range(4) for copy in range(3)} and len(heard) == 12
    for (id, _), sample in actual.items():
        problem = PROBLEMS[int(id[1:])]
        assert (sample.prompt, sample.answer, sample.benchmark) == (f"<{problem.prompt}>", problem.answer, "bench")
        assert sample.correct == (int(sample.response) % 2 == 1) and sample.reward == (1.0 if sample.correct else 0.5)
        assert (sample.tokens, sample.finished, sample.extracted) == (1, True, sample.response)
    # A verifier reads the problem's own words, not the template's.
    assert {item.prompt for item in pool.items} == {problem.prompt for problem in PROBLEMS}


def test_long_prompts_first_and_no_call_larger_than_a_chunk(tmp_path):
    sampler = Watched()
    evaluator(sampler).run(questions(), SampleFile(tmp_path / "bench.jsonl"), chunk=5)
    lengths = [[len(prompt) for prompt in prompts] for prompts, _ in sampler.calls]
    assert lengths == [[5, 5, 5, 4, 4], [4, 2, 2, 2, 1], [1, 1]]


def test_seeds_are_of_the_response_alone(tmp_path):
    """Not of the chunk, nor of the other problems; they differ by response, benchmark and the evaluation's seed."""

    def seeds(name, seed=0, chunk=100, problems=PROBLEMS, benchmark="bench"):
        sampler, file = Watched(), SampleFile(tmp_path / f"{name}.jsonl")
        asked = Questions.of(Benchmark(benchmark, "math", 3, problems, len(problems)), Words(), 10)
        evaluator(sampler, seed=seed).run(asked, file, chunk)
        return {(sample.id, sample.sample): int(sample.response) for sample in file.read()}

    plain = seeds("plain")
    assert len(set(plain.values())) == 12
    assert seeds("chunks", chunk=2) == plain
    few = seeds("few", problems=PROBLEMS[2:])
    assert few == {key: plain[key] for key in few} and len(few) == 6
    for other in (seeds("seed", seed=1), seeds("name", benchmark="other")):
        assert not set(other.values()) & set(plain.values())


def test_written_while_others_are_generated(tmp_path):
    """The verdict is there: the line is there, before the next response is."""
    file = SampleFile(tmp_path / "bench.jsonl")

    written = []

    def between(number):
        wait_until(lambda: len(list(file.read())) == number)
        written.append(number)

    evaluator(Watched(between)).run(questions(), file)
    assert written == list(range(12))


def test_generation_does_not_wait_for_verdicts(tmp_path):
    """All responses arrive before the first verdict; the lines come with the verdicts."""
    file, pool = SampleFile(tmp_path / "bench.jsonl"), Pool(wait=True)

    def between(number):
        assert len(pool.pending) == number and not list(file.read())
        if number == 11:
            pool.wait = False

    evaluator(Watched(between), pool).run(questions(), file)
    assert len(list(file.read())) == 12


def in_order(file):
    return sorted(file.read(), key=lambda sample: (sample.id, sample.sample))


class Stop(BaseException):
    pass


def test_what_was_complete_is_written_and_the_rest_is_drawn_next_time(tmp_path):
    file, pool = SampleFile(tmp_path / "bench.jsonl"), Pool()

    def between(number):
        if number == 7:
            raise Stop

    with pytest.raises(Stop):
        evaluator(Watched(between), pool).run(questions(), file)
    first = list(file.read())
    assert len(first) == 7
    sampler = Watched()
    evaluator(sampler).run(questions(), file)
    assert sum(len(prompts) for prompts, _ in sampler.calls) == 5
    whole = SampleFile(tmp_path / "whole.jsonl")
    evaluator(Watched()).run(questions(), whole)
    assert in_order(file) == in_order(whole)
    sampler = Watched()
    evaluator(sampler).run(questions(), file)
    assert sampler.calls == []


def test_a_file_that_cannot_be_written_ends_it(tmp_path):
    file = SampleFile(tmp_path / "bench.jsonl")
    evaluator(Watched()).run(questions(samples=1), file)
    reached = []
    with file:
        file.append([])  # holds the lock, as another process would
        other = SampleFile(file.path)
        slow = Watched(lambda number: (time.sleep(0.05), reached.append(number)))
        with pytest.raises(DataError, match="another process is writing"):
            evaluator(slow).run(questions(samples=200), other)
    assert len(reached) < 20


def test_another_problem_under_the_same_id_is_refused(tmp_path):
    file = SampleFile(tmp_path / "bench.jsonl")
    evaluator(Watched()).run(questions(), file)
    changed = (*PROBLEMS[:3], Problem(id="p3", prompt="xxxx", answer="4", verifier="math"))
    with pytest.raises(DataError, match="answer of problem 'p3'"):
        evaluator(Watched()).run(questions(problems=changed), file)


def test_a_prompt_over_the_limit_is_refused():
    long = Problem(id="p", prompt="x" * 11, answer="1", where="file:3", verifier="math")
    with pytest.raises(DataError, match="file:3: the prompt has 11 tokens.*suite.max_prompt_tokens=10 .1 of 5"):
        questions(problems=(*PROBLEMS, long))


# Accuracy during training.


def test_accuracy_by_hand():
    """Three problems with two samples each: two, one and none of them right."""
    greedy = torch.tensor([True, False, False])
    correct = torch.tensor([[True, True], [False, True], [False, False]])
    assert accuracy(greedy, correct) == {"problems": 3, "greedy": 1 / 3, "pass@2": 2 / 3, "mean@2": 0.5}
    nothing = accuracy(greedy[:0], correct[:0])
    assert nothing == {"problems": 0, "greedy": 0.0, "pass@2": 0.0, "mean@2": 0.0}


class Numbers(Watched):
    """Responds with the copy's number, greedily with 7."""

    def sample(self, prompts, n, sampling, seeds, arrived, interrupted=None):
        self.calls.append((n, sampling.temperature, list(seeds)))
        token = 7 if sampling.temperature == 0 else 0
        groups = [[Rollout((token + copy,), (0.0,), True) for copy in range(n)] for _ in prompts]
        for index, group in enumerate(groups):
            for copy, rollout in enumerate(group):
                arrived(index, copy, rollout)
        return groups


def test_training_accuracy_does_not_depend_on_the_ranks():
    """Odd responses are right. Each rank samples its problems with their own seeds; levels keep their order."""
    problems = [replace(problem, level=f"level {i // 3}") for i, problem in enumerate(PROBLEMS)]
    examples = [Example(problem, (1,)) for problem in problems]
    config = RunConfig(eval=EvalConfig(samples=3))

    def evaluated(rank: int, size: int, gather) -> tuple[dict, Numbers]:
        model = Numbers()
        world = SimpleNamespace(rank=rank, size=size, is_main=rank == 0, gather=gather)
        return training_accuracy(config, examples, VerifiedSampler(model, Pool(), Words()), world), model

    alone, model = evaluated(0, 1, lambda value: [value])
    shares = {"greedy": 1.0, "pass@3": 1.0, "mean@3": 1 / 3}
    assert alone["all"] == {"problems": 4, **shares} and (alone["samples"], alone["temperature"]) == (3, 1.0)
    assert list(alone["levels"]) == ["level 0", "level 1"]
    assert [level["problems"] for level in alone["levels"].values()] == [3, 1]
    seeds = [stream_seed(0, "evaluation", i) for i in range(4)]
    assert model.calls == [(1, 0.0, seeds), (3, 1.0, seeds)]
    rows = [(1, True, [False, True, False]), (3, True, [False, True, False])]
    first, model = evaluated(0, 2, lambda value: [value, ((rows, Counter(), ""), None)])
    assert first == alone and model.calls[0][2] == seeds[::2]
