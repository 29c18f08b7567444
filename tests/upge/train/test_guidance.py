"""Guided rollouts: the distributions of prefixes, and a step's trajectories, seeds, texts and ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random

import pytest

import upge
from tests.upge.train.test_collect import ALONE, Ranks, collector, term
from tests.upge.train.test_collect import FakeModel as Plain
from upge.data import Example, Problem
from upge.data.teacher import TeacherPrompts
from upge.errors import ConfigError
from upge.rollout import Rollout
from upge.train.metrics import rollout_metrics
from upge.train.sample import assemble

DEMONSTRATION = tuple(range(100, 110))


def guided(sources: tuple[str, ...] = ("rollouts", "demonstrations"), **settings) -> upge.Algorithm:
    """Half of each demonstration, for the second of two rollouts."""
    settings = {"length": upge.UniformPrefix(0.5, 0.5), "rollouts": 1} | settings
    return upge.Algorithm("test", {source: term(source) for source in sources}, guidance=upge.Guidance(**settings))


def examples(number: int, without: tuple[int, ...] = ()) -> list[Example]:
    """Prompt i is the token i; its demonstration has ten tokens."""
    problem = Problem("p", "1+1=?", "2", ("2",))
    return [Example(problem, (i,), () if i in without else (DEMONSTRATION,)) for i in range(number)]


@dataclass
class FakeModel(Plain):
    """A response is what it continues, as a number of tokens, and its seed; its text is all its tokens."""

    items: list[str] = field(default_factory=list)

    def sample(self, prompts, n, sampling, seeds, arrived, interrupted=None, prefixes=None):
        actual = [
            [
                Rollout((len((prefixes or {}).get((i, copy), ())), seeds[i] % 50 + copy), (-1.0, -2.0), True)
                for copy in range(n)
            ]
            for i in range(len(prompts))
        ]
        for i, group in enumerate(actual):
            for copy, rollout in enumerate(group):
                arrived(i, copy, rollout)
        return actual

    def decode(self, responses) -> list[str]:
        return [" ".join(map(str, response)) for response in responses]

    def submit(self, item):
        self.items.append(f"{item.response} | {item.tokens}")
        return super().submit(item._replace(response=str(int("100" in item.response))))


# Lengths.


def test_a_uniform_share_of_the_demonstration():
    cosine = upge.Schedule(0.8, 0.8, 0.2, decay=10)
    length, random = upge.UniformPrefix(cosine, 0.8), Random(0)
    drawn = {step: [length.tokens(100, step, random) for _ in range(4000)] for step in (0, 5, 10, 99)}
    assert set(drawn[0]) == {80} and (min(drawn[5]), min(drawn[10]), min(drawn[99])) == (50, 20, 20)
    assert {max(values) for values in drawn.values()} <= {79, 80}
    assert [upge.UniformPrefix(n / 100, n / 100).tokens(100, 0, random) for n in range(101)] == [*range(101)]
    assert sum(drawn[10]) / 4000 == pytest.approx(49.5, abs=1), "floor(100·u), u uniform in [0.2, 0.8]"


def test_a_binomial_number_of_chunks():
    length, random = upge.BinomialPrefix(5, 0.3), Random(0)
    counts = Counter(length.tokens(12, 0, random) for _ in range(20_000))
    assert set(counts) == {0, 2, 5, 7, 10, 12}, "12/5, 24/5, ... rounded"
    expected = {0: 0.16807, 2: 0.36015, 5: 0.3087, 7: 0.1323, 10: 0.02835, 12: 0.00243}
    assert {k: n / 20_000 for k, n in counts.items()} == pytest.approx(expected, abs=0.01)
    falling = upge.BinomialPrefix(5, upge.Schedule(1.0, 1.0, 0.0, decay=4))
    assert [falling.tokens(10, step, random) for step in (0, 4, 9)] == [10, 0, 0]


def test_a_prefix_leaves_a_token_of_the_demonstration_and_of_the_limit():
    whole = upge.Guidance(upge.UniformPrefix(1.0, 1.0), steps=3)
    assert whole.prefix(DEMONSTRATION, 100, 0, 7) == DEMONSTRATION[:9]
    assert whole.prefix(DEMONSTRATION, 4, 2, 7) == DEMONSTRATION[:3]
    assert whole.prefix(DEMONSTRATION, 1, 0, 7) == whole.prefix((1,), 9, 0, 7) == ()
    assert whole.prefix(DEMONSTRATION, 100, 3, 7) == (), "after its steps"
    wide = replace(whole, length=upge.UniformPrefix(0.0, 1.0))
    assert len({wide.prefix(DEMONSTRATION, 100, 0, seed) for seed in range(200)}) == 10
    assert wide.prefix(DEMONSTRATION, 100, 0, 3) == wide.prefix(DEMONSTRATION, 100, 0, 3)


def test_a_reader_is_told_what_is_sampled():
    rising, falling = upge.Schedule(0.0, 0.5, 1.0, warmup=3, decay=9), upge.Schedule(0.0, 0.9, 0.1)
    assert upge.Guidance(upge.UniformPrefix(falling), 1).describe() == (
        "one rollout of each prompt continues the beginning of a demonstration, in the response; its length: a uniform "
        "share of it between 0.9 → 0.1 and 0.95"
    )
    assert upge.Guidance(upge.BinomialPrefix(5, rising), 2, in_prompt=True, steps=7).describe() == (
        "2 rollouts of each prompt continue the beginning of a demonstration, at the end of the prompt, in the first 7 "
        "steps; its length: k of 5 equal parts, k binomial with probability 0 → 0.5 → 1"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: upge.UniformPrefix(0.5, 1.5), r"UniformPrefix.high: 1.5 must lie between 0 and 1"),
        (lambda: upge.UniformPrefix(0.5, 0.2), r"UniformPrefix: low=0.5, high=0.2; need low <= high"),
        (lambda: upge.BinomialPrefix(0), r"BinomialPrefix.chunks: 0 must be at least 1"),
        (
            lambda: upge.BinomialPrefix(5, upge.Schedule(2.0, 1.0, 0.0)),
            r"BinomialPrefix.probability: 2 must lie between",
        ),
        (lambda: guided(rollouts=0), r"Guidance.rollouts: 0 must be at least 1; null means all"),
        (lambda: guided(("demonstrations",)), "guidance guides rollouts, but no term's source is rollouts"),
        (lambda: guided(in_prompt=True), r"in_prompt=true, so terms.demonstrations.source=demonstrations has no tok"),
        (lambda: guided(("rollouts", "preference_pairs")), "does not go with terms.preference_pairs.source=pref"),
        (
            lambda: replace(guided(), critic=upge.ValueLoss(upge.GAE(), reduction=upge.TokenMean())),
            "guidance does not go with a critic",
        ),
        (lambda: replace(guided(), guidance=None, validation=guided()), "'test' has a `guidance` of its own"),
        (lambda: guided(rollouts=3).check(group_size=2), "algo.guidance.rollouts: 3 is more than the 2 rollouts"),
        (
            lambda: guided().check(group_size=2, demonstrations=0),
            r"algo.guidance: rollouts continue demonstrations, but the data set has none",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# A step's trajectories.


def test_a_guided_rollout_continues_a_demonstration_and_is_verified_as_a_whole():
    """Two rollouts of each prompt, of which the second continues half of the demonstration."""
    model = FakeModel()
    actual = collector(guided(), examples(8, without=(1,)), model).collect(0).trajectories
    assert [t.is_demonstration for t in actual] == [False, False] * 4, "no whole demonstrations"
    plain, continued = actual[::2], actual[1::2]
    for t in (*plain, *(t for t in continued if t.example == 1)):
        assert len(t.response_ids) == 2 and t.response_ids[0] == 0 and t.guiding_tokens == 0 and t.reward == 0
    continued = [t for t in continued if t.example != 1]
    assert len(continued) >= 3
    for t in continued:
        assert t.prompt_ids == (t.example,) and t.response_ids[:6] == (*DEMONSTRATION[:5], 5)
        assert (t.prefix_tokens, t.hint_tokens, t.reward, t.sampler_logprobs) == (5, 0, 1.0, (-1.0, -2.0))
        assert f"{' '.join(map(str, t.response_ids))} | 7" in model.items, "what the verifier reads"
    batch = assemble(actual, 0)
    assert batch.is_demonstration_token.sum(dim=1).tolist() == [t.prefix_tokens for t in actual]
    figures = rollout_metrics(actual)
    assert figures["guidance/share"] == len(continued) / 8 and figures["guidance/prefix_tokens"] == 5
    assert figures["guidance/pass_rate"] == 1 and figures["pass_rate"] == len(continued) / 8
    assert figures["entropy"] == 1.5 and figures["response_length"] == 2, "of sampled tokens only"
    assert "guidance/share" not in rollout_metrics(plain)


def test_a_hint_ends_the_prompt():
    model = FakeModel()
    algorithm, data = guided(("rollouts",), in_prompt=True), examples(8)

    class Template(TeacherPrompts):
        def __init__(self) -> None:
            pass

        def ids(self, example, feedback=()):
            return (77, *example.prompt_ids)

    for t in collector(algorithm, data, model, teacher_prompts=Template()).collect(0).trajectories[1::2]:
        assert t.prompt_ids == (t.example, *DEMONSTRATION[:5]) and t.response_ids[0] == 5 and len(t.response_ids) == 2
        assert (t.prefix_tokens, t.hint_tokens, t.reward) == (0, 5, 1.0)
        assert t.text_ids == DEMONSTRATION[:5] + t.response_ids and t.teacher_prompt_ids == (77, *t.prompt_ids)
        assert f"{' '.join(map(str, t.text_ids))} | 7" in model.items


def test_a_teacher_is_shown_a_right_response_with_its_hint():
    shown: list[tuple[int, ...]] = []

    class Template(TeacherPrompts):
        def __init__(self) -> None:
            pass

        def ids(self, example, feedback=()):
            shown.append(tuple(feedback))
            return example.prompt_ids

    algorithm = guided(("rollouts",), in_prompt=True, rollouts=None)
    collected = collector(algorithm, examples(8), FakeModel(), teacher_prompts=Template()).collect(0).trajectories
    assert all(t.passed for t in collected) and len(shown) == len(collected)
    assert {feedback[:5] for feedback in shown} == {DEMONSTRATION[:5]}


def test_prefixes_follow_the_step_and_not_the_number_of_ranks():
    algorithm = guided(length=upge.UniformPrefix(0.0, 0.9), rollouts=None)
    data = examples(24)

    def collected(step, world=ALONE, **more):
        return collector(algorithm, data, FakeModel(), world=world, prompts=8).collect(step, **more).trajectories

    alone = collected(3)
    ranks = Ranks(2)
    assert ranks.run(lambda world: collected(3, world)) == [alone, alone] and collected(3) == alone
    prefixes = {step: [t.prefix_tokens for t in collected(step)] for step in range(3)}
    assert all(values[::2] == values[1::2] for values in prefixes.values()), "one prefix per prompt"
    assert len({tuple(values) for values in prefixes.values()}) == 3
    ended = replace(algorithm, guidance=replace(algorithm.guidance, steps=2))
    at = collector(ended, data, FakeModel())
    assert any(t.prefix_tokens for t in at.collect(9, step_in_stage=1).trajectories), "the schedule is the stage's"
    assert not any(t.prefix_tokens for t in at.collect(9, step_in_stage=2).trajectories)


def test_prompts_that_are_redrawn_are_guided_as_well():
    """Those without a demonstration have no success here, so they are replaced."""
    algorithm = replace(guided(), sampling=upge.DynamicSampling(upge.PassRateBetween()))
    data = examples(12, without=(0, 1, 2, 3, 4, 5))
    collected = collector(algorithm, data, FakeModel(), prompts=6).collect(0)
    assert collected.metrics["sampling/prompts"] > 6 and len(collected.trajectories) == 12
    assert [t.prefix_tokens for t in collected.trajectories] == [0, 5] * 6


def test_answers_are_compared_with_the_hints_that_they_continue():
    """A response without an answer that is read counts as the text that the verifier reads."""
    actual = collector(guided(("rollouts",), in_prompt=True), examples(8), FakeModel()).collect(0).trajectories
    short = [replace(t, response_ids=(9,), sampler_logprobs=(-1.0,), extracted=None, hint_tokens=0) for t in actual]
    hinted = [replace(t, prompt_ids=(t.example, 50 + t.index), hint_tokens=1) for t in short]
    assert rollout_metrics(short)["same_answer_share"] == 1
    assert rollout_metrics(hinted)["same_answer_share"] == 1 / len(hinted)


def test_without_guidance_the_plain_rollouts_are_the_same():
    without = upge.Algorithm("test", {"rollouts": term("rollouts")})
    expected = collector(without, examples(8), FakeModel()).collect(2).trajectories[::2]
    actual = collector(guided(("rollouts",)), examples(8), FakeModel()).collect(2).trajectories[::2]
    assert [(t.prompt_ids, t.response_ids) for t in actual] == [(t.prompt_ids, t.response_ids) for t in expected]
