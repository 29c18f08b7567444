"""The conformance suite: every shipped part passes, and each rule catches a part or an algorithm made to break it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch

import upge
from upge.testing import ConformanceError, check_component, random_batch
from upge.views import UndeclaredColumn, masked_mean

RATIO = frozenset({"logprobs", "behavior_logprobs"})
SHIPPED = [
    upge.NoMask(),
    upge.PPOClip(),
    upge.PPOClip(low=1.0, high=0.28, dual=2.0),
    upge.SequenceClip(0.1, 0.1),
    upge.ImportanceBand(0.9, 1.1),
    upge.ImportanceBand(0.0, 1.1, of="sampler"),
    upge.LogRatioClip(0.2, 0.1),
    upge.SigmoidGate(1.0, 3.0),
    upge.HighEntropy(),
    upge.HighEntropy(0.6),
    upge.DivergenceClip(0.05, 0.1),
    upge.DivergenceClip(0.05, 0.1, "kl"),
    upge.OffPolicySequenceMask(0.1),
    upge.OffPolicySequenceMask(0.1, "sampler"),
    upge.AllOf((upge.PPOClip(), upge.SequenceClip(), upge.ImportanceBand(of="sampler"))),
    upge.CurrentPolicy(),
    upge.BehaviorPolicy(),
    upge.UnitDenominator(),
    upge.SequenceBehaviorPolicy(),
    upge.ClippedBehaviorPolicy(),
    upge.ClippedBehaviorPolicy(high=None, low=0.9),
    upge.GeometricMeanBehaviorPolicy(upge.GroupRelative(), 0.2, 0.1),
    upge.GeometricMeanBehaviorPolicy(upge.KLShaped(upge.LeaveOneOut())),
    upge.ClippedReferencePolicy(0.8, 1.2),
    upge.ClippedReferencePolicy(low=0.0),
    upge.SequenceReferencePolicy(),
    upge.SequenceReferencePolicy(1.0, 0.9, 1.2),
    upge.SamplerCorrected(upge.SequenceBehaviorPolicy()),
    upge.SamplerCorrected(upge.BehaviorPolicy(), cap=None),
    upge.SamplerCorrected(upge.BehaviorPolicy(), cap=1.1, level="sequence"),
    upge.SequenceSamplerBand(0.5, 1.5, "product"),
    upge.SequenceSamplerBand(0.0, 1.01, "geometric"),
    upge.OverlongShaped(upge.GroupRelative(), limit=6, buffer=0.5),
    upge.OverlongShaped(upge.KLShaped(upge.Whitened(upge.GAE())), limit=4),
    upge.OverlongShaped(upge.PairwisePreference(), limit=4),
    upge.MixedBehaviorPolicy(),
    upge.MixedBehaviorPolicy(1.0),
    upge.ConstantAdvantage(),
    upge.SignedReward(),
    upge.GroupRelative(),
    upge.GroupRelative(normalize_std=False, baseline="group"),
    upge.LeaveOneOut(),
    upge.MeanNormalized(),
    upge.GuidedRelative(),
    upge.GuidedRelative("plain"),
    upge.PromptBaseline(),
    *map(upge.OptimalTokenBaseline, ("reward", "zero")),
    upge.GroupClassification(),
    upge.FutureKLShaped(upge.GroupRelative()),
    upge.FutureKLShaped(upge.KLShaped(upge.GroupRelative()), 2.0, 0.5, 4.0, None, None),
    upge.KLShaped(upge.GroupRelative(), towards="behavior"),
    upge.GAE(),
    upge.GAE(discount=0.9, lam=0.0),
    upge.GAE(reward=upge.KLPenalizedReward(upge.OutcomeReward(), 0.1)),
    upge.ReturnToGo(),
    upge.ReturnToGo(0.9, upge.KLPenalizedReward(upge.OutcomeReward(), 0.1, "k3")),
    upge.OutcomeReward(),
    *(upge.KLPenalizedReward(upge.OutcomeReward(), 0.1, kind) for kind in ("k1", "k2", "k3")),
    upge.Whitened(upge.GroupRelative()),
    upge.Whitened(upge.GAE()),
    upge.Whitened(upge.PromptBaseline(), over="rollouts"),
    upge.Whitened(upge.ReturnToGo(), over="rollouts"),
    upge.OfReward("format", upge.GroupRelative()),
    upge.OfReward("another", upge.GroupClassification()),
    upge.Summed((upge.GroupRelative(), upge.OfReward("format", upge.KLShaped(upge.LeaveOneOut()))), (1.0, -0.5)),
    upge.RewardDecoupled(upge.GroupRelative()),
    upge.RewardDecoupled(upge.KLShaped(upge.SignedReward())),
    upge.RewardDecoupled(upge.OverlongShaped(upge.GroupRelative(), limit=6, buffer=0.5)),
    upge.Tempered(upge.GroupRelative(normalize_std=False), 1.0),
    upge.Tempered(upge.KLShaped(upge.ReturnToGo())),
    upge.Shifted(upge.GroupRelative(normalize_std=False), -0.1),
    upge.PairwisePreference(),
    upge.KLShaped(upge.GroupRelative()),
    upge.KLShaped(upge.PairwisePreference()),
    *(upge.KLShaped(upge.SignedReward(), kind=kind, future=True) for kind in ("k1", "k2", "k3")),
    *(part(target=target) for part in (upge.LogRatio, upge.TargetProbability) for target in ("teacher", "reference")),
    upge.JensenShannon(0.1),
    upge.PrefixWeighted(upge.LogRatio()),
    *(upge.SiblingSucceeded(only_failed=failed) for failed in (True, False)),
    upge.Surprisal(),
    upge.CovarianceClip(),
    upge.TopCovariance(upge.GroupRelative()),
    upge.TopEntropy(),
    upge.RatioSign(),
    upge.SampledTarget(),
    upge.EntropyLikelihood(),
    upge.EntropyLikelihood(k=5, power=0.0),
    upge.TiltedReference(),
    upge.TiltedReference(0.0),
    upge.PolicyLikelihood(),
    upge.ShapedLikelihood(),
    upge.ShapedRatio(),
    upge.PowerLikelihood(1.0, 1.0),
    upge.PowerLikelihood(0.0, 0.5),
    upge.GammaLikelihood(),
    upge.ConstantGate(0.5),
    upge.PassRateAbove(0.5),
    upge.PassRateAtMost(0.5),
    upge.PassRateBetween(0.0, 1.0),
    upge.Complement(upge.PassRateBetween()),
    *(upge.MetaGradient(), upge.NoiseBalanced()),
    upge.Complement(upge.MetaGradient()),
    upge.PassRateTable((0.0, 0.5, 1.0), (1.0, 0.5, 0.0)),
    upge.PassRateTable((0.0, 0.5), (1.0, 0.5), step=True),
    upge.EntropyWeight(),
    upge.Finished(),
    upge.Replayed(),
    upge.Schedule(warmup=2),
    upge.ProductOf((upge.PassRateAbove(), upge.EntropyWeight(), upge.Schedule())),
    upge.TokenMean(),
    upge.SequenceMean(),
    upge.SequenceMean(tokens="sum"),
    upge.FixedLength(16),
    upge.QuestionMean(),
    upge.QuestionMean(tokens="fixed", length=16),
    upge.QuestionMean(within="kind"),
    upge.QuestionMean(within="none"),
    upge.EntropyBonus(0.1, upge.TokenMean()),
    upge.ValueLoss(upge.GAE()),
    *(upge.KLPenalty(0.1, upge.TokenMean(), kind=kind) for kind in ("k1", "k2", "k3")),
    upge.KLPenalty(0.1, upge.TokenMean(), importance=True),
    upge.DivergencePenalty(0.1, upge.TokenMean(), upge.JensenShannon(0.3, "reference"), upge.TopK(3)),
]


@pytest.mark.parametrize("part", SHIPPED, ids=lambda part: type(part).__name__)
def test_shipped_part_conforms(part):
    assert check_component(part) is None


def test_the_table_holds_every_shipped_part():
    """Every part that is exported; and all that the package has are exported, but for what it makes itself."""
    public = [getattr(upge, name) for name in upge.__all__ if inspect.isclass(getattr(upge, name))]
    concrete = {c for c in public if issubclass(c, upge.Component) and not inspect.isabstract(c)}
    assert {type(part) for part in SHIPPED} == concrete
    parts = {c for c in descendants(upge.Component) if c.__module__.startswith("upge.") and not inspect.isabstract(c)}
    assert {c.__name__ for c in parts - concrete} == {"EachGroup", "Precomputed"}


def descendants(cls: type) -> set[type]:
    return set(cls.__subclasses__()).union(*map(descendants, cls.__subclasses__()))


def test_the_batch_is_a_hard_case():
    """Else a part could conform by luck."""
    batch = random_batch()
    assert set(batch.lengths.tolist()) >= {0, 7} and batch.logprobs.requires_grad and batch.entropies.requires_grad
    assert {0.0, 1.0} <= set(batch.pass_rate.tolist()) and len(set(batch.pass_rate.tolist())) > 2
    assert float(batch.log_importance_ratio.abs().max()) > 0.2


# Parts made to break one rule each. The bodies are lambdas (batch, advantages) → value.


def mask_of(body, reads=RATIO, reach="token") -> upge.StabilizationMask:
    """A mask with the given body and declarations."""

    class Broken(upge.StabilizationMask):
        def __call__(self, batch, advantages):
            return body(batch, advantages)

    Broken.reads, Broken.reach, Broken.counts_demonstrations = frozenset(reads), reach, True
    return Broken()


def advantage_of(body, reads=RATIO, reach="token") -> upge.AdvantageEstimator:
    """An advantage with the given body and declarations."""

    class Broken(upge.AdvantageEstimator):
        def __call__(self, batch):
            return body(batch)

    Broken.reads, Broken.reach, Broken.counts_demonstrations = frozenset(reads), reach, True
    return Broken()


def gate_of(body, reads=RATIO, reach="token") -> upge.Gate:
    """A gate with the given body and declarations."""

    class Broken(upge.Gate):
        def __call__(self, batch):
            return body(batch)

    Broken.reads, Broken.reach, Broken.counts_demonstrations = frozenset(reads), reach, True
    return Broken()


def group_mean(batch) -> torch.Tensor:
    """[B, 1] sum of the current log-probs over a group."""
    same = (batch.group[:, None] == batch.group).double()
    return same @ batch.logprobs.detach().double().sum(dim=1, keepdim=True)


def drifting():
    """A body that counts its calls."""
    calls = []

    def body(batch):
        calls.append(1)
        return batch.logprobs.detach() * len(calls)

    return body


def scribbling(batch):
    batch.logprobs.data.clamp_(min=-0.5)
    return batch.logprobs.detach()


BROKEN = {
    "lets a gradient through": advantage_of(lambda b: b.logprobs * 2),
    "depends on the padding": advantage_of(
        lambda b: b.logprobs.detach() / b.response_mask.shape[1], reach="trajectory"
    ),
    "depends on the order of the trajectories": gate_of(
        lambda b: torch.arange(len(b.response_mask)).double(), reads={"rewards"}
    ),
    "values outside [0, 1]": mask_of(lambda b, a: b.log_importance_ratio.exp()),
    "changes the batch in place (logprobs)": advantage_of(scribbling),
    "gives another value when called again": advantage_of(drifting()),
    "returns shape [20], expected [20, 7]": advantage_of(lambda b: b.rewards, reads={"rewards"}),
    "returns shape [20, 7], expected [20]": gate_of(lambda b: b.logprobs.detach()),
    "returns a float; it must return a tensor": advantage_of(lambda b: 1.0),
    "NaN or infinity": advantage_of(lambda b: torch.log(b.log_importance_ratio)),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_rule_catches_the_part_that_breaks_it(rule):
    with pytest.raises(ConformanceError) as caught:
        check_component(BROKEN[rule])
    assert rule in str(caught.value) and str(caught.value).startswith("Broken")


@pytest.mark.parametrize(
    ("part", "column"),
    [
        (advantage_of(lambda b: b.values.detach()), "values"),
        (advantage_of(lambda b: b.log_sampler_ratio), "sampler_logprobs"),
        (gate_of(lambda b: b.pass_rate, reads={"rewards", "group"}), "is_demonstration"),
        (mask_of(lambda b, a: (b.log_importance_ratio < 0).double(), reads={"logprobs"}), "behavior_logprobs"),
    ],
)
def test_an_undeclared_column_is_named(part, column):
    with pytest.raises(UndeclaredColumn, match=f"Broken reads the column '{column}' without declaring it; add"):
        check_component(part)


NEEDS_TRAJECTORY = {
    "mean over the response": lambda b: masked_mean(b.logprobs.detach(), b.response_mask).expand(b.logprobs.shape),
    "sum up to the token": lambda b: b.logprobs.detach().cumsum(dim=-1),
    "the first token": lambda b: (b.response_mask.cumsum(dim=-1) == 1) * b.logprobs.detach(),
    "the response's length": lambda b: b.logprobs.detach() / b.response_mask.sum(dim=-1, keepdim=True).clamp(min=1),
}


@pytest.mark.parametrize("name", NEEDS_TRAJECTORY)
def test_a_part_that_looks_along_the_response_must_say_so(name):
    body = NEEDS_TRAJECTORY[name]
    with pytest.raises(ConformanceError, match="declares reach 'token' but depends on more; declare a wider `reach`"):
        check_component(advantage_of(body))
    assert check_component(advantage_of(body, reach="trajectory")) is None


NEIGHBOURS = {
    "the next place": lambda b: torch.nn.functional.pad(b.logprobs.detach()[..., 1:], (0, 1)),
    "the first place": lambda b: b.logprobs.detach() * b.logprobs.detach()[..., :1],
    "the place itself": lambda b: b.logprobs.detach() * torch.arange(b.logprobs.shape[-1]),
    "places before it": lambda b: b.logprobs.detach() * (~b.response_mask).cumsum(dim=-1),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_part_that_counts_places_instead_of_tokens_is_caught(name):
    """In a response with places that do not count, what a tool answered for example, the neighbour is not the token
    before."""
    with pytest.raises(ConformanceError, match="Broken depends on places outside the response mask; skip them"):
        check_component(advantage_of(NEIGHBOURS[name], reach="trajectory"))


def test_a_part_that_looks_across_the_group_must_say_so():
    def body(batch, advantages=None):
        return (group_mean(batch) / 100).sigmoid().expand(batch.logprobs.shape)

    reads = {"logprobs", "group"}
    for make in (mask_of, advantage_of):
        for reach in ("token", "trajectory"):
            with pytest.raises(ConformanceError, match=f"declares reach '{reach}' but depends on more"):
                check_component(make(body, reads, reach))
        assert check_component(make(body, reads, "group")) is None


def test_a_mask_reaches_as_far_as_it_looks_even_without_log_probs():
    """A mask stays live because the advantages may be: what it reads of the group must be there in a micro-batch."""

    def body(batch, advantages):
        best = (batch.group[:, None] == batch.group).double() @ batch.rewards
        return (best > 1).double()[:, None].expand(advantages.shape)

    reads = {"group", "rewards"}
    with pytest.raises(ConformanceError, match="declares reach 'trajectory' but depends on more"):
        check_component(mask_of(body, reads, "trajectory"))
    assert check_component(mask_of(body, reads, "group")) is None


def test_a_gate_on_current_log_probs_across_the_group_must_say_so():
    reads = {"logprobs", "group"}
    with pytest.raises(ConformanceError, match="declares reach 'trajectory' but depends on more"):
        check_component(gate_of(lambda b: group_mean(b)[:, 0], reads))
    assert check_component(gate_of(lambda b: group_mean(b)[:, 0], reads, "group")) is None


def test_a_wrapper_that_looks_along_the_response_must_say_so():
    @dataclass(frozen=True)
    class Smoothed(upge.AdvantageEstimator):
        advantage: upge.AdvantageEstimator
        reads = frozenset({"logprobs"})

        def __call__(self, batch):
            return self.advantage(batch) * masked_mean(batch.logprobs.detach(), batch.response_mask)

    with pytest.raises(ConformanceError, match="Smoothed declares reach 'token' but depends on more"):
        check_component(Smoothed(upge.GroupRelative()))


def test_a_token_part_must_work_on_packed_tokens():
    """One that is token by token in value, but written for [B, T] alone."""
    rows = advantage_of(lambda b: b.logprobs.detach()[:, :])
    with pytest.raises(ConformanceError, match="has reach 'token' but fails on packed tokens .* declare reach"):
        check_component(rows)
    rewarded = advantage_of(lambda b: b.rewards[:, None] * b.logprobs.detach(), reads={"logprobs", "rewards"})
    with pytest.raises(ConformanceError, match="fails on packed tokens"):
        check_component(rewarded)
    other = advantage_of(lambda b: b.logprobs.detach() * b.logprobs.ndim)
    with pytest.raises(ConformanceError, match="gives another value on packed tokens"):
        check_component(other)


def test_what_is_known_before_the_forward_pass_may_look_anywhere():
    """It is computed once on the whole batch, so its reach does not matter."""
    assert check_component(advantage_of(lambda b: b.values.detach().cumsum(dim=1), reads={"values"})) is None


# Declarations are checked when a part is made.


def test_a_part_without_reads_is_told_how_to_declare_them():
    class Plain(upge.StabilizationMask):
        def __call__(self, batch, advantages):
            return torch.ones_like(advantages)

    @dataclass(frozen=True)
    class Settled(Plain):
        level: float = 1.0

    for part in (Plain, Settled):
        with pytest.raises(TypeError, match=r"does not say which columns it reads; add `reads = frozenset\({...}\)`"):
            part()


def test_a_part_that_takes_the_advantages_is_told_to_say_so():
    @dataclass(frozen=True)
    class Silent(upge.LikelihoodGradient):
        reads = frozenset({"logprobs"})

        def __call__(self, batch, advantages):
            return batch.logprobs.detach() * (advantages < 0)

    with pytest.raises(ConformanceError, match=r"Silent is called with \(batch\).*set `sees_advantages = True`"):
        check_component(Silent())
    with pytest.raises(TypeError, match="reads names unknown columns .'logprob'.; did you mean 'logprobs'"):
        advantage_of(lambda b: b.logprobs.detach(), reads={"logprob"})


@pytest.mark.parametrize(
    ("declared", "fragment"),
    [
        ({"reads": {"logprob"}}, r"reads names unknown columns \['logprob'\]"),
        ({"reach": "step"}, r"reach is 'step'; it must be one of \('token', 'trajectory', 'group', 'batch'\)"),
    ],
)
def test_wrong_declarations_are_refused(declared, fragment):
    with pytest.raises(TypeError, match=fragment):
        advantage_of(lambda b: b.logprobs.detach(), **declared)
