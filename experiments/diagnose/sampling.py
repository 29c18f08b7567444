"""From settings to a pool: problems, prompts, rollouts with their rewards, demonstrations and pairs."""

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

#: Independent parts of the reference.
PARTS = 8


@dataclass(frozen=True)
class Problems:
    """What is asked: the pool's examples, those held out, and how the model is spoken to."""

    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]
    prompting: Prompting
    verifiers: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def has_pairs(self) -> bool:
        """True if there is a preference pair to learn from."""
        return any(map(has_pair, self.examples))


@dataclass(frozen=True)
class Sampled:
    """The pool, and the reference rollouts of held-out prompts: [prompts][parts]."""

    pool: Pool
    held_out: list[list[list[Trajectory]]]


def problems(chosen: Chosen, model: ModelConfig) -> Problems:
    """The prompts of a diagnosis: of the training side as many as the pool has, in the order of training.

    Prompts without a demonstration are passed over where an algorithm needs one, and likewise for pairs: every
    algorithm is to be measured on the same prompts.

    Raises:
        UserError: what is wrong with data, model or limits, as before a run.
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
                     "algorithm needs, and are left out for all")  # fmt: skip
    if len(wanted) < config.prompts:
        raise ConfigError(f"prompts: {config.prompts}, but the data set has {len(wanted)} that serve; give fewer")
    chosen_ones = tuple(wanted[i] for i in prompt_indices(0, config.prompts, len(wanted), run.seed))
    held_out: tuple[Example, ...] = ()
    if config.held_out:
        if len(splits.evaluation) < config.held_out:
            raise DataError(f"held_out: {config.held_out}, but there are {len(splits.evaluation)} evaluation problems")
        found = data.encode(splits.evaluation, prompting, **limits, overlong_prompts="drop").examples
        held_out = found[: config.held_out]
        if len(held_out) < config.held_out:
            raise DataError(
                f"held_out: {config.held_out}, but the prompts of only {len(held_out)} evaluation problems are within "
                "rollout.max_prompt_tokens; give fewer, or raise the limit"
            )
    asked = [example.problem for example in (*chosen_ones, *held_out)]
    return Problems(chosen_ones, held_out, prompting, check_answers(asked, run.verify.verifier), tuple(notes))


def sample(
    chosen: Chosen, asked: Problems, model: ModelConfig, behavior: ModelConfig | None, say: Callable[[str], None]
) -> Sampled:
    """Draws and verifies all rollouts of a pool; those of the batches from `behavior`, the others from the model."""
    config, run = chosen.config, chosen.run
    limits = (run.verify.workers, run.verify.time_limit, run.verify.memory_limit)
    sampling = Sampling(run.rollout.temperature, 1.0, run.rollout.max_response_tokens, asked.prompting.stop_token_ids)
    with VerifierPool(asked.verifiers, *limits) as pool:

        def drawn(sampler: Sampler, purpose: str, examples: Sequence[Example], n: int) -> list[list[Trajectory]]:
            verified = VerifiedSampler(sampler, pool, asked.prompting)
            seeds = [stream_seed(run.seed, "diagnose", purpose, q) for q in range(len(examples))]
            groups = verified.sample(examples, n, sampling, seeds).groups
            say(f"{purpose}: {n} rollouts of {len(examples)} prompts")
            return [
                [_rollout(q, example, *response) for response in group]
                for q, (example, group) in enumerate(zip(examples, groups, strict=True))
            ]

        sampler = _sampler(chosen, model)
        say(f"rollouts: {sampler.reason}")
        passed = drawn(sampler, "pass rates", asked.examples, config.pass_samples)
        reference = drawn(sampler, "reference", asked.examples, _parted(config.reference))
        others = drawn(sampler, "held out", asked.held_out, _parted(config.reference)) if asked.held_out else []
        if behavior is not None:
            sampler.close()
            sampler = _sampler(chosen, behavior)
        own = drawn(sampler, "batches", asked.examples, config.rounds * config.group_size)
        sampler.close()
    groups = [
        [
            Group(tuple(rollouts[r * config.group_size : (r + 1) * config.group_size]), *_given(q, example, r, run))
            for r in range(config.rounds)
        ]
        for q, (example, rollouts) in enumerate(zip(asked.examples, own, strict=True))
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
    """Rollouts of each part of the reference, so that there are `PARTS` where they suffice: at least two, for a
    baseline."""
    return max(2, -(-rollouts // PARTS))


def _parted(rollouts: int) -> int:
    """So many, or a few more, that each part has as many."""
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
    """The demonstrations of a prompt that have their turn in a round, by chance, and its pair.

    A run has them in turns; rounds that did would not be independent of each other.
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
