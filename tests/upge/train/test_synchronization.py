"""No chunk of the output head waits for the device: none reads a number or has a size that depends on data."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import algorithms
from experiments.doctor.gradients import completed, shipped, trajectories
from upge.algorithm import Algorithm
from upge.logprobs import Coefficients, token_logprobs, token_loss
from upge.train.config import OptimizerConfig
from upge.train.micro_batches import Costs
from upge.train.packed_policy import Objective
from upge.train.packing import PackedBatch, pack
from upge.train.step_batch import StepBatch
from upge.train.update import PolicyPasses, Update, Updater

VOCABULARY, WIDTH, CHUNK = 31, 8, 9
ALGORITHMS = {name: one for name, one in shipped().items() if one.takes_chunks}
aten = torch.ops.aten
#: They copy a number to the host, or have a result whose size follows from the data.
WAITING = {
    aten._local_scalar_dense, aten.is_nonzero, aten.item, aten.equal, aten.nonzero, aten.masked_select, aten.argwhere,
    aten.unique_consecutive, aten._unique, aten._unique2, aten.unique_dim, aten.repeat_interleave, aten.bincount,
}  # fmt: skip


class NothingWaits(TorchDispatchMode):
    """Refuses operations that would wait for a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        by_mask = packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert packet not in WAITING and not by_mask, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class HeadAlone:
    """The part of an engine that an update calls, with fixed hidden states in place of a trunk."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.world = SimpleNamespace(
            size=1, rank=0, device=torch.device("cpu"), gather=lambda one: [one], broadcast=lambda one: one
        )
        self.costs = Costs(0.1, 0.1)
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=g, requires_grad=True)
        self.table = torch.randn(VOCABULARY, WIDTH, generator=g)
        self.chunks = 0

    def pack(self, pairs: list[Any]) -> PackedBatch:
        return pack(pairs, "cpu")

    def logprobs(self, packed: PackedBatch, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        hidden = self.table[packed.input_ids[0]].index_select(0, packed.predictors)
        return token_logprobs(hidden, self.weight, packed.targets, entropy=entropy)

    def loss(self, packed: PackedBatch, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.table[packed.input_ids[0]].index_select(0, packed.predictors).requires_grad_()
        self.chunks += math.ceil(len(hidden) / CHUNK)
        with NothingWaits():
            return token_loss(hidden, self.weight, packed.targets, **objective._asdict(), chunk_size=CHUNK)

    def backward(self, loss: Tensor, last: bool) -> None:
        with NothingWaits():
            loss.backward()


def update(algorithm: Algorithm, find_top_tokens: bool) -> tuple[HeadAlone, PolicyPasses]:
    """The passes of an update on a fixed batch; the head fails in `NothingWaits` if a chunk waits for the device."""
    engine, members = HeadAlone(), trajectories(VOCABULARY, algorithm.needs.preference_pairs)
    shape = (len(members), max(len(t.response_ids) for t in members))
    column = torch.linspace(-3.0, -0.1, math.prod(shape)).view(shape)
    names = ("behavior_logprobs", "reference_logprobs", "values", "teacher_logprobs")
    filled = {kind: dict.fromkeys(names, column) for kind in ("plain", "pairs")}
    batch: StepBatch = completed(algorithm, filled, VOCABULARY)
    plan, rows = algorithm.plan(batch.columns), torch.arange(len(members))
    config = OptimizerConfig(micro_batch_tokens=200)
    updater = Updater(engine, algorithm, config)  # pyright: ignore[reportArgumentType]
    return engine, updater.run_micro_batches(Update(batch, plan, rows), find_top_tokens=find_top_tokens)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_chunk_of_an_update_waits(name: str) -> None:
    engine, passes = update(ALGORITHMS[name], find_top_tokens=False)
    assert passes.sums and not passes.tops
    assert engine.weight.grad is not None and engine.chunks > 2 * len(passes.logprobs), "each pass has several chunks"


def test_neither_with_diagnostics_nor_with_corrections() -> None:
    corrected = algorithms.load("grpo", corrections=["kl_k3", "entropy", "icepop"])
    for algorithm, find_top_tokens in ((algorithms.load("hpt"), True), (corrected, False)):
        engine, passes = update(algorithm, find_top_tokens)
        assert passes.sums and bool(passes.tops) == find_top_tokens
        assert engine.weight.grad is not None and engine.chunks > 2 * len(passes.logprobs)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_two_pass_head_does_not_wait(entropy: bool) -> None:
    engine = HeadAlone()
    hidden, targets = engine.table.clone().requires_grad_(), torch.arange(VOCABULARY)
    with NothingWaits():
        logprobs, entropies = token_logprobs(hidden, engine.weight, targets, entropy=entropy, chunk_size=7)
        (logprobs if entropies is None else logprobs + entropies).sum().backward()
    assert hidden.grad is not None


def reading(logprobs: Tensor) -> Tensor:
    return logprobs * float(logprobs[0])


def branching(logprobs: Tensor) -> Tensor:
    return logprobs if logprobs.isfinite().all() else -logprobs


def masking(logprobs: Tensor) -> Tensor:
    return torch.zeros_like(logprobs) + logprobs[logprobs > -2].sum()


def assigning(logprobs: Tensor) -> Tensor:
    made = logprobs.clone()
    made[logprobs > -2] = 0.5
    return made


@pytest.mark.parametrize("wrong", [reading, branching, masking, assigning])
def test_this_test_would_notice(wrong: Callable[[Tensor], Tensor]) -> None:
    def coefficients(logprobs: Tensor, entropies: Tensor, chunk: slice) -> Coefficients:
        return Coefficients(logprobs.sum(), wrong(logprobs))

    engine, targets = HeadAlone(), torch.arange(VOCABULARY)
    token_loss(engine.table, engine.weight, targets, coefficients, chunk_size=7)
    with NothingWaits(), pytest.raises(AssertionError, match="waits for the device"):
        token_loss(engine.table, engine.weight, targets, coefficients, chunk_size=7)
