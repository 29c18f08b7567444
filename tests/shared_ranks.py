"""Run by tests/upge/rollout/test_shared_engine.py on several ranks: an engine over two ranks that makes responses up.

usage: shared_ranks.py OUTPUT

Its engine does what vLLM does in tensor parallelism: every step is a collective of the engine's ranks, and a step in
which they hold different requests is an error. OUTPUT gets what every rank saw, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from upge.rollout.base import Arrived, Poll, Request, Rollout, Sampler, Sampling
from upge.rollout.shared_engine import SharedSampler, share

RANKS, SIZE, COPIES = 4, 2, 3
SAMPLING = Sampling(max_tokens=5)
#: Prompts by rank, with their seeds: a rank without work, and engines without any.
SPLITS = {
    "even": [[(5, 6), (7,)], [(8, 9, 10)], [(11,)], [(12, 13)]],
    "idle ranks": [[], [(5,), (6, 7)], [(8,)], []],
    "idle engine": [[], [], [(5,)], [(6,), (7,)]],
    "nothing": [[], [], [], []],
}


class MadeUp(Sampler):
    """One token of every request for each step. `diverging` draws other tokens on the engine's last rank."""

    name = "made up"

    def __init__(self, group: dist.ProcessGroup | None, diverging: bool = False) -> None:
        self.reason, self.threads, self.max_length, self.vocabulary = "for a test", None, 64, 50
        self.group, self.shift, self._usable, self.loaded = group, 0, True, 0.0
        if diverging and group is not None:
            self.shift = dist.get_rank(group)

    def _sample(self, requests: Sequence[Request], sampling: Sampling, complete: Arrived, poll: Poll) -> None:
        names = [(r.index, r.copy, r.prompt, r.seed) for r in requests]
        # The shorter the prompt, the earlier its responses end.
        for step in range(max(len(r.prompt) for r in requests) + 1):
            if self.group is not None:
                others: list[Any] = [None] * dist.get_world_size(self.group)
                dist.all_gather_object(others, (step, names), group=self.group)
                assert all(other == (step, names) for other in others), others
            poll()
            for request in requests:
                if len(request.prompt) == step:
                    complete(request.index, request.copy, made_up(request, sampling, self.shift))

    def _load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loaded = sum(float(tensor.sum()) for _, tensor in weights)


def made_up(request: Request, sampling: Sampling, shift: int = 0) -> Rollout:
    tokens = tuple((request.seed + sum(request.prompt) * i + shift) % 50 for i in range(sampling.max_tokens))
    return Rollout(tokens, tuple(-float(token) for token in tokens), False)


def plain(groups: list[list[Rollout]]) -> list:
    return [[list(rollout.token_ids) for rollout in group] for group in groups]


def attempt(function: Callable[[], object]) -> str:
    """The error of a call."""
    try:
        function()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def seeds_of(prompts: list) -> list[int]:
    return [sum(prompt) for prompt in prompts]


def observe(rank: int, sampler: SharedSampler) -> dict:
    """What this rank sees of an engine with `SIZE` ranks."""
    results: dict = {"rollouts": {}, "arrived": {}}
    for name, split in SPLITS.items():
        prompts, arrived = split[rank], []
        groups = sampler.sample(
            prompts, COPIES, SAMPLING, seeds_of(prompts), lambda i, c, r, rows=arrived: rows.append([i, c])
        )
        results["rollouts"][name], results["arrived"][name] = plain(groups), arrived
    prompts = SPLITS["even"][rank]
    seeds = seeds_of(prompts)

    def fails(index: int, copy: int, rollout: Rollout) -> None:
        if rank == 1:
            raise KeyError("from the caller")

    def interrupted(index: int, copy: int, rollout: Rollout) -> None:
        if rank == 1 and copy == 0:
            os.kill(os.getpid(), signal.SIGINT)

    calls = {
        "callback": lambda: sampler.sample(prompts, COPIES, SAMPLING, seeds, fails),
        "interrupt": lambda: sampler.sample(prompts, COPIES, SAMPLING, seeds, interrupted),
        "seeds": lambda: sampler.sample(prompts, COPIES, SAMPLING, seeds[: -(rank == 1) or None]),
        "prompt": lambda: sampler.sample([()] if rank == 1 else prompts, COPIES, SAMPLING, seeds),
        "different n": lambda: sampler.sample(prompts, 1 if rank == 1 else COPIES, SAMPLING, seeds),
    }
    results["errors"] = {name: attempt(call) for name, call in calls.items()}
    results["handler_kept"] = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    results["after errors"] = plain(sampler.sample(prompts, COPIES, SAMPLING, seeds))
    sampler.load_weights([("a", torch.ones(3))])
    results["loaded"] = sampler.engine.loaded
    return results


def main(output: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    engines = [dist.new_group(list(range(first, first + SIZE)), backend="gloo") for first in range(0, RANKS, SIZE)]
    own = engines[rank // SIZE]
    results = observe(rank, share(MadeUp(own), SIZE))
    diverging = share(MadeUp(own, diverging=True), SIZE)
    results["diverging"] = attempt(lambda: diverging.sample([(1, 2)], 1, SAMPLING, [3]))
    rows: list = [None] * RANKS
    dist.all_gather_object(rows, results)
    if rank == 0:
        Path(output).write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
