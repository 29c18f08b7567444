"""A setting reaches the place where it acts: the temperature, the samplers' settings, AdamW's and the clipping norm."""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import upge.train.engine
from experiments.config import compose
from experiments.run import train as run
from tests.models import save_random_model, trajectories, unrounded
from tests.upge.train.test_collect import ALONE, FakeModel, algorithm, examples
from upge import rollout
from upge.config import from_tree
from upge.logprobs import Coefficients
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.collect import Collector
from upge.train.config import OptimizerConfig, RunConfig
from upge.train.deepspeed_module import DeepSpeedModule
from upge.train.distributed import World
from upge.train.engine import Engine, ReferencePolicy
from upge.train.packed_policy import Objective, PackedPolicy

TEMPERATURE = 0.7
WORLD = World(0, 1, torch.device("cpu"))


class RecordedCall:
    """Stands in for a class or a function and keeps its arguments."""

    def __init__(self) -> None:
        self.positional, self.named = (), {}

    def __call__(self, *positional, **named) -> RecordedCall:
        self.positional, self.named = positional, named
        return self

    @property
    def arguments(self) -> list:
        return [*self.positional, *self.named.values()]


# The temperature of the policy.


def plain_model(folder) -> nn.Module:
    """The model in float64 throughout."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    unrounded(network)
    return network


def without_deepspeed(cls: type, folder) -> Engine | ReferencePolicy:
    """An engine whose model is not partitioned, in float64."""
    network = plain_model(folder)
    engine = object.__new__(cls)
    engine.world, engine.network, engine.temperature, engine.adapter = WORLD, network, TEMPERATURE, None
    engine._engine, engine._vocabulary, engine._key = PackedPolicy(network), 1000, "model.path"
    return engine


def plain_logprobs(model: nn.Module, prompt_ids, response_ids) -> torch.Tensor:
    """Log-probs [T] of a response at `TEMPERATURE`, from the full logits."""
    logits = model(input_ids=torch.tensor([[*prompt_ids, *response_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(-1, torch.tensor(response_ids)[:, None])[:, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"))


PAIRS = [(t.prompt_ids, t.response_ids) for t in trajectories(groups=2, group_size=1)]


def test_the_loss_is_that_of_the_policy_at_its_temperature(folder):
    """Σ w·log π and its gradient, where π is the softmax of logits / 0.7."""
    engine, plain = without_deepspeed(Engine, folder), plain_model(folder)
    packed = engine.pack(PAIRS)
    weights = torch.randn(len(packed.targets), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def coefficients(logprobs, entropies, chunk) -> Coefficients:
        return Coefficients((weights[chunk] * logprobs).sum(), weights[chunk])

    loss, logprobs, _ = engine.loss(packed, Objective(coefficients))
    loss.backward()
    padded = packed.pad(weights)
    expected = [plain_logprobs(plain, *pair) for pair in PAIRS]
    total = sum((row * w[: len(row)]).sum() for row, w in zip(expected, padded, strict=True))
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-9)
    for row, own in zip(packed.pad(logprobs), expected, strict=True):
        assert torch.allclose(row[: len(own)], own, atol=1e-9)
    for ours, theirs in zip(engine.network.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-9)
    assert float(sum(p.grad.abs().sum() for p in plain.parameters())) > 1


@pytest.mark.parametrize("cls", [Engine, ReferencePolicy])
def test_logprobs_are_those_of_the_policy_at_its_temperature(folder, cls):
    plain = plain_model(folder)
    for row, pair in zip(without_deepspeed(cls, folder).forward(PAIRS), PAIRS, strict=True):
        assert torch.allclose(row[: len(pair[1])], plain_logprobs(plain, *pair), atol=1e-9)


def test_the_policy_and_the_reference_policy_get_the_temperature_of_rollouts(monkeypatch):
    """Log-probs that are compared must be of one temperature: that of the rollouts."""
    policy, reference, critic = RecordedCall(), RecordedCall(), RecordedCall()
    monkeypatch.setattr(upge.train.engine, "Engine", policy)
    monkeypatch.setattr(upge.train.engine, "ReferencePolicy", reference)
    monkeypatch.setattr(upge.train.engine, "CriticEngine", critic)
    composed = compose(["algo=ppo", f"rollout.temperature={TEMPERATURE}", "critic.lr=0.25", "reference.path=elsewhere"])
    run._models(composed, WORLD)
    assert TEMPERATURE in policy.arguments and composed.config.optimizer in policy.arguments
    assert TEMPERATURE in reference.arguments and reference.positional[0].path == "elsewhere"
    assert composed.config.critic in critic.arguments and composed.config.critic.lr == 0.25


# Samplers.


class RecordedModel(FakeModel):
    """The fake model, which also keeps how it was asked to sample."""

    def sample(self, prompts, n, sampling, seeds, arrived, interrupted=None):
        self.samplings = [*getattr(self, "samplings", []), (n, sampling)]
        return super().sample(prompts, n, sampling, seeds, arrived)


def test_rollouts_are_sampled_as_the_run_says():
    """Temperature, length, stop tokens and group size; top_p is 1 whatever the evaluation's."""
    model = RecordedModel()
    settings = {"rollout": {"temperature": TEMPERATURE, "max_response_tokens": 33}, "eval": {"top_p": 0.5}}
    config = from_tree(RunConfig, {"group_size": 3, "prompts_per_step": 2, **settings})
    sampler = VerifiedSampler(model, model, model)
    Collector(config, algorithm("rollouts"), examples(6), sampler, (9,), ALONE).collect(0)
    ((n, sampling),) = model.samplings
    assert n == 3
    assert sampling == rollout.Sampling(temperature=TEMPERATURE, top_p=1.0, max_tokens=33, stop_token_ids=(9,))


def test_rollouts_are_sampled_with_the_noise_of_the_run():
    model = RecordedModel()
    noise = {"top_p": 0.7, "bfloat16_logits": True, "weight_bits": 4}
    settings = {"rollout": {"engine": "transformers", "noise": noise}, "group_size": 3, "prompts_per_step": 2}
    sampler = VerifiedSampler(model, model, model)
    Collector(from_tree(RunConfig, settings), algorithm("rollouts"), examples(6), sampler, (9,), ALONE).collect(0)
    ((_, sampling),) = model.samplings
    assert sampling == rollout.Sampling(1.0, 0.7, 1024, (9,), bfloat16_logits=True)


def test_the_engine_of_rollouts_gets_its_settings(monkeypatch):
    """Prompt and response together are the longest sequence."""
    loaded = RecordedCall()
    monkeypatch.setattr(rollout, "load", loaded)
    settings = ["rollout.engine=vllm", "rollout.max_prompt_tokens=100", "rollout.max_response_tokens=28"]
    settings += [
        "rollout.memory_fraction=0.3",
        "rollout.max_sequences=7",
        "rollout.max_batched_tokens=900",
        "rollout.tensor_parallel=2",
        "seed=5",
        "model.dtype=bfloat16",
        "model.overrides={rope_theta: 7}",
    ]
    config = compose(settings).config
    run._sampler(config)
    assert loaded.positional == ("vllm", config.model.path)
    assert loaded.named == {
        "dtype": "bfloat16",
        "max_length": 128,
        "memory_fraction": 0.3,
        "max_sequences": 7,
        "max_batched_tokens": 900,
        "tensor_parallel": 2,
        "seed": 5,
        "overrides": {"rope_theta": 7},
    }


# The optimizer.


def test_adamw_and_clipping_get_their_settings(monkeypatch):
    """Every setting of AdamW, and the norm at which DeepSpeed clips; 0 is no clipping."""
    given = RecordedCall()

    def initialize(**named) -> tuple:
        given(**named)
        return SimpleNamespace(optimizer=SimpleNamespace(state={})), None, None, None

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    optimizer = OptimizerConfig(lr=1.0, weight_decay=0.3, beta1=0.8, beta2=0.9, max_grad_norm=0.6)
    DeepSpeedModule(nn.Linear(2, 1), "float32", optimizer, 0.125, WORLD)
    (group,) = given.named["optimizer"].param_groups
    assert isinstance(given.named["optimizer"], torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.125, 0.3, (0.8, 0.9))
    assert given.named["config"]["gradient_clipping"] == 0.6


@pytest.mark.parametrize("lr", [0.5, 0.0])
def test_a_step_sets_the_learning_rate_of_every_group(lr):
    groups = [{"lr": 9.0}, {"lr": 8.0}]
    module = object.__new__(DeepSpeedModule)
    module._engine = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=groups),
        step=lambda: None,
        was_step_applied=lambda: True,
        get_global_grad_norm=lambda: 2.0,
    )
    assert module.step(lr) == (True, 2.0)
    assert [group["lr"] for group in groups] == [lr, lr]
