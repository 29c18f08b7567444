"""The gradient of each term under ZeRO-3: equal to a plain model's, added up the whole, and without a trace."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import save_random_model, trajectories
from tests.term_gradients_ranks import mixed
from tests.upge.train.test_update import launch, norm_of, padded_logprobs
from upge import Trajectories
from upge.train.sample import assemble
from upge.views import Distributions

PARTS = ("rl", "sft", "entropy", "kl")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference_path(tmp_path_factory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("reference"), seed=1)


@pytest.fixture(scope="module", params=[(1, 10_000), (2, 45)], ids=["one rank", "two ranks"])
def results(request, model_path, reference_path, tmp_path_factory) -> dict:
    ranks, budget = request.param
    output = tmp_path_factory.mktemp("term_gradients") / "found.pt"
    launch("term_gradients_ranks", ranks, model_path, reference_path, output, budget)
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module")
def plain(model_path, reference_path) -> tuple[dict[str, dict[str, torch.Tensor]], torch.Tensor, float]:
    """In float64: part → parameter → gradient, the weights [B, T] of the whole, and the value of the KL."""
    model, other = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (model_path, reference_path)
    )
    logprobs, entropies = padded_logprobs(model, trajectories())
    columns = assemble(trajectories(), 0)
    tokens = torch.zeros(columns.response_mask.shape, dtype=torch.long)
    for row, one in enumerate(trajectories()):
        tokens[row, : len(one.response_ids)] = torch.tensor(one.response_ids)
    whole = Distributions(tokens, *(full_logprobs(network, trajectories()) for network in (model, other)))
    given = {name: getattr(columns, name) for name in Trajectories.__dataclass_fields__}
    batch = Trajectories(**{**given, "logprobs": logprobs, "entropies": entropies, "distributions": whole})
    plan, named = mixed().plan(columns), dict(model.named_parameters())
    gradients = {}
    for name in PARTS:
        loss = plan.alone(name).estimate(batch).loss
        results = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        gradients[name] = dict(zip(named, results, strict=True))
    estimate = plan.estimate(batch)
    return gradients, estimate.weights.detach(), estimate.penalties["kl"]


def full_logprobs(model: torch.nn.Module, batch: list) -> torch.Tensor:
    """[B, T, V] log-probs of every token of the vocabulary."""
    width, rows = max(len(t.response_ids) for t in batch), []
    for t in batch:
        ids = torch.tensor([[*t.prompt_ids, *t.response_ids]])
        full = model(input_ids=ids).logits[0, len(t.prompt_ids) - 1 : -1].log_softmax(-1)
        rows.append(torch.nn.functional.pad(full, (0, 0, 0, width - len(full))))
    return torch.stack(rows)


def test_norms_and_angles(results, plain):
    gradients, figures = plain[0], results["figures"]
    for name in PARTS:
        assert figures[f"{name}/grad_norm"] == pytest.approx(norm_of(gradients[name]), rel=1e-4), name
    assert figures["kl/value"] == pytest.approx(plain[2], rel=1e-4) and plain[2] > 1e-3
    for a, b in itertools.combinations(PARTS, 2):
        product = sum(float((x * gradients[b][key]).sum()) for key, x in gradients[a].items())
        expected = product / norm_of(gradients[a]) / norm_of(gradients[b])
        assert figures[f"cosine/{a}_{b}"] == pytest.approx(expected, abs=1e-4), (a, b)


def test_the_parts_add_up_to_the_update(results, plain):
    total = {key: sum(part[key] for part in plain[0].values()) for key in plain[0]["rl"]}
    assert results["figures"]["grad_norm"] == pytest.approx(norm_of(total), rel=1e-4)
    assert max(results["rest"]) <= 2e-6 * max(results["largest"])


def test_looking_changes_nothing(results):
    """Two updates with and without: every weight is the same to the last bit."""
    assert all(torch.equal(results["diagnosed"][name], weight) for name, weight in results["plain"].items())


def test_the_heaviest_tokens_are_those_of_the_whole_batch(results, plain):
    """For any cut and any number of ranks: of each term the largest weights, one trajectory of each prompt."""
    weights, members = plain[1], trajectories()
    for term in ("rl", "sft"):
        rows = [row for row, t in enumerate(members) if t.is_demonstration == (term == "sft")]
        rows = sorted(rows, key=lambda row: (-float(f"{float(weights[row].abs().max()):.5g}"), row))
        best: dict[int, int] = {}
        for row in rows:
            if float(weights[row].abs().max()) > 0:
                best.setdefault(members[row].group, row)
        chosen = [one for one in results["top"] if one[0] == term]
        assert [row for _, row, _, _ in chosen] == list(best.values())[:4] and chosen
        for _, row, gate, values in chosen:
            assert gate == 1.0 and len(values) == len(members[row].response_ids)
            assert values == pytest.approx(weights[row, : len(values)].tolist(), rel=1e-4)


def test_figures_count_whole_trajectories(results, plain):
    """(Σ|W|)²/ΣW² of each trajectory's Σ|w|, whatever chunks and ranks it was cut into."""
    for term, demonstrations in (("rl", False), ("sft", True)):
        rows = [row for row, t in enumerate(trajectories()) if t.is_demonstration == demonstrations]
        masses = plain[1][rows].abs().sum(dim=1)
        expected = float(masses.sum() ** 2 / masses.square().sum())
        assert results["figures"][f"{term}/effective_trajectories"] == pytest.approx(expected, rel=1e-4), term
