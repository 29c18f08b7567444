"""Accuracy during training from a fake model: by hand, and the same on any number of ranks."""

from __future__ import annotations

import dataclasses

import pytest

from tests.upge.train.test_collect import ALONE, FakeModel, Ranks, examples
from upge.config import from_tree
from upge.evaluation.evaluator import training_accuracy
from upge.rollout import Sampling
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.config import RunConfig

#: Of prompts 0 to 6, the model solves 0, 3 and 6 always, 1 and 4 never, 2 and 5 in the first and third of 3 responses.
PROBLEMS = [
    dataclasses.replace(e, problem=dataclasses.replace(e.problem, level="low" if i < 3 else "high"))
    for i, e in enumerate(examples(7))
]


class Recorded(FakeModel):
    """Keeps what it was asked: (responses a prompt, sampling) of each call, and the seed of each prompt in it."""

    stop_token_ids = (9,)

    def sample(self, prompts, n, sampling, seeds, arrived, interrupted=None):
        asked = {prompt[0]: seed for prompt, seed in zip(prompts, seeds, strict=True)}
        self.calls = [*getattr(self, "calls", []), (n, sampling, asked)]
        return super().sample(prompts, n, sampling, seeds, arrived)


def measured(samples: int, world=ALONE, seed: int = 0) -> tuple[dict, Recorded]:
    """The evaluation of one rank, and the model that it asked."""
    model = Recorded()
    settings = {"samples": samples, "temperature": 0.6, "top_p": 0.9}
    config = from_tree(
        RunConfig, {"seed": seed, "eval": settings, "rollout": {"temperature": 1.3, "max_response_tokens": 44}}
    )
    return training_accuracy(config, PROBLEMS, VerifiedSampler(model, model, model), world), model


@pytest.mark.parametrize(("samples", "partly"), [(1, 1), (2, 1 / 2), (3, 2 / 3), (8, 1 / 2)])
def test_figures_by_hand(samples, partly):
    """mean@k counts all k responses and divides by k."""
    actual, _ = measured(samples)
    assert set(actual["levels"]) == {"low", "high"} and actual["samples"] == samples and actual["temperature"] == 0.6
    expected = {"all": (7, 5, 3 + 2 * partly), "low": (3, 2, 1 + partly), "high": (4, 3, 2 + partly)}
    for name, (problems, solved, mean) in expected.items():
        figures = actual["all"] if name == "all" else actual["levels"][name]
        assert figures == pytest.approx(
            {
                "problems": problems,
                "greedy": solved / problems,
                f"pass@{samples}": solved / problems,
                f"mean@{samples}": mean / problems,
            }
        )


def test_responses_are_sampled_as_the_evaluation_says():
    """One greedy response, then as many as asked at the evaluation's temperature and nucleus."""
    _, model = measured(3)
    limits = {"max_tokens": 44, "stop_token_ids": (9,)}
    (one, greedy, _), (three, sampled, _) = model.calls
    assert (one, greedy) == (1, Sampling(temperature=0.0, **limits))
    assert (three, sampled) == (3, Sampling(temperature=0.6, top_p=0.9, **limits))


@pytest.mark.parametrize("size", [2, 3, 9])
def test_seeds_and_figures_do_not_depend_on_the_ranks(size):
    """Also where there are fewer problems than ranks: every problem has the seed that it has in one process."""
    alone, model = measured(3)
    parts = Ranks(size).run(lambda world: measured(3, world))
    for call in (0, 1):
        own = [asked.calls[call][2] for _, asked in parts]
        assert sum(map(len, own)) == 7
        assert {prompt: seed for seeds in own for prompt, seed in seeds.items()} == model.calls[call][2]
    assert all(actual == alone for actual, _ in parts)


def test_seeds_are_the_problems_own_and_follow_the_runs():
    first, second = (measured(2, seed=seed)[1].calls[1][2] for seed in (0, 1))
    assert len({*first.values(), *second.values()}) == 14
