"""Terms on the vocabulary through the packed model and its head, against autograd on full logits of plain models."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import upge
from tests.models import save_random_model, trajectories, unrounded
from tests.update_ranks import STEP
from upge.logprobs import Output
from upge.train.micro_batches import MicroBatch
from upge.train.packed_policy import PackedPolicy, predicting_states
from upge.train.packing import pack
from upge.train.sample import assemble
from upge.views import Distributions

TEMPERATURE = 0.7


def term(advantage, support, denominator=None, source="all", mask=None, reduction=None) -> upge.Term:
    estimator = upge.UnifiedGradient(mask or upge.NoMask(), denominator or upge.UnitDenominator(), advantage)
    return upge.Term(source, upge.ConstantGate(), estimator, reduction or upge.QuestionMean(), 0.7, support)


RL = term(upge.GroupRelative(), upge.SampledToken(), upge.CurrentPolicy(), "rollouts")
WHOLE_RESPONSE = term(upge.GroupRelative(), upge.SampledToken(), upge.SequenceReferencePolicy(), "rollouts")
ALGORITHMS = {
    "teacher": {"a": term(upge.JensenShannon(0.3), upge.FullVocabulary())},
    "both models": {
        "a": term(upge.LogRatio("reference"), upge.FullVocabulary(2.0)),
        "b": term(upge.TargetProbability(), upge.TopK(5, "teacher"), upge.CurrentPolicy(), "demonstrations"),
    },
    "beside policy gradients": {"a": term(upge.LogRatio(), upge.TopK(6)), "b": RL},
    "beside a part of whole responses": {"a": term(upge.LogRatio(), upge.FullVocabulary()), "b": WHOLE_RESPONSE},
    "beside divergences": {"a": RL},
    "beside divergences and whole responses": {"a": WHOLE_RESPONSE},
    "beside an entropy bonus": {"a": term(upge.TiltedReference(3.0), upge.FullVocabulary(), upge.CurrentPolicy())},
}
DIVERGENCES = {
    "kl": upge.DivergencePenalty(0.2, upge.TokenMean(), upge.TargetProbability("reference"), source="all"),
    "top": upge.DivergencePenalty(0.3, upge.SequenceMean(), upge.LogRatio(), upge.TopK(5, "teacher", 2.0)),
    "entropy": upge.DivergencePenalty(0.1, upge.TokenMean(), upge.Surprisal()),
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The policy, the reference policy and a teacher of another width, in float64."""
    from transformers import AutoModelForCausalLM

    models = []
    for number in range(3):
        torch.manual_seed(number)
        folder = save_random_model(tmp_path_factory.mktemp(f"model{number}"), seed=number)
        models.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa"))
    for model in models:
        unrounded(model)
    return models


def full_logprobs(model, members) -> torch.Tensor:
    """[B, T, V] log-probs of every token of the vocabulary, one forward pass per trajectory."""
    rows = []
    width = max(len(t.response_ids) for t in members)
    for one in members:
        ids = torch.tensor([[*one.prompt_ids, *one.response_ids]])
        logits = model(ids).logits[0, len(one.prompt_ids) - 1 : -1] / TEMPERATURE
        rows.append(torch.nn.functional.pad(logits.log_softmax(-1), (0, 0, 0, width - len(one.response_ids))))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_head_gives_the_gradient_of_full_logits(networks, name):
    policy, reference, teacher = networks
    bonus = {"entropy": upge.EntropyBonus(0.1, upge.TokenMean())} if "entropy" in name else {}
    one = upge.Algorithm(name, ALGORITHMS[name], DIVERGENCES if "divergences" in name else bonus)
    members = trajectories()
    batch = assemble(members, STEP)
    tokens = torch.zeros(batch.response_mask.shape, dtype=torch.long)
    for row, member in enumerate(members):
        tokens[row, : len(member.response_ids)] = torch.tensor(member.response_ids)
    now = full_logprobs(policy, members)
    with torch.no_grad():
        given = Distributions(tokens, now, full_logprobs(reference, members), full_logprobs(teacher, members))
    columns = {"logprobs": now.gather(-1, tokens[..., None])[..., 0], "entropies": -(now.exp() * now).sum(-1)}
    columns["reference_logprobs"] = given.reference.gather(-1, tokens[..., None])[..., 0]
    filled = dataclasses.replace(batch, reference_logprobs=columns["reference_logprobs"])
    estimate = one.estimate(dataclasses.replace(batch, **columns, distributions=given))
    loss, values = estimate.loss, dict.fromkeys(estimate.penalties, 0.0)
    expected = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
    plan = one.plan(filled)
    totals = [torch.zeros_like(p) for p in policy.parameters()]
    for rows in ([i for i in range(len(members)) if i % 2], [i for i in range(len(members)) if not i % 2]):
        gradients, estimates = packed_gradient(networks, one, plan, filled, rows)
        for total, part in zip(totals, gradients, strict=True):
            total += part
        values = {n: value + sum(e.penalties[n] for e in estimates) for n, value in values.items()}
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-4
    for actual, right in zip(totals, expected, strict=True):
        assert float((actual - right).abs().max()) <= 1e-9 * scale
    assert values == pytest.approx(estimate.penalties, rel=1e-9)


def test_the_entropy_bonus_in_place_is_the_penalty_on_candidates(networks):
    members, gradients = trajectories(), []
    batch = assemble(members, STEP)
    for bonus in (upge.EntropyBonus(0.1, upge.TokenMean()), DIVERGENCES["entropy"]):
        one = upge.Algorithm("entropy", {"a": RL}, {"entropy": bonus})
        actual, _ = packed_gradient(networks, one, one.plan(batch).alone("entropy"), batch, range(len(members)))
        gradients.append(torch.cat([part.flatten() for part in actual]))
    scale = float(gradients[0].abs().max())
    assert scale > 1e-4 and float((gradients[0] - gradients[1]).abs().max()) <= 1e-10 * scale


def packed_gradient(networks, one, plan, batch, rows) -> tuple[list[torch.Tensor], list[upge.Estimate]]:
    """The gradient of some rows through packed rows, with a head in chunks of seven tokens, and its estimates."""
    import copy

    members = trajectories()
    packed = pack([(members[r].prompt_ids, members[r].response_ids) for r in rows])
    ours, *others = (PackedPolicy(copy.deepcopy(model), chunk_size=7) for model in networks)
    outputs = {}
    for model_name, model in zip(("reference", "teacher"), others, strict=True):
        with torch.no_grad():
            states = predicting_states(model.model.base_model, packed)
        outputs[model_name] = Output(states, model.model.get_output_embeddings().weight.detach())
    piece = MicroBatch(batch, rows, packed)
    estimates: list[upge.Estimate] = []

    def estimates_of(view, places):
        estimates.append(plan.estimate_in_head(view, places))
        return [(1.0, estimates[-1])]

    objective = piece.objective(one, estimates_of)
    loss, *_ = ours(packed, TEMPERATURE, objective=objective._replace(others=outputs))
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in ours.parameters()], estimates


def test_states_of_other_prompts_in_the_order_of_the_policys():
    responses = [(1, 2, 3), (4,), (5, 6, 7, 8), (9, 10)]
    mine = pack([((1,), one) for one in responses])
    other = pack([((2,) * (9 - 2 * len(one)), one) for one in responses])
    assert mine.rows.tolist() != other.rows.tolist(), "the lengths of the prompts decide the order"
    torch.testing.assert_close(other.reordered(other.targets, mine), mine.targets)
