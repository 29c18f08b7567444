"""Critic and reference policy beside the policy under ZeRO-3, on 1 and 2 ranks, against plain models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.critic_ranks import BUDGETS, TEMPERATURE, batch, targets
from tests.models import save_random_model
from tests.upge.train.test_update import launch
from upge.errors import ConfigError, ModelError
from upge.train.config import ModelConfig
from upge.train.deepspeed_module import load_causal_lm
from upge.train.distributed import World


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The policy's model with tied embeddings, and one for the critic alone with untied ones."""
    torch.manual_seed(1)
    other = tmp_path_factory.mktemp("other")
    config = Qwen2Config(
        vocab_size=120,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(other)
    return save_random_model(tmp_path_factory.mktemp("model")), other


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(models, request, tmp_path_factory) -> dict:
    """The results of the three engines for a number of ranks."""
    folder = tmp_path_factory.mktemp("critic")
    launch("critic_ranks", request.param, *models, folder / "found.pt", folder)
    return torch.load(folder / "found.pt", weights_only=False) | {"ranks": request.param}


def plain_critic(path, weights: dict) -> tuple[torch.nn.Module, torch.nn.Linear]:
    """A plain float64 trunk and head with the critic's weights."""
    trunk = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).base_model
    trunk.load_state_dict({n.removeprefix("trunk."): w for n, w in weights.items() if n.startswith("trunk.")})
    head = torch.nn.Linear(weights["head.weight"].shape[1], 1, dtype=torch.float64)
    head.load_state_dict({n.removeprefix("head."): w for n, w in weights.items() if n.startswith("head.")})
    return trunk, head


def plain_values(trunk: torch.nn.Module, head: torch.nn.Linear) -> torch.Tensor:
    """Values [B, T] from one forward pass over all trajectories, padded on the right."""
    pairs = batch()
    rows = [[*prompt, *response] for prompt, response in pairs]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    values = head(trunk(input_ids=ids, attention_mask=mask).last_hidden_state)[..., 0]
    width = max(len(response) for _, response in pairs)
    results = []
    for row, (prompt, response) in zip(values, pairs, strict=True):
        # The state after the prompt is the one before the first response token.
        before = row[len(prompt) - 1 : len(prompt) - 1 + len(response)]
        results.append(torch.nn.functional.pad(before, (0, width - len(response))))
    return torch.stack(results)


def plain_gradient(trunk: torch.nn.Module, head: torch.nn.Linear, some: int | None = None) -> dict:
    values = plain_values(trunk, head)
    loss = sum((v[: len(y)] - y).square().sum() for v, y in list(zip(values, targets(), strict=True))[:some])
    (loss / len(batch())).backward()
    named = [*(("trunk." + n, p) for n, p in trunk.named_parameters()), *head.named_parameters("head")]
    gradients = {name: p.grad.clone() for name, p in named}
    for _, p in named:
        p.grad = None
    return gradients


def agree(results: dict, expected: dict) -> None:
    """To 2e-5 of the largest entry."""
    assert set(results) == set(expected)
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-4
    for name, gradient in expected.items():
        difference = float((results[name] - gradient).abs().max())
        assert difference <= 2e-5 * scale, (name, difference / scale)


def test_values_are_zero_before_the_critic_learns(results):
    assert results["first values"].shape == (len(batch()), max(len(response) for _, response in batch()))
    assert not results["first values"].any()


def test_values_are_those_of_a_plain_model(models, results):
    with torch.no_grad():
        expected = plain_values(*plain_critic(models[0], results["critic"]))
    assert float(expected.std()) > 0.05
    for budget in BUDGETS:
        assert float((results["values", budget] - expected).abs().max()) <= 1e-5


def test_gradients_are_those_of_a_plain_model(models, results):
    """One micro-batch or many, one rank or two, and with a rank that has no work."""
    plain = plain_critic(models[0], results["critic"])
    expected = plain_gradient(*plain)
    norm = float(sum(g.square().sum() for g in expected.values()).sqrt())
    for budget in BUDGETS:
        agree(results["gradient", budget], expected)
        assert results["norm", budget] == pytest.approx(norm, rel=1e-4)
    agree(results["gradient of one"], plain_gradient(*plain, some=1))


def test_a_critic_continues_where_it_was_saved(results):
    """Bit by bit, activation checkpointing or not."""
    moved = [name for name, weight in results["critic"].items() if not torch.equal(weight, results["went on"][name])]
    assert set(moved) == set(results["critic"])
    for name, weight in results["went on"].items():
        assert torch.equal(results["resumed"][name], weight), name


def test_a_critic_of_its_own_has_its_models_trunk(models, results):
    trunk = AutoModelForCausalLM.from_pretrained(models[1]).base_model
    expected = {f"trunk.{name}": p for name, p in trunk.named_parameters()}
    assert set(results["apart"]) == {*expected, "head.weight", "head.bias"}
    for name, weight in expected.items():
        assert torch.equal(results["apart"][name], weight), name
    assert not results["apart"]["head.weight"].any()


def test_the_reference_policy_is_the_first_and_stays(models, results):
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float64)
    prompt, response = batch()[0]
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
    assert float((results["reference", 0][0, : len(response)] - expected.detach()).abs().max()) <= 1e-5
    assert float((results["reference", 0] - results["policy", 0]).abs().max()) <= 1e-5
    assert torch.equal(results["reference", 1], results["reference", 0])
    assert float((results["policy", 1] - results["policy", 0]).abs().max()) > 0.1


def test_the_policys_weights_are_its_own(models, results):
    """Gathering them for the sampler gives the policy's, which have moved, in the model's names and shapes."""
    model = AutoModelForCausalLM.from_pretrained(models[0])
    expected = dict(model.named_parameters())
    assert {n: w.shape for n, w in results["weights"].items()} == {n: w.shape for n, w in expected.items()}
    assert all(bool((results["weights"][name] != weight).any()) for name, weight in expected.items())
    model.load_state_dict(results["weights"], strict=False)
    prompt, response = batch()[3]
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
    assert float((results["policy", 1][3, : len(response)] - expected.detach()).abs().max()) <= 1e-4


def test_the_reference_policy_is_partitioned(results):
    assert results["share held"] == pytest.approx(1 / results["ranks"], rel=0.01)


def test_a_critic_that_cannot_be_loaded_names_its_own_key(models, tmp_path):
    world = World(0, 1, torch.device("cpu"))
    with pytest.raises(ModelError, match=r"^critic\.path=.*no such folder"):
        load_causal_lm(ModelConfig(path=str(tmp_path / "none" / "such")), world, "critic.path")
    with pytest.raises(ConfigError, match="model.overrides"):
        load_causal_lm(ModelConfig(path=str(models[0]), overrides={"hidden": 3}), world)
