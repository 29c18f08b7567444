"""Samples the pool of a diagnosis: problems, prompts, rollouts with rewards, demonstrations and preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from experiments.diagnose.settings import Chosen
from experiments.run.prepare import check_answers, check_length, load_problems, load_prompting
from upge import data, rollout
from upge.data import Example, Prompting
from upge.errors import ConfigError, DataError
from upge.measure.contributions import pass_rate
from upge.measure.pool import Group, Pool, deal
from upge.rollout import Sampler, Sampling
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.config import ModelConfig
from upge.train.prompt_order import prompt_indices, stream_seed
from upge.train.sample import Trajectory, has_pair
from upge.verify import VerifierPool

#: Number of independent parts of the reference rollouts.
PARTS = 8


@dataclass(frozen=True)
class Problems:
    """The prompts of a diagnosis.

    Attributes:
        examples: the examples of the pool.
        held_out: the held-out examples.
        prompting: how problems become prompts.
        verifiers: names of the verifiers.
        notes: sentences for the user.
    """

    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]
    prompting: Prompting
    verifiers: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def has_pairs(self) -> bool:
        """Whether some example has a preference pair."""
        return any(map(has_pair, self.examples))


@dataclass(frozen=True)
class Sampled:
    """The pool, and the reference rollouts of held-out prompts: [prompts][parts]."""

    pool: Pool
    held_out: list[list[list[Trajectory]]]


def problems(chosen: Chosen, model: ModelConfig) -> Problems:
    """The prompts of a diagnosis: `prompts` of the training side, in the order of training.

    If an algorithm needs demonstrations, prompts without one are skipped, and likewise for preference pairs, so that
    every algorithm is measured on the same prompts.

    Raises:
        UserError: data, model or limits are wrong, as before a run.
    """
    config, run = chosen.config, chosen.run
    limits = {name: getattr(run.rollout, name) for name in ("max_prompt_tokens", "max_response_tokens")}
    check_length(model, *limits.values())
    splits, notes = load_problems(chosen.tree["data"], run)
    prompting = load_prompting(model)
    needs = [algorithm.needs for algorithm in chosen.algorithms.values()]
    policy = run.data_policy
    encoded = data.encode(
        splits.train, prompting, **limits, overlong_prompts=policy.overlong_prompts,
        overlong_demonstrations=policy.overlong_demonstrations,
    ).examples  # fmt: skip
    wanted = [
        example
        for example in encoded
        if (example.demonstrations or not any(n.demonstrations for n in needs))
        and (has_pair(example) or not any(n.preference_pairs for n in needs) or not any(map(has_pair, encoded)))
    ]
    if len(wanted) < len(encoded):
        notes.append(f"{len(encoded) - len(wanted)} of {len(encoded)} prompts lack a demonstration or pair that an "
                     "algorithm needs, and are left out for all algorithms")  # fmt: skip
    if len(wanted) < config.prompts:
        raise ConfigError(f"prompts: {config.prompts}, but the data set has {len(wanted)} usable ones; give fewer")
    chosen_ones = tuple(wanted[i] for i in prompt_indices(0, config.prompts, len(wanted), run.seed))
    held_out: tuple[Example, ...] = ()
    if config.held_out:
        if len(splits.evaluation) < config.held_out:
            raise DataError(f"held_out: {config.held_out}, but there are {len(splits.evaluation)} evaluation problems")
        encoded_evaluation = data.encode(splits.evaluation, prompting, **limits, overlong_prompts="drop").examples
        held_out = encoded_evaluation[: config.held_out]
        if len(held_out) < config.held_out:
            raise DataError(
                f"held_out: {config.held_out}, but the prompts of only {len(held_out)} evaluation problems are within "
                "rollout.max_prompt_tokens; give fewer, or raise the limit"
            )
    needed_problems = [example.problem for example in (*chosen_ones, *held_out)]
    return Problems(chosen_ones, held_out, prompting, check_answers(needed_problems, run.verify.verifier), tuple(notes))


def sample(
    chosen: Chosen, prompts: Problems, model: ModelConfig, behavior: ModelConfig | None, say: Callable[[str], None]
) -> Sampled:
    """Samples and verifies all rollouts of a pool: those of the batches from `behavior`, the others from `model`."""
    config, run = chosen.config, chosen.run
    limits = (run.verify.workers, run.verify.time_limit, run.verify.memory_limit)
    sampling = Sampling(run.rollout.temperature, 1.0, run.rollout.max_response_tokens, prompts.prompting.stop_token_ids)
    with VerifierPool(prompts.verifiers, *limits) as pool:

        def drawn(sampler: Sampler, purpose: str, examples: Sequence[Example], n: int) -> list[list[Trajectory]]:
            verified = VerifiedSampler(sampler, pool, prompts.prompting)
            seeds = [stream_seed(run.seed, "diagnose", purpose, q) for q in range(len(examples))]
            groups = verified.sample(examples, n, sampling, seeds).groups
            say(f"{purpose}: {n} rollouts of {len(examples)} prompts")
            return [
                [_rollout(q, example, *response) for response in group]
                for q, (example, group) in enumerate(zip(examples, groups, strict=True))
            ]

        sampler = _sampler(chosen, model)
        say(f"rollouts: {sampler.reason}")
        passed = drawn(sampler, "pass rates", prompts.examples, config.pass_samples)
        reference = drawn(sampler, "reference", prompts.examples, _parted(config.reference))
        others = drawn(sampler, "held out", prompts.held_out, _parted(config.reference)) if prompts.held_out else []
        if behavior is not None:
            sampler.close()
            sampler = _sampler(chosen, behavior)
        own = drawn(sampler, "batches", prompts.examples, config.rounds * config.group_size)
        sampler.close()
    groups = [
        [
            Group(tuple(rollouts[r * config.group_size : (r + 1) * config.group_size]), *_given(q, example, r, run))
            for r in range(config.rounds)
        ]
        for q, (example, rollouts) in enumerate(zip(prompts.examples, own, strict=True))
    ]
    dealt = deal(config.prompts, config.prompts_per_step, config.rounds, run.seed)
    rates = torch.tensor([pass_rate(rollouts) for rollouts in passed], dtype=torch.float64)
    size = _part_size(config.reference)
    return Sampled(Pool(groups, dealt, _parts(reference, size), rates), _parts(others, size))


def _sampler(chosen: Chosen, model: ModelConfig) -> Sampler:
    run = chosen.run
    return rollout.load(
        run.rollout.engine,
        model.path,
        dtype=model.dtype,
        max_length=run.rollout.max_prompt_tokens + run.rollout.max_response_tokens,
        memory_fraction=run.rollout.memory_fraction,
        seed=run.seed,
        overrides=model.overrides,
    )


def _part_size(rollouts: int) -> int:
    """Rollouts in each part of the reference: at least two, for a baseline, and enough for at most `PARTS` parts."""
    return max(2, -(-rollouts // PARTS))


def _parted(rollouts: int) -> int:
    """The number of rollouts, rounded up so that all parts have the same size."""
    size = _part_size(rollouts)
    return -(-rollouts // size) * size


def _parts(groups: list[list[Trajectory]], size: int) -> list[list[list[Trajectory]]]:
    """[prompts][parts] of [prompts] rollouts."""
    return [[own[i : i + size] for i in range(0, len(own), size)] for own in groups]


def _rollout(q: int, example: Example, response: rollout.Rollout, verdict) -> Trajectory:
    return Trajectory(
        q, q, tuple(example.prompt_ids), response.token_ids, verdict.reward, False, response.logprobs,
        response.finished, verdict.status,
    )  # fmt: skip


def _given(q: int, example: Example, number: int, run) -> tuple[tuple[Trajectory, ...], tuple[Trajectory, ...]]:
    """Random demonstrations of a prompt for a round, and its preference pair.

    A run goes through them in order, but then rounds would not be independent of each other.
    """
    count, wanted = len(example.demonstrations), run.data_policy.demonstrations
    chosen = list(range(count))
    if count and 0 < wanted < count:
        first = stream_seed(run.seed, "diagnose", "demonstration", q, number) % count
        chosen = [(first + i) % count for i in range(wanted)]
    shown = tuple(
        Trajectory(q, q, tuple(example.prompt_ids), tuple(example.demonstrations[i]), 1.0, True) for i in chosen
    )
    if not has_pair(example):
        return shown, ()
    better = Trajectory(q, q, tuple(example.prompt_ids), tuple(example.demonstrations[0]), 1.0, True, preference=1)
    return shown, (better, replace(better, response_ids=tuple(example.rejected_ids), reward=0.0, preference=-1))
