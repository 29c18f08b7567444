"""Run by torchrun from test_resharding.py: engines from the checkpoints of another number of ranks; saved by rank 0.

usage: reshard_ranks.py MODEL FOLDER SOURCE TARGET GOES_ON

It loads the checkpoint SOURCE, or trains new engines if that is 'new', and makes an update. With GOES_ON=1 it saves the
checkpoint TARGET and makes one more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.engine_ranks import token_weights
from tests.models import trajectories
from upge.errors import ModelError
from upge.train.config import CriticConfig, LoraConfig, ModelConfig, OptimizerConfig
from upge.train.deepspeed_settings import PLAIN, DeepspeedConfig
from upge.train.distributed import World, connect, leave
from upge.train.engine import CriticEngine, Engine
from upge.train.micro_batches import Work, distribute
from upge.train.packing import packed_length

#: Few trajectories, and tokens of a micro-batch.
BATCH, BUDGET = trajectories(groups=2), 60
LR = 1e-3
#: Several sub-groups of parameters. Their limits count a rank's own elements, so that they follow the number of ranks.
GROUPS = DeepspeedConfig(config={"zero_optimization": {"sub_group_size": 10_000}})
#: Sets of moments: a second one, one without an update in the first checkpoint, one that no checkpoint has.
OTHER, LATE, STALE = "other", "late", "stale"


class State(NamedTuple):
    """What an engine has to take over, whole.

    Attributes:
        sets: of moments by name: step count, and the moments by parameter; None before the set's first update.
        in_use: one of them.
    """

    masters: dict[str, Tensor]
    weights: dict[str, Tensor]
    sets: dict[str, tuple[float, dict[str, tuple[Tensor, Tensor]]] | None]
    in_use: str
    position: tuple[int, int]


def optimizer() -> OptimizerConfig:
    return OptimizerConfig(max_grad_norm=1.0, weight_decay=0.1)


def policy(model: str, world: World, deepspeed: DeepspeedConfig = PLAIN, **settings: object) -> Engine:
    return Engine(ModelConfig(path=model, **settings), optimizer(), world, seed=3, deepspeed=deepspeed)


ENGINES: dict[str, Callable[[str, World], Engine | CriticEngine]] = {
    "policy": lambda model, world: policy(model, world, GROUPS),
    "bfloat16, offloaded": lambda model, world: policy(model, world, DeepspeedConfig("all"), dtype="bfloat16"),
    "LoRA": lambda model, world: policy(model, world, lora=LoraConfig(rank=3, target_modules=["v_proj", "down_proj"])),
    "critic": lambda model, world: CriticEngine(ModelConfig(path=model), CriticConfig(), optimizer(), world),
}


def update(engine: Engine | CriticEngine, variant: int) -> None:
    """An update with one of several losses Σ w·x over all ranks' trajectories, x a log-prob or a value."""
    weights, lengths = token_weights(variant), [packed_length(t.prompt_ids, t.response_ids) for t in BATCH]
    mine = distribute([Work(tokens) for tokens in lengths], engine.world.size, BUDGET)[engine.world.rank]
    for number, rows in enumerate(mine):
        columns = engine.forward([(BATCH[r].prompt_ids, BATCH[r].response_ids) for r in rows])
        loss = columns.sum() * 0
        for place, row in enumerate(rows):
            loss = loss + (weights[row] * columns[place, : len(weights[row])]).sum()
        engine.backward(loss, last=number == len(mine) - 1)
    assert engine.step(LR).applied


def train(engine: Engine | CriticEngine) -> None:
    """Updates with two sets of moments; a third one stays in use."""
    update(engine, 0)
    update(engine, 1)
    engine.use_optimizer(OTHER)
    update(engine, 2)
    engine.use_optimizer(LATE)


def moments(engine: Engine | CriticEngine, named: dict[str, nn.Parameter]) -> tuple | None:
    """The step count and the moments in use."""
    from deepspeed.utils import safe_get_full_optimizer_state as whole

    zero = engine._engine.optimizer
    states = [zero.state.get(flat, {}) for flat in zero.fp32_partitioned_groups_flat]
    if not any(states):
        return None
    (step,) = {float(state["step"]) for state in states}
    return step, {n: (whole(p, "exp_avg").clone(), whole(p, "exp_avg_sq").clone()) for n, p in named.items()}


def state_of(engine: Engine | CriticEngine) -> State:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    named = {name: p for name, p in engine._engine.module.named_parameters() if p.requires_grad}
    in_use, sets = engine._moments.in_use, {}
    for name in sorted({in_use, *engine._moments._idle}):
        engine.use_optimizer(name)
        sets[name] = moments(engine, named)
    engine.use_optimizer(in_use)
    masters = {name: safe_get_full_fp32_param(p).clone() for name, p in named.items()}
    with deepspeed.zero.GatheredParameters(list(named.values()), modifier_rank=None):
        weights = {name: p.detach().clone() for name, p in named.items()}
    return State(masters, weights, sets, in_use, engine.position)


def refuse(engine: Engine | CriticEngine, folder: Path, tag: str) -> None:
    """A checkpoint of another number of ranks that lacks a file."""
    world = engine.world
    for name in ("moments_rank_0.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        path = folder / tag / name
        world.barrier()
        if world.is_main:
            path.rename(folder / "away")
        world.barrier()
        with pytest.raises(ModelError, match=f"{tag}: the checkpoint cannot be read"):
            engine.load(folder, tag)
        world.barrier()
        if world.is_main:
            (folder / "away").rename(path)
    world.barrier()


def main(model: str, output: str, source: str, target: str, goes_on: str) -> None:
    world, results = connect(), {}
    for name, make in ENGINES.items():
        engine, folder = make(model, world), Path(output) / name
        if source == "new":
            train(engine)
        else:
            # The engine has a history of its own, none of which may survive.
            engine.use_optimizer(STALE)
            update(engine, 4)
            assert engine.load(folder, source) == {"step": source}
            results["loaded", name] = state_of(engine)
            update(engine, 3)
        if goes_on == "1":
            engine.save(folder, target, {"step": target})
            results["saved", name] = state_of(engine)
            update(engine, 3)
        results["last", name] = state_of(engine)
        if source != "new" and name == "policy":
            refuse(engine, folder, source)
    if world.is_main:
        torch.save({key: tuple(state) for key, state in results.items()}, Path(output) / f"{target}.pt")
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
