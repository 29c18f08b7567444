"""Rollouts that begin with tokens of a demonstration: a term's source selects tokens, and divisors count them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import algorithms
import upge
from tests.literal import trajectories
from tests.upge.test_users_parts import AdvantageKL
from upge.testing import batches
from upge.train.micro_batches import MicroBatch
from upge.train.packing import pack
from upge.train.sample import Trajectory, assemble


@dataclasses.dataclass(frozen=True)
class SumOfReference(upge.AdvantageEstimator):
    """The sum of the reference policy's log-probs over a response."""

    reads = frozenset({"reference_logprobs"})
    reach = "trajectory"

    def __call__(self, batch):
        return batch.reference_logprobs.sum(dim=1, keepdim=True).expand(batch.response_mask.shape)


def guided(*prefixes: int, **columns) -> upge.Trajectories:
    """Rollouts of one prompt, of 3 and 2 tokens, the first right; `prefixes` tokens of each are a demonstration's."""
    batch = trajectories([[0.5, 0.25, 0.5], [0.5, 0.5]], rewards=[1.0, 0.0], group=[0, 0], **columns)
    places = torch.arange(3).expand(2, 3)
    return dataclasses.replace(batch, is_demonstration_token=places < torch.tensor(prefixes)[:, None])


def term(source: str, advantage: upge.AdvantageEstimator, reduction: upge.Reduction, **more) -> upge.Term:
    estimator = upge.UnifiedGradient(upge.NoMask(), upge.CurrentPolicy(), advantage, upge.PolicyLikelihood())
    return upge.Term(source, upge.ConstantGate(), estimator, reduction, **more)


def mixed(of_rollouts: upge.Reduction, of_demonstrations: upge.Reduction, **more) -> upge.Algorithm:
    rl = term("rollouts", upge.GroupRelative(normalize_std=False), of_rollouts)
    return upge.Algorithm(
        "mixed", {"rl": rl, "sft": term("demonstrations", upge.ConstantAdvantage(), of_demonstrations)}, **more
    )


def test_the_tokens_of_demonstrations_are_those_of_expert_responses_unless_said_otherwise():
    batch = trajectories([[0.5, 0.5], [0.5]], demonstrations=[1])
    assert batch.is_demonstration_token.tolist() == [[False, False], [True, False]]
    again = dataclasses.replace(batch, is_demonstration_token=torch.tensor([[True, False], [False, True]]))
    assert again.is_demonstration_token.tolist() == [[True, False], [True, False]], "all of a demonstration's, no more"
    assert again.is_demonstration.tolist() == [False, True] and again.pass_rate[0] == 0
    assert batch.source_rows("demonstrations").tolist() == [False, True]
    assert again.source_rows("demonstrations").tolist() == [True, True]
    assert again.source_rows("rollouts").tolist() == [True, False]
    assert again.source_tokens("rollouts").tolist() == [[False, True], [False, False]]
    assert again.source_tokens("all").tolist() == [[True, True], [True, False]]
    for wrong, message in ((torch.ones(2, 2), "tensor of bools"), (torch.ones(2, dtype=torch.bool), "expected shape")):
        with pytest.raises(ValueError, match=f"^is_demonstration_token: expected .*{message.split()[-1]}"):
            dataclasses.replace(batch, is_demonstration_token=wrong)


@pytest.mark.parametrize(
    ("of_rollouts", "of_demonstrations", "rl", "sft"),
    [
        (upge.TokenMean(), upge.TokenMean(), [[0, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 0]], 1.0),
        (upge.TokenMean(over="batch"), upge.TokenMean(over="batch"), [[0, 1 / 5, 1 / 5], [1 / 5, 1 / 5, 0]], 1 / 5),
        (upge.SequenceMean(), upge.SequenceMean(), [[0, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 0]], 1.0),
        (
            upge.SequenceMean(over="batch"),
            upge.SequenceMean(over="batch", tokens="sum"),
            [[0, 1 / 6, 1 / 6], [1 / 4, 1 / 4, 0]],
            1 / 2,
        ),
        (upge.FixedLength(10), upge.FixedLength(10), [[0, 1 / 20, 1 / 20], [1 / 20, 1 / 20, 0]], 1 / 10),
        (
            upge.QuestionMean(over="term"),
            upge.QuestionMean(tokens="sum", over="term"),
            [[0, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 0]],
            1.0,
        ),
    ],
)
def test_reductions_count_the_tokens_of_the_source(of_rollouts, of_demonstrations, rl, sft):
    """By hand. The advantages are +½ and -½: the rollout that begins with a demonstration counts in the group."""
    batch, algorithm = guided(1, 0), mixed(of_rollouts, of_demonstrations)
    estimate = algorithm.estimate(batch)
    advantage = torch.tensor([[0.5], [-0.5]])
    expected = torch.tensor(rl, dtype=torch.float64) * advantage
    assert torch.allclose(estimate.terms["rl"].weights, expected, atol=1e-12)
    assert estimate.terms["sft"].weights.tolist() == [[pytest.approx(sft), 0, 0], [0, 0, 0]]
    assert estimate.metrics["rl/tokens"] == 4 and estimate.metrics["sft/tokens"] == 1
    assert algorithm.plan(batch).active.tolist() == [True, True]


def test_a_regularizer_applies_to_the_tokens_of_its_source_that_count_in_some_term():
    penalties = {s: upge.EntropyBonus(1.0, upge.TokenMean(), s) for s in ("rollouts", "demonstrations", "all")}
    batch = guided(2, 0, entropies=[[1.0, 10.0, 100.0], [1000.0, 10000.0]])
    algorithm = mixed(upge.TokenMean(), upge.TokenMean(), regularizers=penalties)
    actual = algorithm.estimate(batch).penalties
    assert actual == pytest.approx({"rollouts": -11100 / 3, "demonstrations": -11 / 2, "all": -11111 / 5})
    only_rollouts = dataclasses.replace(algorithm, terms={"rl": algorithm.terms["rl"]})
    actual = only_rollouts.estimate(batch).penalties
    assert actual == pytest.approx({"rollouts": -11100 / 3, "demonstrations": 0, "all": -11100 / 3})


def test_a_part_inside_a_regularizer_sees_the_tokens_of_the_source():
    """A sum of log-ratios to the reference policy, known before the forward pass, weights the penalty of each token."""
    penalty = AdvantageKL(1.0, upge.TokenMean(), advantage=SumOfReference())
    batch = guided(2, 0, p_reference=[[0.5, 0.5, 0.125], [0.5, 0.25]])
    batch = dataclasses.replace(batch, logprobs=batch.logprobs.requires_grad_())
    without = dataclasses.replace(batch, response_mask=batch.source_tokens("rollouts"), is_demonstration_token=None)
    rl = term("rollouts", upge.ConstantAdvantage(), upge.TokenMean())
    algorithm = upge.Algorithm("penalized", {"rl": rl}, regularizers={"penalty": penalty})
    actual, expected = algorithm.estimate(batch).penalties, algorithm.estimate(without).penalties
    assert actual["penalty"] > 0.1 and actual == pytest.approx(expected)


def test_advantages_of_guided_rollouts():
    """Two plain rollouts and two that continue a prefix, then a group without plain ones, by hand."""
    batch = trajectories(
        [[0.5, 0.5]] * 6 + [[0.5]], rewards=[1, 0, 1, 0.5, 1, 0, 1], group=[0] * 4 + [1, 1, 0], demonstrations=[6]
    )
    batch = dataclasses.replace(batch, is_guided=torch.tensor([False, False, True, True, True, True, False]))
    alike, plain = (upge.GuidedRelative(baseline)(batch)[:, 0].tolist() for baseline in ("alike", "plain"))
    assert alike == [0.5, -0.5, 0.25, -0.25, 0.5, -0.5, 0.5]
    assert plain == [0.25, -0.25, 0.25, 0, 0, 0, 0.25]
    ours = dataclasses.replace(batch, is_guided=None, is_demonstration_token=torch.eye(7, 2, dtype=torch.bool))
    assert ours.is_guided.tolist() == [True, True, False, False, False, False, False]


@pytest.mark.parametrize("prefix", [(0, 0, 3), (0, 0, 5)])
def test_a_penalty_on_length_counts_the_tokens_that_a_rollout_continues(prefix):
    """Responses of 4, 8 and 8 tokens, all right, under a limit of 8: each term sees the rewards 1, 1/2 and 1/2."""
    batch = trajectories(lengths=[4, 8, 8], rewards=[1, 1, 1], group=[0, 0, 0], p=[[0.5] * n for n in (4, 8, 8)])
    batch = dataclasses.replace(batch, is_demonstration_token=torch.arange(8) < torch.tensor(prefix)[:, None])
    shaped = upge.OverlongShaped(upge.GroupRelative(normalize_std=False), limit=8, buffer=0.5, penalty=0.5)
    terms = {s: term(s, shaped, upge.SequenceMean(tokens="sum")) for s in ("rollouts", "demonstrations")}
    plan = upge.Algorithm("mixed", terms).plan(batch)
    for one in plan.terms.values():
        assert one.estimator.advantage.values[:, 0].tolist() == pytest.approx([1 / 3, -1 / 6, -1 / 6])


def test_a_penalty_on_length_counts_a_hint_in_the_prompt():
    members = [Trajectory(0, 0, (5, 6, 7), (8, 9), 1.0, False, (-1.0, -1.0), hint_tokens=2)]
    members.append(Trajectory(0, 0, (5,), (8, 9), 1.0, False, (-1.0, -1.0)))
    shaped = upge.OverlongShaped(upge.GroupRelative(normalize_std=False), limit=4, buffer=0.5, penalty=1.0)
    batch = assemble(members, 0)
    assert shaped(batch)[:, 0].tolist() == shaped(batch.select(torch.tensor([0, 1])))[:, 0].tolist() == [-0.5, 0.5]


def test_a_mask_of_the_tokens_with_the_highest_entropies():
    """Of 5, 4 and 2 tokens the ⌊0.6·n⌋ lowest are masked, of equal ones the first."""
    entropies = [[3.0, 1.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0], [5.0, 4.0], []]
    batch = trajectories(lengths=[5, 4, 2, 0], entropies=entropies)
    actual = upge.HighEntropy(0.4)(batch, torch.ones(4, 5))
    assert actual.tolist() == [[1, 0, 0, 0, 1], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    for share in (0.1, 0.2, 0.3, 0.6, 0.7, 0.8, 0.9):
        batch = trajectories(lengths=[10], entropies=[list(range(10))])
        assert int(upge.HighEntropy(share)(batch, torch.ones(1, 10)).sum()) == round(10 * share)
    with pytest.raises(upge.ConfigError, match=r"HighEntropy.share: 0.0 must be above 0 and at most 1; 0.2 is"):
        upge.HighEntropy(0.0)


#: They learn from rollouts alone, and from every one of them.
OF_ROLLOUTS = [
    name
    for name in algorithms.names()
    if isinstance(one := algorithms.load(name), upge.Algorithm)
    and {*one.sources.values()} == {"rollouts"}
    and not one.supports
]


@pytest.mark.parametrize("name", OF_ROLLOUTS)
def test_an_algorithm_that_learns_from_rollouts_does_not_see_the_tokens_of_demonstrations(name):
    """As if the response began after them, whatever the reach of its parts: sequence ratios, returns, penalties."""
    algorithm, batch = algorithms.load(name), batches.guided(batches.random_batch(2))
    prefix = batch.is_demonstration_token & ~batch.is_demonstration[:, None]
    assert int(prefix.sum()) > 8
    without = dataclasses.replace(batch, response_mask=batch.response_mask & ~prefix)
    actual, expected = algorithm.estimate(batch), algorithm.estimate(without)
    assert bool((actual.weights != 0).any()) and torch.equal(actual.weights, expected.weights)
    assert float(actual.loss.detach()) == pytest.approx(float(expected.loss.detach()), abs=1e-12)


def test_assembled_columns_and_micro_batches_tell_prefixes_from_continuations():
    members = [
        Trajectory(0, 0, (5, 6), (7, 8, 9), 1.0, False, (-3.0,), prefix_tokens=2),
        Trajectory(0, 0, (5, 6, 7, 8), (9,), 1.0, False, (-4.0,), hint_tokens=2),
        Trajectory(0, 0, (5, 6), (7,), 0.0, False, (-5.0,)),
        Trajectory(0, 0, (5, 6), (7, 8), 1.0, True),
    ]
    assert [t.text_ids for t in members] == [(7, 8, 9), (7, 8, 9), (7,), (7, 8)]
    assert [t.guiding_tokens for t in members] == [2, 2, 0, 0]
    batch = assemble(members, 0)
    assert batch.is_demonstration_token.tolist() == [
        [True, True, False],
        [False, False, False],
        [False, False, False],
        [True, True, False],
    ]
    assert batch.sampler_logprobs.tolist() == [[0, 0, -3], [-4, 0, 0], [-5, 0, 0], [0, 0, 0]]
    packed = pack([t.ids for t in members])
    micro_batch = MicroBatch(batch, [0, 1, 2, 3], packed)
    ids, rows = packed.targets[micro_batch.of_rollouts].tolist(), packed.rows[micro_batch.of_rollouts].tolist()
    assert sorted(zip(rows, ids, strict=True)) == [(0, 9), (1, 9), (2, 7)], "what the sampler is compared on"
