"""Run by torchrun from test_engine.py: gradients taken, sets of moments and their continuation; saved by rank 0.

usage: engine_ranks.py MODEL OUTPUT SCRATCH OFFLOAD [CONFIG [CHECKPOINTING]]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models import trajectories
from upge.errors import ModelError
from upge.train.activations import Checkpointing
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.deepspeed_module import StepResult
from upge.train.deepspeed_settings import DeepspeedConfig
from upge.train.distributed import World, connect, leave
from upge.train.engine import Engine
from upge.train.micro_batches import Work, distribute
from upge.train.packing import packed_length

#: Tokens of a micro-batch, small enough for several.
BUDGET = 60
#: Factor of the losses whose gradients are clipped.
CLIPPED = 500.0


def token_weights(variant: int) -> list[Tensor]:
    """A coefficient for every token: the loss is Σ w log π."""
    g = torch.Generator().manual_seed(100 + variant)
    return [torch.randn(len(t.response_ids), generator=g) / 50 for t in trajectories()]


def accumulate(engine: Engine, variant: int, factor: float = 1.0, after: Callable[[], None] | None = None) -> None:
    """The gradient of one of several losses over all ranks' trajectories, in micro-batches.

    With `after` each micro-batch is a gradient of its own, after which it is called.
    """
    batch, weights = trajectories(), token_weights(variant)
    lengths = [packed_length(t.prompt_ids, t.response_ids) for t in batch]
    mine = distribute([Work(tokens) for tokens in lengths], engine.world.size, BUDGET)[engine.world.rank]
    assert len(mine) > 2
    for number, rows in enumerate(mine):
        logprobs = engine.forward([(batch[r].prompt_ids, batch[r].response_ids) for r in rows])
        loss = logprobs.sum() * 0
        for place, row in enumerate(rows):
            loss = loss + (weights[row] * logprobs[place, : len(weights[row])]).sum()
        engine.backward(loss * factor, last=after is not None or number == len(mine) - 1)
        if after is not None:
            after()


def whole(engine: Engine, gradient: list[Tensor]) -> dict[str, Tensor]:
    """All ranks' parts of a gradient put together, by parameter."""
    parts = zip(*engine.world.gather(gradient), strict=True)
    named = list(engine.network.named_parameters())
    return {n: torch.cat(p).view(parameter.ds_shape) for (n, parameter), p in zip(named, parts, strict=True)}


def weights_of(engine: Engine) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in engine.named_weights()}


def update(engine: Engine, variant: int, lr: float = 1e-2, factor: float = 1.0) -> StepResult:
    accumulate(engine, variant, factor)
    return engine.step(lr)


def take(engine: Engine, actual: dict) -> None:
    """Two gradients, their product, and what follows them."""
    taken = []
    for variant in (0, 1):
        accumulate(engine, variant)
        taken.append(engine.take_gradient())
    actual["gradients"] = [whole(engine, gradient) for gradient in taken]
    actual["dot"] = [engine.dot(taken[i], taken[j]) for i, j in ((0, 1), (0, 0))]
    accumulate(engine, 2, factor=float("nan"))
    assert not all(bool(part.isfinite().all()) for part in engine.take_gradient())
    after = [update(engine, 0), update(engine, 1)]
    actual["with"] = {"results": after, "weights": weights_of(engine)}


def limit(engine: Engine, actual: dict) -> None:
    """Updates with a limit just below and just above their gradient's norm; the one after is as if nothing had been."""
    before = weights_of(engine)
    accumulate(engine, 0)
    norm = engine.step(0.0).grad_norm
    accumulate(engine, 0)
    actual["above"] = (norm, engine.step(1e-2, limit=0.999 * norm), before, weights_of(engine))
    accumulate(engine, 0)
    actual["below"] = (norm, engine.step(1e-2, limit=1.001 * norm), before, weights_of(engine))


def clip(engine: Engine, actual: dict) -> None:
    """Two updates whose gradients differ in size, both above the norm at which they are clipped."""
    engine.reset_optimizer()
    start = weights_of(engine)
    results = [update(engine, 0, factor=CLIPPED), update(engine, 1, factor=CLIPPED / 100)]
    actual["clipped"] = (start, weights_of(engine), [result.grad_norm for result in results])


def interleave(engine: Engine, actual: dict) -> None:
    """Updates by turns with several sets of moments; before each, the gradient that AdamW gets."""
    from deepspeed.utils import safe_get_full_grad

    engine.reset_optimizer()
    actual["start"] = weights_of(engine)
    actual["turns"] = []
    for turn, name in enumerate(("main", "other", "main", "main", "other", "reset other", "other", "main")):
        if name == "reset other":
            engine.use_optimizer("other")
            engine.reset_optimizer()
            actual["turns"].append((name, None, None))
            continue
        engine.use_optimizer(name)
        accumulate(engine, turn)
        gradient = {n: safe_get_full_grad(p).clone() for n, p in engine.network.named_parameters()}
        engine.step(1e-2)
        actual["turns"].append((name, gradient, weights_of(engine)))


def resume(engine: Engine, fresh: Engine, scratch: Path, actual: dict) -> None:
    """Saves, goes on, and does the same again from the checkpoint in another engine."""
    world = engine.world
    engine.use_optimizer("other")
    engine.save(scratch, "step_7.partial", {"step": 7})
    world.barrier()
    if world.is_main:
        (scratch / "step_7.partial").rename(scratch / "step_7")
    world.barrier()
    # The engine that continues has a history of its own, none of which may survive.
    for name in ("other", "third"):
        fresh.use_optimizer(name)
        update(fresh, 3)
    actual["state"] = fresh.load(scratch, "step_7")
    for key, each in (("went on", engine), ("resumed", fresh)):
        # The set in use goes on being so, without being named.
        update(each, 4)
        for variant, name in enumerate(("main", "third", "other", "main")):
            each.use_optimizer(name)
            update(each, variant)
        actual[key] = weights_of(each)
    world.barrier()
    (scratch / "step_7" / f"moments_rank_{world.rank}.pt").unlink()
    with pytest.raises(ModelError, match="cannot be read .*moments_rank_"):
        fresh.load(scratch, "step_7")
    with pytest.raises(ModelError, match="step_8.*cannot be read"):
        fresh.load(scratch, "step_8")


def norms_of(engine: Engine) -> Tensor:
    """`score_norms` of all trajectories on the first rank; all others pass none."""
    ids = [(t.prompt_ids, t.response_ids) for t in trajectories()]
    norms = engine.score_norms(ids if engine.world.is_main else [])
    return engine.world.gather(norms)[0]


def halve(engine: Engine, actual: dict) -> None:
    """In bfloat16, the gradients of the micro-batches added up here, and as the engine adds them up."""
    taken: list[list[Tensor]] = []
    accumulate(engine, 0, after=lambda: taken.append(engine.take_gradient()))
    actual["added here"] = whole(engine, [torch.stack(parts).sum(dim=0) for parts in zip(*taken, strict=True)])
    accumulate(engine, 0)
    actual["added there"] = whole(engine, engine.take_gradient())


def settings_of(engine: Engine) -> dict[str, object]:
    """What DeepSpeed has made of its configuration."""
    zero = engine._engine.optimizer
    return {
        "optimizer": zero.offload_optimizer,
        "parameters": zero.offload_param,
        "bucket": zero.reduce_bucket_size,
        "groups": len(zero.fp16_groups),
    }


def main(
    model: str, output: str, scratch: str, offload: str, config: str = "{}", checkpointing: Checkpointing = "none"
) -> None:
    world, deepspeed = connect(), DeepspeedConfig(offload, json.loads(config))

    def engine_of(model: str, world: World, max_grad_norm: float, dtype: str = "float32") -> Engine:
        optimizer = OptimizerConfig(max_grad_norm=max_grad_norm, weight_decay=0.1)
        return Engine(
            ModelConfig(path=model, dtype=dtype, gradient_checkpointing=checkpointing),
            optimizer,
            world,
            deepspeed=deepspeed,
        )

    actual: dict = {"settings": settings_of(engine_of(model, world, 0.5))}
    clipped, plain = engine_of(model, world, 0.5), engine_of(model, world, 0.5)
    take(clipped, actual)
    actual["without"] = {"results": [update(plain, 0), update(plain, 1)], "weights": weights_of(plain)}
    engine = engine_of(model, world, 0.0)
    interleave(engine, actual)
    clip(plain, actual)
    limit(engine_of(model, world, 0.5), actual)
    actual["norms"] = (weights_of(engine), norms_of(engine))
    resume(engine, engine_of(model, world, 0.0), Path(scratch), actual)
    halve(engine_of(model, world, 0.0, "bfloat16"), actual)
    if world.is_main:
        torch.save(actual, output)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
