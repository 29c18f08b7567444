"""Terms that move other tokens than the sampled one, against autograd through the written objective on full logits."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import upge
from upge.testing.batches import random_batch
from upge.views import Distributions

V = 7


def batch_with_distributions(seed: int = 0) -> tuple[upge.Trajectories, torch.Tensor]:
    """A random batch whose log-probs are those of random logits [B, T, V], which are returned with it."""
    batch = random_batch(seed, pairs=False)
    g = torch.Generator().manual_seed(seed)
    shape = (*batch.response_mask.shape, V)
    logits, reference, teacher = (2 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
    tokens = torch.randint(0, V, shape[:2], generator=g)
    logits.requires_grad_()
    policy = logits.log_softmax(-1)
    given = Distributions(tokens, policy, reference.log_softmax(-1), teacher.log_softmax(-1))
    sampled = [one.gather(-1, tokens[..., None])[..., 0] for one in given[1:]]
    columns = dict(zip(("logprobs", "reference_logprobs", "teacher_logprobs"), sampled, strict=True))
    entropies = -(policy.exp() * policy).sum(-1)
    behavior = columns["logprobs"].detach() + 0.1 * torch.randn(shape[:2], generator=g, dtype=torch.float64)
    columns |= {"entropies": entropies, "behavior_logprobs": behavior.clamp(max=0)}
    return dataclasses.replace(batch, **columns, distributions=given), logits


def term(advantage, support, denominator=None, source="rollouts", gate=None) -> upge.Term:
    estimator = upge.UnifiedGradient(upge.NoMask(), denominator or upge.UnitDenominator(), advantage)
    gate = gate or upge.PassRateAtMost(0.6)
    return upge.Term(source, gate, estimator, upge.QuestionMean(), 0.7, support)


def gradient(objective: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    (slope,) = torch.autograd.grad(objective, logits, retain_graph=True)
    return slope


def textbook(batch: upge.Trajectories, one: upge.Term, per_token: torch.Tensor) -> torch.Tensor:
    """Σ coefficient·gate·w·per_token, an objective to be maximized."""
    rows = one.active(batch)
    gate = one.gate(one.gate.view(batch)) * rows
    w = one.reduction(one.reduction.view(batch), rows)
    weights = (one.coefficient * gate[:, None] * w).detach()
    return torch.where(weights == 0, 0.0, weights * per_token).sum()


def reverse_kl(policy, target, tokens):
    return -(policy.exp() * (policy - target)).sum(-1)


def forward_kl(policy, target, tokens):
    return -(target.exp() * (target - policy)).sum(-1)


def jsd(policy, target, tokens, beta=0.3):
    mixture = (beta * target.exp() + (1 - beta) * policy.exp()).log()
    of_target = (target.exp() * (target - mixture)).sum(-1)
    return -(beta * of_target + (1 - beta) * (policy.exp() * (policy - mixture)).sum(-1))


def entropy(policy, target, tokens):
    return -(policy.exp() * policy).sum(-1)


def tilted(policy, target, tokens, beta=1.5):
    """The cross-entropy of the reference policy with the sampled token's log-odds raised."""
    raised = target + beta * torch.nn.functional.one_hot(tokens, V)
    return (raised.softmax(-1) * policy).sum(-1)


CASES = {
    "reverse KL to the teacher": (upge.LogRatio(), None, "teacher", reverse_kl),
    "reverse KL to the reference": (upge.LogRatio("reference"), None, "reference", reverse_kl),
    "forward KL": (upge.TargetProbability(), upge.CurrentPolicy(), "teacher", forward_kl),
    "generalized JSD": (upge.JensenShannon(0.3), None, "teacher", jsd),
    "entropy": (upge.Surprisal(), None, "teacher", entropy),
    "tilted reference": (upge.TiltedReference(1.5), upge.CurrentPolicy(), "reference", tilted),
}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("case", CASES)
def test_full_vocabulary_is_the_gradient_of_the_divergence(case, temperature):
    advantage, denominator, target, objective = CASES[case]
    batch, logits = batch_with_distributions()
    one = term(advantage, upge.FullVocabulary(temperature), denominator)
    loss = upge.Algorithm("test", {"one": one}).estimate(batch).loss
    given = batch.distributions
    policy = (logits / temperature).log_softmax(-1)
    other = (getattr(given, target) / temperature).log_softmax(-1)
    expected = textbook(batch, one, objective(policy, other, given.tokens))
    torch.testing.assert_close(gradient(-loss, logits), gradient(expected, logits), rtol=1e-10, atol=1e-13)
    assert gradient(expected, logits).abs().max() > 1e-3


@pytest.mark.parametrize("of", ["policy", "teacher"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_is_the_gradient_of_the_divergence_of_measures(of, temperature):
    batch, logits = batch_with_distributions(1)
    one = term(upge.LogRatio(), upge.TopK(3, of, temperature))
    loss = upge.Algorithm("test", {"one": one}).estimate(batch).loss
    policy = (logits / temperature).log_softmax(-1)
    target = (batch.distributions.teacher / temperature).log_softmax(-1)
    chosen = (policy if of == "policy" else target).detach().topk(3).indices
    p, q = policy.gather(-1, chosen), target.gather(-1, chosen)
    expected = textbook(batch, one, -(p.exp() * (p - q) - p.exp() + q.exp()).sum(-1))
    torch.testing.assert_close(gradient(-loss, logits), gradient(expected, logits), rtol=1e-10, atol=1e-13)


def test_top_k_of_the_whole_vocabulary_is_the_whole_vocabulary():
    batch, logits = batch_with_distributions(2)
    gradients = []
    for support in (upge.TopK(V), upge.TopK(10 * V, "teacher"), upge.FullVocabulary()):
        loss = upge.Algorithm("test", {"one": term(upge.JensenShannon(), support)}).estimate(batch).loss
        gradients.append(gradient(loss, logits))
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-12, atol=1e-15)


def test_the_expected_gradient_of_the_sampled_token_is_that_of_the_whole_vocabulary():
    batch, logits = batch_with_distributions(3)
    sampled = upge.Algorithm("test", {"one": term(upge.LogRatio(), upge.SampledToken(), upge.CurrentPolicy())})
    whole = upge.Algorithm("test", {"one": term(upge.LogRatio(), upge.FullVocabulary())})
    given, total = batch.distributions, 0.0
    for token in range(V):
        names = ("logprobs", "reference_logprobs", "teacher_logprobs")
        columns = {name: one[..., token] for name, one in zip(names, given[1:], strict=True)}
        estimate = sampled.plan(batch).estimate(dataclasses.replace(batch, **columns))
        weights = estimate.weights * columns["logprobs"].detach().exp()  # the probability that it is sampled
        total = total + gradient((weights * columns["logprobs"]).sum(), logits)
    torch.testing.assert_close(total, gradient(-whole.estimate(batch).loss, logits), rtol=1e-10, atol=1e-13)


def test_a_term_on_the_vocabulary_beside_one_on_the_sampled_token():
    batch, logits = batch_with_distributions(4)
    terms = {
        "distill": term(upge.JensenShannon(), upge.FullVocabulary()),
        "rl": term(upge.GroupRelative(), upge.SampledToken(), upge.BehaviorPolicy(), gate=upge.ConstantGate()),
    }
    plan = upge.Algorithm("test", terms).plan(batch)
    both = gradient(plan.estimate(batch).loss, logits)
    alone = [gradient(plan.alone(name).estimate(batch).loss, logits) for name in terms]
    assert all(one.abs().max() > 1e-3 for one in alone)
    torch.testing.assert_close(both, alone[0] + alone[1], rtol=1e-12, atol=1e-15)


def test_precomputed_parts_are_constant_over_the_vocabulary():
    batch, logits = batch_with_distributions(5)
    product = upge.Shifted(upge.GroupRelative(), 0.0)
    loss = upge.Algorithm("test", {"one": term(product, upge.FullVocabulary())}).estimate(batch).loss
    assert gradient(loss, logits).abs().max() < 1e-14, "Σ_v Â ∇π(v) = 0 for an advantage that is equal for all v"


@dataclasses.dataclass(frozen=True)
class Columns(upge.AdvantageEstimator):
    """A sum of columns with one number per token, and of the candidate's log-prob."""

    reads: ClassVar[frozenset[str]] = frozenset(
        {"logprobs", "values", "entropies", "score_norms", "is_demonstration_token"}
    )

    def __call__(self, batch):
        known = batch.values + batch.entropies.detach() + batch.score_norms
        return batch.logprobs.detach() + known * (1.0 + batch.is_demonstration_token)


def test_every_column_with_one_number_per_token_is_known_on_a_support():
    batch, _ = batch_with_distributions()
    algorithm = upge.Algorithm("columns", {"one": term(Columns(), upge.FullVocabulary(), source="all")})
    estimate = algorithm.estimate(batch)
    own = batch.response_mask
    total = (batch.values + batch.entropies + batch.score_norms) * (1 + batch.is_demonstration_token.double())
    expected = (-batch.entropies + total)[own]
    weighted = estimate.terms["one"].gate * estimate.terms["one"].reduction != 0
    advantages = estimate.terms["one"].advantages
    torch.testing.assert_close(advantages[weighted], expected.detach()[weighted[own]], check_dtype=False)


def test_the_entropy_of_the_likeliest_tokens():
    """Of ½, ¼, ⅛ and ⅛ the two likeliest are ⅔ and ⅓; a policy that is certain leaves no weight and no NaN."""
    p = torch.tensor([[0.5, 0.125, 0.25, 0.125], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    view = SimpleNamespace(logprobs=p.log())
    entropy = math.log(3) - 2 / 3 * math.log(2)
    for part, weight in (
        (upge.EntropyLikelihood(2), entropy / 3),
        (upge.EntropyLikelihood(2, scale=1.0, power=2.0), entropy**2),
        (upge.EntropyLikelihood(), 1.75 * math.log(2) / 3),
    ):
        actual = part(view).exp()
        assert actual.shape == p.shape and torch.allclose(actual[0], torch.tensor(weight, dtype=p.dtype))
        assert float(actual[1].max()) < 1e-300


def test_the_sampled_token_alone_as_a_target_is_maximum_likelihood():
    batch, logits = batch_with_distributions(6)
    tilted_far = term(upge.TiltedReference(200.0), upge.FullVocabulary(), upge.CurrentPolicy(), "demonstrations")
    sft = term(upge.ConstantAdvantage(), upge.SampledToken(), upge.CurrentPolicy(), "demonstrations")
    gradients = [gradient(upge.Algorithm("test", {"one": t}).estimate(batch).loss, logits) for t in (tilted_far, sft)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("seed", [0, 1])
def test_micro_batches_add_up(seed):
    batch, logits = batch_with_distributions(seed)
    algorithm = upge.Algorithm("test", {"one": term(upge.JensenShannon(), upge.TopK(4, "teacher"))})
    plan = algorithm.plan(batch)
    whole = gradient(algorithm.estimate(batch).loss, logits)
    parts = torch.zeros_like(whole)
    for rows in torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed)).split(3):
        width = batch.select(rows).response_mask.shape[1]
        columns = {
            "entropies": batch.entropies[rows, :width],
            "distributions": batch.distributions.at(rows, slice(width)),
        }
        parts += gradient(plan.estimate(batch.select(rows, batch.logprobs[rows, :width], **columns)).loss, logits)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-14)


def test_metrics_are_those_of_the_distribution():
    batch, _ = batch_with_distributions(7)
    one = term(upge.LogRatio(), upge.FullVocabulary(), gate=upge.ConstantGate())
    metrics = upge.Algorithm("test", {"one": one}).estimate(batch).metrics
    given = batch.distributions
    kl = (given.policy.exp() * (given.policy - given.teacher)).sum(-1)
    of_rollouts = batch.response_mask & ~batch.is_demonstration[:, None]
    assert metrics["one/advantage_mean"] == pytest.approx(-float(kl.detach()[of_rollouts].mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("part", "slot", "message"),
    [
        (upge.PPOClip(), "mask", "known for the sampled token alone"),
        (upge.BehaviorPolicy(), "denominator", "known for the sampled token alone"),
        (upge.KLShaped(upge.GroupRelative(), future=True), "advantage", "looks beyond a token"),
    ],
)
def test_parts_that_a_support_refuses(part, slot, message):
    parts = {"mask": upge.NoMask(), "denominator": upge.UnitDenominator(), "advantage": upge.LogRatio()} | {slot: part}
    with pytest.raises(upge.ConfigError, match=message):
        upge.Term(
            "rollouts", upge.ConstantGate(), upge.UnifiedGradient(**parts), upge.TokenMean(), 1.0, upge.FullVocabulary()
        )


def test_a_part_of_the_whole_vocabulary_needs_it():
    for support in (upge.SampledToken(), upge.TopK(3)):
        with pytest.raises(upge.ConfigError, match="needs the whole vocabulary"):
            term(upge.TiltedReference(), support)


def test_a_batch_without_distributions():
    batch, _ = batch_with_distributions()
    algorithm = upge.Algorithm("test", {"one": term(upge.LogRatio(), upge.FullVocabulary())})
    with pytest.raises(ValueError, match="distributions: the support of the term 'one' is FullVocabulary"):
        algorithm.estimate(dataclasses.replace(batch, distributions=None))


def test_needs():
    whole = upge.Algorithm("test", {"one": term(upge.LogRatio(), upge.FullVocabulary())}).needs
    assert whole.teacher and "teacher_logprobs" not in whole.columns and whole.distributions == {"teacher"}
    sampled = upge.Algorithm("test", {"one": term(upge.LogRatio(), upge.SampledToken(), upge.CurrentPolicy())}).needs
    assert sampled.teacher and "teacher_logprobs" in sampled.columns and not sampled.distributions
    chosen = upge.Algorithm("test", {"one": term(upge.Surprisal(), upge.TopK(3, "reference"))}).needs
    assert chosen.reference and not chosen.teacher
