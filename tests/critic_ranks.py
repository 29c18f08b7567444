"""Run by torchrun from test_critic.py: policy, critic and reference policy in one process; saved by rank 0.

usage: critic_ranks.py MODEL OTHER OUTPUT SCRATCH
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.models import trajectories
from upge.errors import ModelError
from upge.train.config import CriticConfig, ModelConfig, OptimizerConfig
from upge.train.distributed import connect, leave
from upge.train.engine import CriticEngine, Engine, ReferencePolicy
from upge.train.micro_batches import Work, distribute
from upge.train.packing import packed_length

#: The first gives several micro-batches, the second one a rank.
BUDGETS = (60, 10_000)
TEMPERATURE = 0.7


def batch() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt_ids, response_ids), one of them without a response."""
    results = [(t.prompt_ids, t.response_ids) for t in trajectories()]
    return [*results[:7], (results[7][0], ()), *results[8:]]


def targets() -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(len(response), generator=g) for _, response in batch()]


def share(engine: CriticEngine | Engine | ReferencePolicy, budget: int, some: int | None = None) -> list[list[int]]:
    """This rank's micro-batches of the first `some` trajectories."""
    lengths = [packed_length(*pair) for pair in batch()[:some]]
    return distribute([Work(tokens) for tokens in lengths], engine.world.size, budget)[engine.world.rank]


def squared_loss(values: Tensor, rows: list[int]) -> Tensor:
    """This micro-batch's part of Σ (V − y)² / trajectories."""
    loss = values.sum() * 0
    for place, row in enumerate(rows):
        wanted = targets()[row]
        loss = loss + (values[place, : len(wanted)] - wanted).square().sum()
    return loss / len(batch())


def accumulate(critic: CriticEngine, budget: int, some: int | None = None) -> None:
    mine = share(critic, budget, some)
    for number, rows in enumerate(mine):
        values = critic.forward([batch()[r] for r in rows])
        critic.backward(squared_loss(values, rows), last=number == len(mine) - 1)


def padded(engine: CriticEngine | Engine | ReferencePolicy, budget: int = 60) -> Tensor:
    """The column [B, T] of every rank's forward passes without gradient."""
    pairs, parts = batch(), []
    for rows in share(engine, budget):
        with torch.no_grad():
            column = engine.forward([pairs[r] for r in rows])
        parts += [(r, column[place, : len(pairs[r][1])]) for place, r in enumerate(rows)]
    results = torch.zeros(len(pairs), max(len(response) for _, response in pairs))
    for part in engine.world.gather(parts):
        for row, values in part:
            results[row, : len(values)] = values
    return results


def whole(module: nn.Module) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=None):
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def gradients(critic: CriticEngine) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(p).clone() for name, p in critic.module.named_parameters()}


def move(policy: Engine) -> None:
    """An update of the policy that every token takes part in."""
    mine = share(policy, BUDGETS[0])
    for number, rows in enumerate(mine):
        logprobs = policy.forward([batch()[r] for r in rows])
        policy.backward(-logprobs.sum() / 100, last=number == len(mine) - 1)
    assert policy.step(1e-2).applied


def learn(critic: CriticEngine, results: dict) -> None:
    """First values, two updates, then values and gradients where head and trunk have moved."""
    results["first values"] = padded(critic)
    for _ in range(2):
        accumulate(critic, BUDGETS[0])
        assert critic.step(1e-2).applied
    results["critic"] = whole(critic.module)
    for budget in BUDGETS:
        results["values", budget] = padded(critic, budget)
        accumulate(critic, budget)
        results["gradient", budget] = gradients(critic)
        results["norm", budget] = critic.step(0.0).grad_norm
    # A single trajectory leaves a second rank without work.
    accumulate(critic, BUDGETS[1], some=1)
    results["gradient of one"] = gradients(critic)
    critic.step(0.0)


def resume(critic: CriticEngine, fresh: CriticEngine, scratch: Path, results: dict) -> None:
    critic.save(scratch / "step_3.partial", "critic", {})
    critic.world.barrier()
    if critic.world.is_main:
        (scratch / "step_3.partial").rename(scratch / "step_3")
    critic.world.barrier()
    fresh.load(scratch / "step_3", "critic")
    for key, each in (("went on", critic), ("resumed", fresh)):
        accumulate(each, BUDGETS[0])
        each.step(1e-3)
        results[key] = whole(each.module)
    with pytest.raises(ModelError, match="cannot be read"):
        fresh.load(scratch / "step_4", "critic")


def main(model: str, other: str, output: str, scratch: str) -> None:
    world = connect()
    results: dict = {}
    settings = ModelConfig(path=model)
    optimizer = OptimizerConfig(max_grad_norm=0.0, micro_batch_tokens=BUDGETS[0])
    policy = Engine(settings, optimizer, world, TEMPERATURE)
    reference = ReferencePolicy(settings, world, TEMPERATURE)
    critic = CriticEngine(settings, CriticConfig(), optimizer, world)
    held = sum(p.ds_tensor.numel() for p in reference._engine.module.parameters())
    results["share held"] = held / policy.parameters
    results["reference", 0], results["policy", 0] = padded(reference), padded(policy)
    move(policy)
    learn(critic, results)
    move(policy)
    results["reference", 1], results["policy", 1] = padded(reference), padded(policy)
    results["weights"] = {name: weight.clone() for name, weight in policy.named_weights()}
    checkpointed = ModelConfig(path=model, gradient_checkpointing="full")
    resume(critic, CriticEngine(checkpointed, CriticConfig(), optimizer, world), Path(scratch), results)
    apart = CriticEngine(settings, CriticConfig(path=other), optimizer, world)
    results["apart"] = whole(apart.module)
    with pytest.raises(ModelError, match="critic.path: this model knows 120 tokens"):
        apart.forward([((1, 2), (3, 10**6))])
    if world.is_main:
        torch.save(results, output)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
