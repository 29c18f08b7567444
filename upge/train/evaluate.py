"""Accuracy on the evaluation problems: greedy, pass@k and mean@k, per difficulty level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upge.data import Example
from upge.rollout import Sampling
from upge.train.config import RunConfig
from upge.train.distributed import World
from upge.train.order import stream_seed
from upge.train.verified import Responder
from upge.trajectories import SUCCESS_REWARD


def evaluate(
    config: RunConfig,
    examples: Sequence[Example],
    responder: Responder,
    stop_token_ids: tuple[int, ...],
    world: World,
) -> dict[str, Any]:
    """{"samples", "temperature", "levels": {level: figures}, "all": figures}, the same on every rank.

    figures: `problems`; `greedy`, the share solved by the one greedy response; `pass@k`, the share with at least one of
    k sampled responses right; `mean@k`, the mean share of right ones. The seeds do not depend on the training step, so
    two evaluations of the same weights agree.
    """
    mine = list(range(world.rank, len(examples), world.size))
    k = config.eval.samples
    limits = {"max_tokens": config.rollout.max_response_tokens, "stop_token_ids": stop_token_ids}
    settings = Sampling(temperature=config.eval.temperature, top_p=config.eval.top_p, **limits)
    seeds = [stream_seed(config.seed, "evaluation", i) for i in mine]
    own = [examples[i] for i in mine]
    greedy = _solved(responder, own, 1, Sampling(temperature=0.0, **limits), seeds)
    sampled = _solved(responder, own, k, settings, seeds)
    rows = [(i, g[0], s) for i, g, s in zip(mine, greedy, sampled, strict=True)]
    everywhere = sorted(row for part in world.gather(rows) for row in part)
    levels: dict[str, list] = {}
    for index, first, others in everywhere:
        levels.setdefault(examples[index].problem.level or "all", []).append((first, others))
    return {
        "samples": k,
        "temperature": config.eval.temperature,
        "levels": {level: _figures(rows, k) for level, rows in levels.items()},
        "all": _figures([row[1:] for row in everywhere], k),
    }


def _solved(
    responder: Responder, examples: Sequence[Example], n: int, sampling: Sampling, seeds: Sequence[int]
) -> list[list[bool]]:
    """Per problem, which of its n responses are right."""
    responses = responder.respond(examples, n, sampling, seeds)
    return [[verdict.reward > SUCCESS_REWARD for _, verdict in group] for group in responses.groups]


def _figures(rows: list[tuple[bool, list[bool]]], k: int) -> dict[str, float]:
    number = max(len(rows), 1)
    return {
        "problems": len(rows),
        "greedy": sum(first for first, _ in rows) / number,
        f"pass@{k}": sum(any(others) for _, others in rows) / number,
        f"mean@{k}": sum(sum(others) / k for _, others in rows) / number,
    }
