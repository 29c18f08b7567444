"""One step's trajectories: prompts are drawn, responses sampled and verified, demonstrations and pairs added.

Which prompts a step has and with which seeds they are sampled follows from (seed, step) alone, and, where prompts are
drawn anew, from the rollouts before. So a resumed run needs no random state and the batch does not depend on the number
of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from upge.algorithm import Algorithm
from upge.data import Example
from upge.errors import DataError
from upge.rollout import Rollout, Sampling
from upge.train.config import RunConfig
from upge.train.distributed import World
from upge.train.order import (
    demonstration_choice,
    held_out,
    least_used,
    mixed_indices,
    permutation,
    stream_seed,
)
from upge.train.trajectory import Trajectory, assemble, has_pair, usable
from upge.train.verified import Responder
from upge.verify import Verdict

#: The stream of prompts that the steps train on, and that of prompts kept apart from it.
TRAIN, HELD_OUT = "train", "held out"


class Collector:
    """Makes a step's trajectories; the same list on every rank, ordered by prompt, rollouts before demonstrations, the
    chosen side of a pair before the rejected one.

    Args:
        config, algorithm, examples, world: of the run; examples are the training set.
        responder: samples and verifies; None if the algorithm has no rollouts.
        stop_token_ids: end a response.
        weights: the share of the prompts that each source of a mixture gets; empty: all examples come alike.
        reserve: keeps a tenth of the training set apart: no step trains on it, and `HELD_OUT` is the stream of these.

    Raises:
        DataError: no example, none of a source, or none of those kept apart has what the algorithm needs.
    """

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm,
        examples: Sequence[Example],
        responder: Responder | None,
        stop_token_ids: tuple[int, ...],
        world: World,
        weights: Mapping[str, float] | None = None,
        reserve: bool = False,
    ) -> None:
        self.config, self.examples, self.world, self.responder = config, examples, world, responder
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
        self.weights = dict(weights or {"": 1.0})
        source = (lambda i: examples[i].problem.source) if weights else (lambda i: "")
        self.strata = {name: [i for i in self.streams[TRAIN] if source(i) == name] for name in self.weights}
        for name, members in self.strata.items():
            if not members and self.weights[name] > 0:
                raise DataError(
                    f"data.weights.{name}: '{algorithm.name}' finds no training example in this data set with what it "
                    "needs; set its weight to 0, or leave the data set out"
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
            indices = mixed_indices(step, count, self.strata, self.weights, seed)
        else:
            indices = self._apart(step, min(count, len(there)))
            seeds = ("rollout", stream, step)
        figures: dict[str, float] = {"time/rollout": 0.0, "time/verify": 0.0}
        found: list[Trajectory] = []
        if self.needs.rollouts:
            found = self._rollouts(indices, seeds, figures)
            if self.redraws is not None and stream == TRAIN:
                indices, found = self._redrawn(indices, found, step, figures)
        found += [t for group, index in enumerate(indices) for t in self._given(group, index, step)]
        # The sort is stable and a prompt's rollouts are in order of sampling.
        return sorted(found, key=lambda t: (t.group, t.is_demonstration)), figures

    def _apart(self, step: int, count: int) -> list[int]:
        """Examples of those kept apart, drawn anew each step; of a mixture's sources by their weights."""
        there, seed = self.streams[HELD_OUT], stream_seed(self.config.seed, "order", HELD_OUT, step)
        if len(self.weights) == 1:
            return [there[place] for place in permutation(len(there), seed)[:count]]
        strata = {name: [i for i in there if self.examples[i].problem.source == name] for name in self.weights}
        return mixed_indices(0, count, strata, {n: self.weights[n] if strata[n] else 0.0 for n in strata}, seed)

    def demonstrations(self, indices: Iterable[int], step: int) -> list[Trajectory]:
        """The demonstrations of these examples, those of one example a group; examples without one are passed over."""
        having = [i for i in indices if self.examples[i].demonstrations]
        return [t for group, index in enumerate(having) for t in self._demonstrations(group, index, step)]

    def _others(self, missing: Mapping[str, int], used: Sequence[int], *seed: int | str) -> list[int]:
        """So many examples of each source, as long as possible not of `used`, in an order of the seed's parts."""
        found: list[int] = []
        for name, count in missing.items():
            there = self.strata[name]
            places = {index: place for place, index in enumerate(there)}
            known = [places[index] for index in used if index in places]
            order = least_used(count, len(there), known, stream_seed(self.config.seed, *seed, *filter(None, [name])))
            found += [there[place] for place in order]
        return found

    def _missing(self, wanted: Sequence[int], kept: Sequence[int]) -> dict[str, int]:
        """Of each source, how many of the `wanted` examples are not yet replaced by one that was kept."""
        counts = {n: sum(i in s for i in wanted) - sum(i in s for i in kept) for n, s in self._sets().items()}
        return {name: count for name, count in counts.items() if count > 0}

    def _sets(self) -> dict[str, set[int]]:
        return {name: set(members) for name, members in self.strata.items()}

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
            indices = self._others(self._missing(first[0], kept), tried + kept, "redraw", step, rounds)
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
        own = [stream_seed(config.seed, *seeds, g) for g in mine]
        examples = [self.examples[indices[g]] for g in mine]
        responses = self.responder.respond(examples, config.group_size, self.sampling, own)
        figures["time/rollout"] += responses.sampling
        figures["time/verify"] += responses.verifying
        found = [
            _rollout(indices[g], g, example, *response)
            for g, example, group in zip(mine, examples, responses.groups, strict=True)
            for response in group
        ]
        everywhere = [trajectory for part in world.gather(found) for trajectory in part]
        return sorted(everywhere, key=lambda t: t.group)

    def _given(self, group: int, index: int, step: int) -> list[Trajectory]:
        """What the data set has to say to a prompt: demonstrations, or a pair, whose chosen side is the first of
        them, and the rejected side."""
        example = self.examples[index]
        if self.needs.preference_pairs and has_pair(example):
            chosen = _demonstration(index, group, example, 0)
            rejected = replace(chosen, response_ids=tuple(example.rejected_ids), reward=0.0, preference=-1)
            return [replace(chosen, preference=1), rejected]
        return self._demonstrations(group, index, step) if self.needs.demonstrations else []

    def _demonstrations(self, group: int, index: int, step: int) -> list[Trajectory]:
        """Those of a prompt that have their turn in this step."""
        example, wanted = self.examples[index], self.config.data_policy.demonstrations
        count = len(example.demonstrations)
        if wanted == 0 or wanted >= count:
            return [_demonstration(index, group, example, choice) for choice in range(count)]
        first = demonstration_choice(step, index, count, self.config.seed)
        return [_demonstration(index, group, example, (first + i) % count) for i in range(wanted)]


def _rollout(index: int, group: int, example: Example, rollout: Rollout, verdict: Verdict) -> Trajectory:
    return Trajectory(
        example=index,
        group=group,
        prompt_ids=example.prompt_ids,
        response_ids=rollout.token_ids,
        reward=verdict.reward,
        is_demonstration=False,
        sampler_logprobs=rollout.logprobs,
        finished=rollout.finished,
        status=verdict.status,
    )


def _demonstration(index: int, group: int, example: Example, choice: int) -> Trajectory:
    response = tuple(example.demonstrations[choice])
    return Trajectory(index, group, example.prompt_ids, response, 1.0, is_demonstration=True)
