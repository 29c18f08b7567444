"""One step's trajectories: prompts are drawn, responses sampled and verified, demonstrations and pairs added.

Which prompts a step has and with which seeds they are sampled follows from (seed, step) alone, and, where prompts are
drawn anew, from the rollouts before. So a resumed run needs no random state and the batch does not depend on the number
of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.data import Example
from upge.errors import DataError
from upge.rollout import Sampler, Sampling
from upge.train.config import RunConfig
from upge.train.distributed import World
from upge.train.order import held_out, least_used, permutation, prompt_indices, stream_seed
from upge.trajectories import Trajectories
from upge.verify import VerifierPool

#: The stream of prompts that the steps train on, and that of prompts kept apart from it.
TRAIN, HELD_OUT = "train", "held out"


@dataclass(frozen=True)
class Trajectory:
    """One response of the step: a rollout, a demonstration or the rejected side of a pair.

    Attributes:
        example: index of its prompt in the training set.
        group: index of its prompt within the step.
        is_demonstration: True for all that comes from the data set.
        sampler_logprobs: as the inference engine reported them; None for a demonstration.
        finished: False if the response was cut at the length limit.
        status: of the verification: 'ok', 'timeout' or 'error'; 'demonstration' where nothing was verified.
        preference: +1 for the chosen side of a pair, -1 for the rejected one, 0 for neither.
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
    preference: int = 0


def has_pair(example: Example) -> bool:
    """True if the example has both sides of a preference pair."""
    return example.demonstration_ids is not None and example.rejected_ids is not None


def usable(examples: Sequence[Example], needs: Any) -> list[int]:
    """Indices of the examples from which something can be learned: all where the algorithm has rollouts, else those
    with a demonstration or a pair, whichever it `needs`."""
    return [
        i
        for i, example in enumerate(examples)
        if needs.rollouts
        or (needs.demonstrations and example.demonstration_ids is not None)
        or (needs.preference_pairs and has_pair(example))
    ]


def decode(tokenizer: Any, responses: Sequence[Sequence[int]]) -> list[str]:
    """The responses as text, without special tokens; no responses, no texts (where the tokenizer would make one)."""
    return tokenizer.batch_decode(list(responses), skip_special_tokens=True) if responses else []


class Collector:
    """Makes a step's trajectories; the same list on every rank, ordered by prompt, rollouts before demonstrations, the
    chosen side of a pair before the rejected one.

    With `reserve` a tenth of the training set is kept apart: no step trains on it, and `HELD_OUT` is the stream of
    these.

    Raises:
        DataError: no example has what the algorithm needs, or none of those kept apart has.
    """

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
        reserve: bool = False,
    ) -> None:
        self.config, self.examples, self.world = config, examples, world
        self.sampler, self.pool, self.tokenizer = sampler, pool, tokenizer
        self.sampling = Sampling(
            temperature=config.rollout.temperature,
            # No nucleus in training: the trainer's log-probs are of the full distribution at this temperature.
            max_tokens=config.rollout.max_response_tokens,
            stop_token_ids=stop_token_ids,
        )
        self.needs, self.redraws = algorithm.step_needs, algorithm.sampling
        serving = usable(examples, self.needs)
        apart = set(held_out(len(examples), config.seed)) if reserve else set()
        self.streams = {TRAIN: [i for i in serving if i not in apart], HELD_OUT: [i for i in serving if i in apart]}
        for stream, found in self.streams.items():
            if not found and (stream == TRAIN or reserve):
                which = "" if stream == TRAIN else f" among the {len(apart)} kept apart for its validation"
                raise DataError(
                    f"'{algorithm.name}' finds none of {len(examples)} training examples with the demonstrations or "
                    f"preference pairs that it needs{which}; choose data that has them"
                )

    def collect(self, step: int, stream: str = TRAIN) -> tuple[list[Trajectory], dict[str, float]]:
        """The trajectories of a step (counted from 0), and figures of how they came about.

        Args:
            step: follows its place in the order of prompts.
            stream: TRAIN, or HELD_OUT, whose prompts are drawn anew each step, as many as a step has or as there are.

        Returns:
            Trajectories, and the seconds that sampling and verifying took here ('time/rollout', 'time/verify'). Where
            prompts are drawn anew also how often the step has sampled ('sampling/rounds') and for how many prompts
            ('sampling/prompts').
        """
        count, there, seed = self.config.prompts_per_step, self.streams[stream], self.config.seed
        seeds: tuple[int | str, ...] = ("rollout", step)
        if stream == TRAIN:
            places = prompt_indices(step, count, len(there), seed)
        else:
            places = permutation(len(there), stream_seed(seed, "order", stream, step))[:count]
            seeds = ("rollout", stream, step)
        indices = [there[place] for place in places]
        figures: dict[str, float] = {"time/rollout": 0.0, "time/verify": 0.0}
        found: list[Trajectory] = []
        if self.needs.rollouts:
            found = self._rollouts(indices, seeds, figures)
            if self.redraws is not None and stream == TRAIN:
                indices, found = self._redrawn(indices, found, step, figures)
        found += [t for group, index in enumerate(indices) for t in self._given(group, index)]
        # The sort is stable and a prompt's rollouts are in order of sampling.
        return sorted(found, key=lambda t: (t.group, t.is_demonstration)), figures

    def demonstrations(self, indices: Iterable[int]) -> list[Trajectory]:
        """The demonstrations of these examples, each a group of its own; examples without one are passed over."""
        having = [i for i in indices if self.examples[i].demonstration_ids is not None]
        return [self._demonstration(group, index) for group, index in enumerate(having)]

    def _others(self, count: int, used: Iterable[int], *seed: int | str) -> list[int]:
        """`count` examples, as long as possible not of `used`, in an order of the seed's parts."""
        there = self.streams[TRAIN]
        places = {index: place for place, index in enumerate(there)}
        known = [places[index] for index in used if index in places]
        order = least_used(count, len(there), known, stream_seed(self.config.seed, *seed))
        return [there[place] for place in order]

    def _redrawn(
        self, indices: list[int], rollouts: list[Trajectory], step: int, figures: dict[str, float]
    ) -> tuple[list[int], list[Trajectory]]:
        """The prompts on which the gate is open, with their rollouts: of the first round, and of those made to replace
        what it closed. If it is open on none, the first round as it is."""
        wanted, first, tried, rounds = self.config.prompts_per_step, (indices, rollouts), list(indices), 1
        kept: list[int] = []
        found: list[Trajectory] = []
        while True:
            for group, members in self._open(rollouts, step):
                found += [replace(t, group=len(kept)) for t in members]
                kept.append(indices[group])
            if len(kept) == wanted or rounds == self.redraws.rounds:
                break
            # Kept ones count twice, so that in a small data set they come last.
            indices = self._others(wanted - len(kept), tried + kept, "redraw", step, rounds)
            rollouts = self._rollouts(indices, ("rollout", step, rounds), figures)
            tried += indices
            rounds += 1
        figures |= {"sampling/rounds": rounds, "sampling/prompts": len(tried)}
        return (kept, found) if kept else first

    def _open(self, rollouts: list[Trajectory], step: int) -> list[tuple[int, list[Trajectory]]]:
        """The groups, in order, on one of whose rollouts the gate is not 0."""
        closed = self.redraws.gate.closed(assemble(rollouts, step)).tolist()
        groups: dict[int, list[Trajectory]] = {}
        for trajectory in rollouts:
            groups.setdefault(trajectory.group, []).append(trajectory)
        is_open = {t.group for t, shut in zip(rollouts, closed, strict=True) if not shut}
        return [(group, members) for group, members in groups.items() if group in is_open]

    def _rollouts(
        self, indices: list[int], seeds: tuple[int | str, ...], figures: dict[str, float]
    ) -> list[Trajectory]:
        """All ranks' verified rollouts of these prompts, numbered from 0; each rank samples its share of them."""
        config, world = self.config, self.world
        mine = list(range(world.rank, len(indices), world.size))
        began = time.perf_counter()
        prompts = [self.examples[indices[g]].prompt_ids for g in mine]
        own = [stream_seed(config.seed, *seeds, g) for g in mine]
        groups = self.sampler.sample(prompts, config.group_size, self.sampling, own)
        sampled = time.perf_counter()
        figures["time/rollout"] += sampled - began
        found = self._verified(mine, indices, groups)
        figures["time/verify"] += time.perf_counter() - sampled
        everywhere = [trajectory for part in world.gather(found) for trajectory in part]
        return sorted(everywhere, key=lambda t: t.group)

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

    def _given(self, group: int, index: int) -> list[Trajectory]:
        """What the data set has to say to a prompt: the demonstration, which in a pair is the chosen side, and the
        rejected one."""
        if self.needs.preference_pairs and has_pair(self.examples[index]):
            chosen = self._demonstration(group, index)
            rejected = replace(chosen, response_ids=self.examples[index].rejected_ids, reward=0.0, preference=-1)
            return [replace(chosen, preference=1), rejected]
        if self.needs.demonstrations and self.examples[index].demonstration_ids is not None:
            return [self._demonstration(group, index)]
        return []

    def _demonstration(self, group: int, index: int) -> Trajectory:
        example = self.examples[index]
        return Trajectory(index, group, example.prompt_ids, example.demonstration_ids, 1.0, is_demonstration=True)


def assemble(trajectories: Sequence[Trajectory], step: int) -> Trajectories:
    """The batch without log-probs: what can be known before the forward pass. Float64, for exact counts."""
    lengths = torch.tensor([len(t.response_ids) for t in trajectories], dtype=torch.int64)
    width = int(lengths.max()) if len(trajectories) else 1
    mask = torch.arange(width) < lengths[:, None]
    return Trajectories(
        logprobs=None,
        response_mask=mask,
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float64),
        group=torch.tensor([t.group for t in trajectories], dtype=torch.int64),
        is_demonstration=torch.tensor([t.is_demonstration for t in trajectories], dtype=torch.bool),
        sampler_logprobs=_sampler_column(trajectories, mask),
        preference=torch.tensor([t.preference for t in trajectories], dtype=torch.int64),
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
