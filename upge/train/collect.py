"""One step's trajectories: prompts are drawn, responses sampled and verified, demonstrations added.

Which prompts a step has and with which seeds they are sampled follows from (seed, step) alone, so a resumed run needs
no random state and the batch does not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.data import Example
from upge.rollout import Sampler, Sampling
from upge.train.config import RunConfig
from upge.train.distributed import World
from upge.trajectories import Trajectories
from upge.verify import VerifierPool


@dataclass(frozen=True)
class Trajectory:
    """One response of the step, a rollout or a demonstration.

    Attributes:
        example: index of its prompt in the training set.
        group: index of its prompt within the step.
        sampler_logprobs: as the inference engine reported them; None for a demonstration.
        finished: False if the response was cut at the length limit.
        status: of the verification: 'ok', 'timeout' or 'error'; 'demonstration' where nothing was verified.
    """

    example: int
    group: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reward: float
    is_demonstration: bool
    sampler_logprobs: tuple[float, ...] | None = None
    finished: bool = True
    status: str = "demonstration"


def prompt_indices(step: int, prompts_per_step: int, size: int, seed: int) -> list[int]:
    """The prompts of a step (counted from 0): a stream of seeded permutations of the data set, cut into steps."""
    found: list[int] = []
    position = step * prompts_per_step
    while len(found) < prompts_per_step:
        epoch, start = divmod(position + len(found), size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(stream_seed(seed, "order", epoch)))
        found += order[start : start + prompts_per_step - len(found)].tolist()
    return found


def stream_seed(*parts: int | str) -> int:
    """A 31-bit seed from any numbers and words; different parts give unrelated seeds, on every machine alike."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def decode(tokenizer: Any, responses: Sequence[Sequence[int]]) -> list[str]:
    """The responses as text, without special tokens; no responses, no texts (where the tokenizer would make one)."""
    return tokenizer.batch_decode(list(responses), skip_special_tokens=True) if responses else []


class Collector:
    """Makes a step's trajectories; the same list on every rank, ordered by prompt, rollouts before demonstrations."""

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm,
        examples: Sequence[Example],
        sampler: Sampler | None,
        pool: VerifierPool | None,
        tokenizer: Any,
        stop_token_ids: tuple[int, ...],
        world: World,
    ) -> None:
        self.config, self.examples, self.world = config, examples, world
        self.sampler, self.pool, self.tokenizer = sampler, pool, tokenizer
        self.needs = algorithm.needs
        self.sampling = Sampling(
            temperature=config.rollout.temperature,
            # No nucleus in training: the trainer's log-probs are of the full distribution at this temperature.
            max_tokens=config.rollout.max_response_tokens,
            stop_token_ids=stop_token_ids,
        )

    def collect(self, step: int) -> tuple[list[Trajectory], dict[str, float]]:
        """The trajectories of a step (counted from 0), and how many seconds sampling and verifying took here."""
        config, world = self.config, self.world
        indices = prompt_indices(step, config.prompts_per_step, len(self.examples), config.seed)
        mine = list(range(world.rank, len(indices), world.size))
        times = {"time/rollout": 0.0, "time/verify": 0.0}
        found: list[Trajectory] = []
        if self.needs.rollouts:
            began = time.perf_counter()
            prompts = [self.examples[indices[g]].prompt_ids for g in mine]
            seeds = [stream_seed(config.seed, "rollout", step, g) for g in mine]
            groups = self.sampler.sample(prompts, config.group_size, self.sampling, seeds)
            times["time/rollout"] = time.perf_counter() - began
            began = time.perf_counter()
            found = self._verified(mine, indices, groups)
            times["time/verify"] = time.perf_counter() - began
        if self.needs.demonstrations:
            found += [self._demonstration(g, indices[g]) for g in mine if self._has_demonstration(indices[g])]
        everywhere = [trajectory for part in world.gather(found) for trajectory in part]
        # The sort is stable and each rank lists a prompt's rollouts in order of sampling.
        return sorted(everywhere, key=lambda t: (t.group, t.is_demonstration)), times

    def _verified(self, mine: list[int], indices: list[int], groups: list) -> list[Trajectory]:
        flat = [(g, rollout) for g, group in zip(mine, groups, strict=True) for rollout in group]
        texts = decode(self.tokenizer, [r.token_ids for _, r in flat])
        problems = [self.examples[indices[g]].problem for g, _ in flat]
        items = [(text, p.answer, p.prompt) for text, p in zip(texts, problems, strict=True)]
        verdicts = self.pool.score(items)
        return [
            Trajectory(
                example=indices[g],
                group=g,
                prompt_ids=self.examples[indices[g]].prompt_ids,
                response_ids=rollout.token_ids,
                reward=verdict.reward,
                is_demonstration=False,
                sampler_logprobs=rollout.logprobs,
                finished=rollout.finished,
                status=verdict.status,
            )
            for (g, rollout), verdict in zip(flat, verdicts, strict=True)
        ]

    def _has_demonstration(self, index: int) -> bool:
        return self.examples[index].demonstration_ids is not None

    def _demonstration(self, group: int, index: int) -> Trajectory:
        example = self.examples[index]
        return Trajectory(index, group, example.prompt_ids, example.demonstration_ids, 1.0, is_demonstration=True)


def assemble(trajectories: Sequence[Trajectory], step: int) -> Trajectories:
    """The batch without log-probs: what can be known before the forward pass. Float64, for exact counts."""
    lengths = torch.tensor([len(t.response_ids) for t in trajectories])
    width = int(lengths.max()) if len(trajectories) else 1
    mask = torch.arange(width) < lengths[:, None]
    return Trajectories(
        logprobs=None,
        response_mask=mask,
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float64),
        group=torch.tensor([t.group for t in trajectories]),
        is_demonstration=torch.tensor([t.is_demonstration for t in trajectories], dtype=torch.bool),
        sampler_logprobs=_sampler_column(trajectories, mask),
        step=step,
    )


def _sampler_column(trajectories: Sequence[Trajectory], mask: Tensor) -> Tensor | None:
    """[B, T]; zero for demonstrations, which no engine sampled; None without rollouts."""
    if all(t.sampler_logprobs is None for t in trajectories):
        return None
    column = torch.zeros(mask.shape)
    for row, trajectory in enumerate(trajectories):
        if trajectory.sampler_logprobs is not None:
            column[row, : len(trajectory.sampler_logprobs)] = torch.tensor(trajectory.sampler_logprobs)
    return column
