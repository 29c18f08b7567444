"""The weights of earlier steps: which ones a step samples with, what is exchanged, and checkpoints of them."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from upge.train.engine import WeightSync
from upge.train.lag import EarlierWeights, exchanged
from upge.train.resharding import layout, model_file

SHAPES = [{"a": torch.Size([3]), "b": torch.Size([2])}]


class FakePolicy:
    """One sub-group of parameters, a of 3 and b of 2 elements, in parts of `ranks`; the events of its optimizer."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.now, self.events = layout(SHAPES, ranks), []
        self.flat = torch.zeros(sum(self.now.part(size) for size in (3, 2)))
        self.zero = SimpleNamespace(
            fp16_partitioned_groups_flat=[self.flat],
            checkpoint_event_prologue=lambda: self.events.append("drop"),
            checkpoint_event_epilogue=lambda: self.events.append("gather"),
        )
        self.world = SimpleNamespace(rank=rank, size=ranks, together=nullcontext)

    def named_weights(self):
        yield "a", self.flat.clone()

    def layouts(self, model):
        return layout(SHAPES, model["ranks"]), self.now


def trained(lag: int, steps: int) -> tuple[FakePolicy, EarlierWeights, list[float | None]]:
    """A run in which the update of step s makes all weights s + 1; the weights that each step sampled with."""
    policy = FakePolicy()
    earlier, used = EarlierWeights(policy, lag), []
    for step in range(steps):
        earlier.remember(step)
        weights = earlier.of_sampler(step)
        used.append(None if weights is None else float(weights[0][0]))
        policy.flat.fill_(step + 1)
    return policy, earlier, used


@pytest.mark.parametrize(("lag", "expected"), [(1, [None, 0, 1, 2, 3]), (3, [None, 0, 0, 0, 1])])
def test_a_step_samples_with_the_weights_of_exactly_lag_steps_ago(lag, expected):
    _, earlier, used = trained(lag, 5)
    assert used == expected
    assert len(earlier._before) == lag + 1


def test_a_repeated_step_remembers_what_it_did():
    """As after an interruption, which leaves the step out."""
    policy, earlier, _ = trained(2, 3)
    earlier.remember(3)
    earlier.remember(3)
    assert float(earlier.of_sampler(3)[0][0]) == 1.0


def test_weights_are_exchanged_and_come_back():
    policy = FakePolicy()
    policy.flat.copy_(torch.randn(5))
    before = policy.flat.clone()
    with pytest.raises(KeyError), exchanged(policy.zero, [torch.full((5,), 7.0)]):
        assert policy.flat.tolist() == [7.0] * 5 and policy.events == ["drop", "gather"]
        raise KeyError
    assert torch.equal(policy.flat, before) and policy.events == ["drop", "gather"] * 2
    with exchanged(policy.zero, None):
        assert torch.equal(policy.flat, before)
    assert len(policy.events) == 4


def test_the_sampler_gets_earlier_weights_and_evaluations_present_ones():
    policy, earlier, _ = trained(2, 4)
    loaded: list[float] = []
    sampler = SimpleNamespace(
        load_weights=lambda weights: loaded.append(float(next(iter(weights))[1][0])),
        sleep=lambda: None,
        restart=lambda: None,
    )
    sync = WeightSync(sampler, policy)
    earlier.remember(4)
    stale = earlier.of_sampler(4)
    sync.refresh(stale)
    assert sync.refresh(stale) == 0.0 and loaded == [2.0]
    sync.restart()
    assert loaded == [2.0, 2.0], "the engine that failed goes on with the weights that it had"
    sync.refresh()
    assert loaded[2:] == [4.0] and float(policy.flat[0]) == 4.0
    sync.refresh(stale)
    assert loaded[3:] == [2.0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_is_read_by_any_number_of_ranks(tmp_path, ranks):
    """Steps 2 and 3 are needed after step 4 with lag 2; the padding of the parts is left out."""
    policy, earlier, _ = trained(2, 4)
    for step, weights in earlier._before.items():
        weights[0].copy_(torch.arange(5) + 10.0 * step)
    earlier.save(tmp_path, 4)
    torch.save({"ranks": 1}, model_file(tmp_path))
    whole: dict[int, list[float]] = {2: [], 3: []}
    for rank in range(ranks):
        other = EarlierWeights(FakePolicy(rank, ranks), 2)
        other.load(tmp_path)
        assert sorted(other._before) == [2, 3]
        for step, (flat,) in other._before.items():
            whole[step].append(flat)
    width = layout(SHAPES, ranks).part(3)
    for step, parts in whole.items():
        a = torch.cat([part[:width] for part in parts])[:3]
        b = torch.cat([part[width:] for part in parts])[:2]
        assert torch.cat([a, b]).tolist() == [10.0 * step + i for i in range(5)]
