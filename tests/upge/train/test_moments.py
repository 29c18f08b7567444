"""Named sets of AdamW's moments: each keeps its own, and a checkpoint has all of them."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch

from upge.train.moments import Moments


def optimizer() -> SimpleNamespace:
    """What is read of DeepSpeed's optimizer: the moments in use, and the partitions that they belong to."""
    return SimpleNamespace(state=defaultdict(dict), fp32_partitioned_groups_flat=[torch.zeros(2), torch.zeros(3)])


def update(zero: SimpleNamespace, step: float) -> None:
    """Gives the first partition the moments of an update."""
    moments = {"step": torch.tensor(step), "exp_avg": torch.full((2,), step), "exp_avg_sq": torch.full((2,), step**2)}
    zero.state[zero.fp32_partitioned_groups_flat[0]] = moments


def values(zero: SimpleNamespace) -> list[dict[str, list]]:
    """The moments in use, partition by partition."""
    return [{k: v.tolist() for k, v in zero.state.get(p, {}).items()} for p in zero.fp32_partitioned_groups_flat]


FIRST = [{"step": 1.0, "exp_avg": [1.0, 1.0], "exp_avg_sq": [1.0, 1.0]}, {}]
SECOND = [{"step": 2.0, "exp_avg": [2.0, 2.0], "exp_avg_sq": [4.0, 4.0]}, {}]


def test_each_set_keeps_its_moments():
    zero = optimizer()
    moments = Moments(zero)
    update(zero, 1.0)
    moments.use("other")
    assert values(zero) == [{}, {}]
    update(zero, 2.0)
    moments.use("main")
    assert values(zero) == FIRST
    moments.use("other")
    assert values(zero) == SECOND


def test_a_checkpoint_has_the_idle_sets_and_says_which_is_in_use():
    """The one in use is in DeepSpeed's own checkpoint."""
    zero = optimizer()
    moments = Moments(zero)
    update(zero, 1.0)
    moments.use("other")
    update(zero, 2.0)
    saved = moments.state()
    fresh = optimizer()
    resumed = Moments(fresh)
    update(fresh, 2.0)
    resumed.restore(saved["in_use"], saved["idle"])
    assert resumed.in_use == "other" and values(fresh) == SECOND
    resumed.use("main")
    assert values(fresh) == FIRST
    resumed.use("other")
    assert values(fresh) == SECOND
