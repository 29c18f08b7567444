"""A step's trajectories: prompts are drawn, responses sampled and verified, demonstrations and pairs added.

The prompts of a step and the seeds of its rollouts follow from (seed, step) and, where prompts are redrawn, from
earlier rollouts. So a resumed run needs no random state, and the batch does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from upge.algorithm import Algorithm
from upge.data import Example
from upge.data.teacher import TeacherPrompts
from upge.errors import DataError
from upge.rollout import Rollout, Sampling
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.config import RunConfig
from upge.train.distributed import World, gather_results
from upge.train.given import GivenTrajectories
from upge.train.prompt_order import held_out, least_used, mixed_indices, permutation, stream_seed
from upge.train.prompt_records import PromptReader, effective_number
from upge.train.replay import ReplayBuffer
from upge.train.sample import Trajectory, assemble, indexed, usable
from upge.train.verdicts import StepVerdicts
from upge.verify import Verdict
from upge.views import MEMORY_COLUMNS

#: The streams of prompts: those that the steps train on, and those reserved for validation.
TRAIN, HELD_OUT = "train", "held out"


class Collection(NamedTuple):
    """A step's trajectories.

    Attributes:
        trajectories: those that the step learns from, with their index.
        metrics: metrics of the collection, by name.
        verdicts: the verdicts on all sampled rollouts.
        sampled: all sampled rollouts, including those of prompts that were replaced.
    """

    trajectories: list[Trajectory]
    metrics: dict[str, float]
    verdicts: StepVerdicts = StepVerdicts()
    sampled: Sequence[Trajectory] = ()


class Collector:
    """Collects a step's trajectories.

    The list is the same on every rank. It is ordered by prompt, with rollouts before demonstrations and the chosen side
    of a pair before the rejected one.

    Args:
        config, world: the run's settings and processes.
        algorithm: the algorithm to collect for.
        examples: the training set.
        sampler: None if the algorithm has no rollouts.
        stop_token_ids: the tokens that end a response.
        weights: the share of the prompts that each source of a mixture gets; if empty, all examples have the same
            weight.
        teacher_prompts: the prompts of the teacher; None if they are the policy's.
        reserve: reserve a tenth of the training set for validation. No step trains on it; the stream `HELD_OUT` draws
            from it.

    Raises:
        DataError: the training set, a source or the reserved part has no example with what the algorithm needs.
    """

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm,
        examples: Sequence[Example],
        sampler: VerifiedSampler | None,
        stop_token_ids: tuple[int, ...],
        world: World,
        weights: Mapping[str, float] | None = None,
        reserve: bool = False,
        teacher_prompts: TeacherPrompts | None = None,
    ) -> None:
        self.teacher_prompts = teacher_prompts
        self.config, self.examples, self.world, self.sampler = config, examples, world, sampler
        # Without noise top_p is 1, because the trainer computes log-probs over the full distribution.
        noise, limits = config.rollout.noise, (config.rollout.max_response_tokens, stop_token_ids)
        self.sampling = Sampling(config.rollout.temperature, noise.top_p, *limits, noise.bfloat16_logits)
        self.needs, self.dynamic_sampling = algorithm.step_needs, algorithm.dynamic_sampling
        self.curriculum = algorithm.curriculum
        self.guidance = algorithm.guidance
        self.given = GivenTrajectories(config, self.needs, examples, {} if sampler is None else sampler.rewards)
        candidates = usable(examples, self.needs)
        reserved = set(held_out(len(examples), config.seed)) if reserve else set()
        self.streams = {
            TRAIN: [i for i in candidates if i not in reserved],
            HELD_OUT: [i for i in candidates if i in reserved],
        }
        for stream, members in self.streams.items():
            if not members and (stream == TRAIN or reserve):
                apart = f"the {len(reserved)} reserved for its validation"
                which = apart if stream == HELD_OUT else f"{len(examples)} training examples"
                which += f", without {apart}" if stream == TRAIN and reserve else ""
                raise DataError(
                    f"'{algorithm.name}' can use none of {which}; choose more data, or data with the demonstrations or "
                    "preference pairs that it needs"
                )
        self.weights = dict(weights or {"": 1.0})
        sources = {i: examples[i].problem.source if weights else "" for i in self.streams[TRAIN]}
        self.strata = {name: [i for i, source in sources.items() if source == name] for name in self.weights}
        for name, members in self.strata.items():
            if not members and self.weights[name] > 0:
                raise DataError(
                    f"data.weights.{name}: no training example of this data set has what '{algorithm.name}' needs; set "
                    "its weight to 0, or leave the data set out"
                )

    def collect(
        self,
        step: int,
        stream: str = TRAIN,
        step_in_stage: int | None = None,
        prompts: PromptReader | None = None,
        replay: ReplayBuffer | None = None,
    ) -> Collection:
        """The trajectories of a step, with metrics and verdicts.

        Args:
            step: the step of the run, counted from 0.
            stream: TRAIN, or HELD_OUT, whose prompts are redrawn in each step: as many as a step has, or all of them if
                there are fewer.
            step_in_stage: the step for schedules of guidance; None = `step`.
            prompts: what is remembered of the prompts; None if the algorithm has no memory.
            replay: the buffer whose rollouts take the places of some prompts.

        Returns:
            The collection. Its metrics are the seconds of sampling and verification on this rank ('time/rollout',
            'time/verify'); with dynamic sampling also the number of rounds ('sampling/rounds') and of sampled prompts
            ('sampling/prompts'); with a curriculum also the effective number of prompts that it draws from
            ('sampling/effective_prompts').

        Raises:
            VerifierError: a rank's verifiers cannot run; raised on all ranks.
        """
        count, candidates = self.config.prompts_per_step, self.streams[stream]
        seeds: tuple[int | str, ...] = ("rollout", step)
        weights = self._prompt_weights(prompts) if stream == TRAIN else None
        if stream == TRAIN:
            indices = mixed_indices(step, count, self.strata, self.weights, self.config.seed, weights)
        else:
            indices = self._held_out_indices(step, min(count, len(candidates)))
            seeds = ("rollout", stream, step)
        replayed = {} if replay is None else replay.draw(step, indices)
        indices = indices[: len(indices) - len(replayed)]
        rollouts, metrics, verdicts, sampled = Collection([], {"time/rollout": 0.0, "time/verify": 0.0})
        step_in_stage = step if step_in_stage is None else step_in_stage
        if self.needs.rollouts:
            rollouts, metrics, verdicts, sampled = self._rollouts(indices, seeds, step_in_stage, prompts)
            if self.dynamic_sampling is not None and stream == TRAIN:
                indices, redrawn = self._redrawn(indices, rollouts, step, step_in_stage, prompts, weights)
                rollouts, metrics = redrawn.trajectories, _sum(metrics, redrawn.metrics)
                verdicts, sampled = verdicts + redrawn.verdicts, [*sampled, *redrawn.sampled]
        if weights is not None:
            metrics |= {"sampling/effective_prompts": effective_number(weights.values())}
        if replay is not None and replayed:
            own = self._beside_replayed(list(replayed), replay.fresh_rollouts, step, step_in_stage)
            indices, rollouts = replay.joined(indices, rollouts, replayed, own.trajectories, step)
            metrics, verdicts = _sum(metrics, own.metrics), verdicts + own.verdicts
        given = [t for group, index in enumerate(indices) for t in self.given.of_prompt(group, index, step)]
        given = self._remembered(given, prompts)
        # The sort is stable and a prompt's rollouts are in order of sampling.
        trajectories = sorted(rollouts + given, key=lambda t: (t.group, t.is_demonstration))
        return Collection(self._taught(indexed(trajectories)), metrics, verdicts, sampled)

    def _prompt_weights(self, prompts: PromptReader | None) -> dict[str, Tensor] | None:
        """For each source the weights of its prompts; None without a curriculum."""
        if self.curriculum is None or prompts is None:
            return None
        return {name: self.curriculum.weights(prompts.columns(members)) for name, members in self.strata.items()}

    def _remembered(self, trajectories: list[Trajectory], prompts: PromptReader | None) -> list[Trajectory]:
        """Add what is remembered of their prompts to the trajectories, if a part reads it."""
        if prompts is None or not self.needs.columns & MEMORY_COLUMNS:
            return trajectories
        return [replace(one, remembered=prompts.of(one.example)) for one in trajectories]

    def _beside_replayed(self, examples: list[int], count: int, step: int, step_in_stage: int) -> Collection:
        """`count` fresh rollouts for each of these examples, whose other rollouts are replayed."""
        if not count:
            return Collection([], {})
        return self._rollouts(examples, ("rollout", "replay", step), step_in_stage, None, count)

    def demonstrations(self, indices: Iterable[int], step: int) -> list[Trajectory]:
        """The demonstrations of these examples, one group per example; examples without one are skipped."""
        with_demonstrations = [i for i in indices if self.examples[i].demonstrations]
        given = [t for group, i in enumerate(with_demonstrations) for t in self.given.demonstrations(group, i, step)]
        return self._taught(indexed(given))

    def _taught(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Add the teacher's prompts to the trajectories."""
        if self.teacher_prompts is None:
            return trajectories
        right: dict[int, list[Trajectory]] = {}
        for one in trajectories:
            if not one.is_demonstration and one.passed:
                right.setdefault(one.group, []).append(one)
        taught = []
        for one in trajectories:
            sibling = next((other for other in right.get(one.group, ()) if other.index != one.index), None)
            feedback = () if sibling is None else sibling.text_ids
            ids = self.teacher_prompts.ids(self.examples[one.example], feedback)
            ids += one.prompt_ids[len(one.prompt_ids) - one.hint_tokens :]
            taught.append(replace(one, teacher_prompt_ids=ids))
        return taught

    def _held_out_indices(self, step: int, count: int) -> list[int]:
        """Reserved examples, redrawn in each step; in a mixture, the sources' weights decide how many from each."""
        candidates, seed = self.streams[HELD_OUT], stream_seed(self.config.seed, "order", HELD_OUT, step)
        if len(self.weights) == 1:
            return [candidates[place] for place in permutation(len(candidates), seed)[:count]]
        strata = {name: [i for i in candidates if self.examples[i].problem.source == name] for name in self.weights}
        return mixed_indices(0, count, strata, {n: self.weights[n] if strata[n] else 0.0 for n in strata}, seed)

    def _replacements(
        self, missing: Mapping[str, int], used: Sequence[int], weights: Mapping[str, Tensor] | None, *seed: int | str
    ) -> list[int]:
        """As many examples of each source as are missing, in a seeded order; those in `used` come last."""
        chosen: list[int] = []
        for name, count in missing.items():
            candidates = self.strata[name]
            places = {index: place for place, index in enumerate(candidates)}
            used_places = [places[index] for index in used if index in places]
            order_seed = stream_seed(self.config.seed, *seed, *filter(None, [name]))
            own = None if weights is None else weights[name]
            chosen += [candidates[i] for i in least_used(count, len(candidates), used_places, order_seed, own)]
        return chosen

    def _missing(self, wanted: Sequence[int], accepted: Sequence[int]) -> dict[str, int]:
        """For each source, how many accepted examples are missing."""
        strata = {name: set(members) for name, members in self.strata.items()}
        counts = {n: sum(i in s for i in wanted) - sum(i in s for i in accepted) for n, s in strata.items()}
        return {name: count for name, count in counts.items() if count > 0}

    def _redrawn(
        self,
        indices: list[int],
        first: list[Trajectory],
        step: int,
        step_in_stage: int,
        prompts: PromptReader | None,
        weights: Mapping[str, Tensor] | None,
    ) -> tuple[list[int], Collection]:
        """Dynamic sampling: replaces prompts whose gate is closed, for a number of rounds.

        Args:
            indices: the examples of the first round.
            first: their rollouts.
            step, step_in_stage, prompts: as for `collect`.
            weights: for each source, the curriculum's weights of its prompts; None without a curriculum.

        Returns:
            The accepted examples and their rollouts, with the metrics and verdicts of the later rounds. If the gate is
            closed on all prompts, the examples and rollouts of the first round.
        """
        assert self.dynamic_sampling is not None
        wanted, rollouts, tried, rounds = list(indices), first, list(indices), 1
        metrics: dict[str, float] = {}
        verdicts = StepVerdicts()
        sampled: list[Trajectory] = []
        accepted: list[int] = []
        trajectories: list[Trajectory] = []
        while True:
            for group, members in self._open_groups(rollouts, step):
                trajectories += [replace(t, group=len(accepted)) for t in members]
                accepted.append(indices[group])
            if len(accepted) == self.config.prompts_per_step or rounds == self.dynamic_sampling.rounds:
                break
            # Accepted examples count twice, so that in a small data set they come last.
            indices = self._replacements(
                self._missing(wanted, accepted), tried + accepted, weights, "redraw", step, rounds
            )
            rollouts, times, more, _ = self._rollouts(indices, ("rollout", step, rounds), step_in_stage, prompts)
            metrics, verdicts, sampled = _sum(metrics, times), verdicts + more, sampled + rollouts
            tried += indices
            rounds += 1
        metrics |= {"sampling/rounds": rounds, "sampling/prompts": len(tried)}
        if not accepted:
            accepted, trajectories = wanted, first
        return accepted, Collection(trajectories, metrics, verdicts, sampled)

    def _open_groups(self, rollouts: list[Trajectory], step: int) -> list[tuple[int, list[Trajectory]]]:
        """The groups, in order, that have a rollout on which the gate is not 0."""
        assert self.dynamic_sampling is not None
        closed = self.dynamic_sampling.gate.closed(assemble(rollouts, step)).tolist()
        groups: dict[int, list[Trajectory]] = {}
        for trajectory in rollouts:
            groups.setdefault(trajectory.group, []).append(trajectory)
        open_groups = {t.group for t, is_closed in zip(rollouts, closed, strict=True) if not is_closed}
        return [(group, members) for group, members in groups.items() if group in open_groups]

    def _rollouts(
        self,
        indices: list[int],
        seeds: tuple[int | str, ...],
        step_in_stage: int,
        prompts: PromptReader | None,
        count: int | None = None,
    ) -> Collection:
        """All ranks' verified rollouts of these prompts, with groups numbered from 0; the times are this rank's.

        Each rank samples some of the prompts, with `count` rollouts per prompt; None = `group_size`.

        Raises:
            RunError: sampling ended early on some rank.
        """
        sampler, config, world = self.sampler, self.config, self.world
        assert sampler is not None
        groups = list(range(world.rank, len(indices), world.size))
        group_seeds = [stream_seed(config.seed, *seeds, group) for group in groups]
        examples = [self.examples[indices[group]] for group in groups]
        prefixes = [self._prefix(indices[group], (*seeds, group), step_in_stage) for group in groups]
        guided = self._guided_copies
        by_copy = {(place, copy): prefix for place, prefix in enumerate(prefixes) if prefix for copy in guided}
        times: dict[str, float] = {}

        def sample() -> tuple[list[Trajectory], str]:
            sampled = sampler.sample(examples, count or config.group_size, self.sampling, group_seeds, by_copy)
            times.update({"time/rollout": sampled.sampling_seconds, "time/verify": sampled.verifying_seconds})
            of_rank = [
                self._rollout(indices[group], group, rollout, verdict, by_copy.get((place, copy), ()))
                for place, (group, responses) in enumerate(zip(groups, sampled.groups, strict=True))
                for copy, (rollout, verdict) in enumerate(responses)
            ]
            return of_rank, sampled.first_error

        of_ranks = gather_results(world, sample)
        rollouts = sorted((t for part, _ in of_ranks for t in part), key=lambda t: t.group)
        rollouts = self._remembered(rollouts, prompts)
        return Collection(rollouts, times, StepVerdicts.of(rollouts, [error for _, error in of_ranks]), rollouts)

    @property
    def _guided_copies(self) -> range:
        """The indices of a prompt's guided rollouts: the last ones of the group."""
        size, guidance = self.config.group_size, self.guidance
        count = 0 if guidance is None else size if guidance.rollouts is None else guidance.rollouts
        return range(size - count, size)

    def _prefix(self, index: int, seeds: tuple[int | str, ...], step: int) -> tuple[int, ...]:
        """The prefix of a prompt's guided rollouts; empty if it has none. `step` counts within the stage."""
        demonstrations, seed = self.examples[index].demonstrations, self.config.seed
        if self.guidance is None or not demonstrations:
            return ()
        own = stream_seed(seed, "guidance", *seeds)
        chosen = demonstrations[own % len(demonstrations)]
        return self.guidance.prefix(chosen, self.sampling.max_tokens, step, own)

    def _rollout(
        self, index: int, group: int, rollout: Rollout, verdict: Verdict, prefix: tuple[int, ...]
    ) -> Trajectory:
        hint, prefix = (prefix, ()) if self.guidance is not None and self.guidance.in_prompt else ((), prefix)
        return Trajectory(
            example=index,
            group=group,
            prompt_ids=self.examples[index].prompt_ids + hint,
            response_ids=prefix + rollout.token_ids,
            prefix_tokens=len(prefix),
            hint_tokens=len(hint),
            reward=verdict.reward,
            rewards=verdict.rewards if (reward := self.given.reward(index)) is None else reward.named(verdict),
            is_demonstration=False,
            sampler_logprobs=rollout.logprobs,
            finished=rollout.finished,
            status=verdict.status,
            detail=verdict.detail,
            extracted=verdict.extracted,
            pass_threshold=self.config.verify.pass_threshold,
            success=self.config.verify.success,
        )


def _sum(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Metrics of two collections, added."""
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in {**a, **b}}
