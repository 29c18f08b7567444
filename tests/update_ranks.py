"""Run by torchrun from test_update.py: the gradients of all algorithms under ZeRO-3, saved by rank 0.

usage: update_ranks.py MODEL COLUMNS OUTPUT TOKEN_BUDGET
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping

import torch

from tests.compositions import by_stage, load
from tests.models import trajectories
from upge import Algorithm
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.distributed import connect, leave
from upge.train.engine import Engine
from upge.train.lr_schedule import LearningRates
from upge.train.sample import assemble
from upge.train.step_batch import StepBatch
from upge.train.update import Update, Updater

#: The step and the state that schedules and stateful gates see.
STEP = 7


def cases() -> dict[str, tuple[Algorithm, bool]]:
    """Name → (algorithm, whether the behaviour policy is another), strictly on-policy and not.

    Every file but those that move other tokens than the sampled ones, see test_support_in_training.py.
    """
    results = {n: one for n, one in by_stage().items() if not one.supports} | {"corrected_ppo": load("corrected_ppo")}
    return {f"{n}, {'off' if off else 'on'}-policy": (one, off) for n, one in results.items() for off in (False, True)}


def batch_for(one: Algorithm, off_policy: bool, filled: Mapping[str, Mapping[str, torch.Tensor]]) -> StepBatch:
    """The batch as the trainer completes it: with the columns that the algorithm reads.

    Args:
        filled: 'pairs' and 'plain' → column → values [B, T].
    """
    pairs = one.needs.preference_pairs
    members = trajectories(pairs=pairs)
    wanted = one.needs.columns & {"reference_logprobs", "teacher_logprobs", "values"} | one.needs.precomputed
    wanted |= {"behavior_logprobs"} if off_policy else set()
    columns = {name: filled["pairs" if pairs else "plain"][name] for name in wanted}
    state = {name: gate.initial() for name, gate in one.stateful.items()}
    return StepBatch(dataclasses.replace(assemble(members, STEP), **columns, state=state), members)


def main(model: str, columns: str, output: str, budget: str) -> None:
    world = connect()
    config = OptimizerConfig(lr=0.0, max_grad_norm=0.0, micro_batch_tokens=int(budget))
    engine = Engine(ModelConfig(path=model), config, world)
    from deepspeed.utils import safe_get_full_grad

    results, filled = {}, torch.load(columns)
    for name, (one, off_policy) in cases().items():
        updater = Updater(engine, one, config)
        batch = batch_for(one, off_policy, filled)
        plan, rows = one.plan(batch.columns), torch.arange(len(batch.trajectories))
        updater.run_micro_batches(Update(batch, plan, rows))
        gradients = {n: safe_get_full_grad(p) for n, p in engine.network.named_parameters()}
        results[name] = {n: g.clone() for n, g in gradients.items()}
        results[name]["norm"] = torch.tensor(engine.step(lr=0.0).grad_norm)
    # At a learning rate of 0 the policy stays where it sampled, so both updates must have the on-policy gradient.
    twice = Updater(engine, load("grpo"), dataclasses.replace(config, mini_batches=2))
    results["two updates"] = torch.tensor(twice.update(trajectories(), STEP, LearningRates(0.0)).grad_norms)
    if world.is_main:
        torch.save(results, output)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
