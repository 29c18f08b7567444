"""Measures one policy: the directions of many prompts, and what steps along them gain on held-out problems."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from experiments.diagnose.sampling import Draws, Policy, Problems, given, load_model
from experiments.regret.settings import Chosen
from experiments.run.prepare import load_sampler, verifier_pool
from upge.errors import ConfigError
from upge.measure import Group, ModelScores, Pool, Request, batches, deal, slopes
from upge.measure.pool import Columns, pair_of
from upge.measure.regret import Signals, stepped_gain
from upge.measure.scores import Pair
from upge.train.config import ModelConfig
from upge.train.sample import Trajectory

#: Share of the free memory that the gradients of the held-out parts may take.
_MEMORY = 0.6
#: Groups whose mean gradient counts as one step of Adam, for the second moments.
_ADAM_GROUPS = 16
#: Adam's epsilon.
_EPSILON = 1e-8
OBJECTIVES = ("accuracy", "log-likelihood")
METRICS = ("sgd", "adam")
#: The features of a group that a learned gate may use, besides its successes.
FEATURES = ("entropy", "log-likelihood of the demonstration", "length of the demonstration", "length of the rollouts")


@dataclass(frozen=True)
class Finite:
    """Steps of full size along one direction, averaged over prompts, next to their first-order gains.

    Attributes:
        metric: 'sgd' or 'adam'.
        direction: 'rollouts', 'demonstration' or 'both'.
        gains: objective → [prompts] the gain after the step.
        predicted: objective → [prompts] the first-order gain on the same held-out data.
        effective: [prompts] the share of effective rollouts in the importance sampling.
    """

    metric: str
    direction: str
    gains: Mapping[str, list[float]]
    predicted: Mapping[str, list[float]]
    effective: list[float]


@dataclass(frozen=True)
class Result:
    """The measurements of one policy. N groups of M prompts.

    Attributes:
        prompts: [N] the prompt of each group.
        successes: [N] its number of successes.
        features: [N, F], as named by `FEATURES`.
        signals: (metric, objective) → inner products.
        coefficients: gate → [N, 2] the coefficients of rollouts and demonstration.
        finite: steps of full size.
        details: sizes and seconds.
    """

    label: str
    step: int | None
    group_size: int
    prompts: Tensor
    successes: Tensor
    features: Float[Tensor, "N F"]
    signals: Mapping[tuple[str, str], Signals]
    coefficients: Mapping[str, Float[Tensor, "N 2"]]
    finite: tuple[Finite, ...]
    details: Mapping[str, float]


@dataclass(frozen=True)
class HeldOut:
    """The held-out data.

    Attributes:
        rollouts: [problems] rollouts of each, in order of the problems' levels.
        demonstrations: [problems] demonstrations of each, at least one.
        parts: H; problem i belongs to part i mod H.
    """

    rollouts: Sequence[Sequence[Trajectory]]
    demonstrations: Sequence[Sequence[Trajectory]]
    parts: int

    def members(self, part: int) -> range:
        """The problems of a part."""
        return range(part, len(self.rollouts), self.parts)

    def requests(self, part: int) -> dict[str, list[Request]]:
        """Objective → what to differentiate for the part's gradient of it.

        That of the accuracy is the leave-one-out estimate of ∇E[R]; that of the log-likelihood is exact: the mean over
        the problems of the mean log-probability of a demonstration's tokens.
        """
        reward, likelihood = [], []
        problems = self.members(part)
        for problem in problems:
            own, shown = self.rollouts[problem], self.demonstrations[problem]
            total = sum(t.reward for t in own)
            for one in own:
                advantage = (one.reward - (total - one.reward) / (len(own) - 1)) / len(own) / len(problems)
                if advantage:
                    reward.append(_request(one, advantage))
            for one in shown:
                likelihood.append(_request(one, 1 / max(len(one.response_ids), 1) / len(shown) / len(problems)))
        return dict(zip(OBJECTIVES, (reward, likelihood), strict=True))


def _request(one: Trajectory, weight: float) -> Request:
    return Request(pair_of(one), torch.full((len(one.response_ids),), weight, dtype=torch.float64))


@dataclass(frozen=True)
class Directions:
    """What the two terms differentiate on one group, in the direction of ascent."""

    rollouts: list[Request]
    demonstrations: list[Request]


def draw(chosen: Chosen, problems: Problems, model: ModelConfig, say: Callable[[str], None]) -> tuple[Pool, HeldOut]:
    """Sample the groups, and the rollouts of the held-out problems.

    Raises:
        ConfigError: a held-out problem has no demonstration.
    """
    config, run, group_size = chosen.config, chosen.sample.run, chosen.sample.config.group_size
    length = run.rollout.max_prompt_tokens + run.rollout.max_response_tokens
    # In order of levels, so that all parts have about the same number of each.
    held_out = sorted(problems.held_out, key=lambda example: example.problem.level or "")
    with verifier_pool(problems.verifiers, run.verify) as pool:
        draws = Draws(run, problems.prompting, pool, say)
        sampler = load_sampler(model, run.rollout, length, run.seed)
        say(f"rollouts: {sampler.reason}")
        own = draws(sampler, "batches", problems.examples, config.rounds * group_size)
        others = draws(sampler, "held out", held_out, config.held_out_samples)
        sampler.close()
        rewards = pool.rewards
    shown = [given(q, one, 0, run, rewards)[0] for q, one in enumerate(held_out)]
    missing = sum(not one for one in shown)
    if missing:
        raise ConfigError(
            f"held_out: {missing} of {len(shown)} problems of the evaluation side have no demonstration, whose "
            "log-likelihood is an objective here; choose another data set"
        )
    groups = []
    for q, (example, rollouts) in enumerate(zip(problems.examples, own, strict=True)):
        each = [tuple(rollouts[i : i + group_size]) for i in range(0, len(rollouts), group_size)]
        groups.append([Group(one, *given(q, example, r, run, rewards)) for r, one in enumerate(each)])
    dealt, rates = deal(len(groups), 1, config.rounds, run.seed), torch.zeros(len(groups), dtype=torch.float64)
    return Pool(groups, dealt, [], rates), HeldOut(others, shown, config.parts)


def measure(chosen: Chosen, problems: Problems, policy: Policy, say: Callable[[str], None]) -> Result:
    """Sample and measure one policy; `say` prints a line of progress."""
    began = time.perf_counter()
    pool, held_out = draw(chosen, problems, policy.model, say)
    sampled = time.perf_counter()
    scores = ModelScores(load_model(policy.model), 1, chosen.sample.run.rollout.temperature)
    columns = {
        pair: {"logprobs": logprobs, "entropies": entropies, "reference_logprobs": logprobs}
        for pair, (logprobs, entropies) in zip(pool.pairs(), scores.columns(pool.pairs()), strict=True)
    }
    result = measured(chosen, pool, held_out, scores, columns)
    rewards = [t.reward for own in held_out.rollouts for t in own]
    details = {
        "prompts": pool.prompts,
        "groups": len(result.prompts),
        "pass_rate": float(result.successes.double().mean()) / pool.group_size,
        "held_out_pass_rate": sum(rewards) / len(rewards),
        "parameters": sum(p.numel() for p in scores.parameters),
        "seconds_sampling": sampled - began,
        "seconds": time.perf_counter() - began,
    }
    return dataclasses.replace(result, label=policy.label, step=policy.step, details={**result.details, **details})


def measured(
    chosen: Chosen, pool: Pool, held_out: HeldOut, scores: ModelScores, columns: Mapping[Pair, Columns]
) -> Result:
    """Measure a pool with one prompt in each batch.

    Args:
        columns: as for `upge.measure.batches`.
    """
    groups, prompts, successes, features = [], [], [], []
    coefficients: dict[str, list[list[float]]] = {name: [] for name in chosen.gates}
    for _, members, batch in batches(pool, chosen.signals, columns, chosen.sample.config.step):
        parts = slopes(chosen.signals, batch)
        rows = [parts[name].active.nonzero()[:, 0].tolist() for name in (chosen.rollouts, chosen.demonstrations)]
        both = [parts[chosen.rollouts].by_logprobs * chosen.config.balance, parts[chosen.demonstrations].by_logprobs]
        made = (
            [Request(pair_of(members[row]), weights[row, : len(members[row].response_ids)]) for row in own]
            for own, weights in zip(rows, both, strict=True)
        )
        groups.append(Directions(*made))
        prompts.append(members[0].group)
        successes.append(sum(one.passed for one in members if not one.is_demonstration))
        features.append(_features(members, columns))
        for name, pair in chosen.gates.items():
            given_by = (gate(gate.view(batch)) for gate in (pair.rollouts, pair.demonstrations))
            coefficients[name].append([_of_group(name, values) for values in given_by])
    signals, scale, parts = _signals(groups, held_out, scores)
    finite = _finite(chosen, prompts, groups, held_out, scores, scale, parts)
    return Result(
        "", None, pool.group_size, torch.tensor(prompts), torch.tensor(successes), torch.stack(features), signals,
        {name: torch.tensor(own, dtype=torch.float64) for name, own in coefficients.items()}, finite, {},
    )  # fmt: skip


def _of_group(name: str, values: Tensor) -> float:
    """The coefficient of a group.

    Raises:
        ConfigError: its trajectories have different ones.
    """
    if float(values.max() - values.min()) > 1e-9:
        raise ConfigError(f"gates: {name} gives the trajectories of a prompt different coefficients; leave it out")
    return float(values[0])


def _features(members: Sequence[Trajectory], columns: Mapping[Pair, Columns]) -> Tensor:
    rollouts = [one for one in members if not one.is_demonstration]
    shown = [one for one in members if one.is_demonstration]
    entropies = torch.cat([columns[pair_of(one)]["entropies"] for one in rollouts])
    likelihoods = [columns[pair_of(one)]["logprobs"].mean() for one in shown]
    lengths = [sum(len(one.response_ids) for one in own) / max(len(own), 1) for own in (shown, rollouts)]
    return torch.tensor(
        [float(entropies.mean()), float(sum(likelihoods)) / max(len(shown), 1), *lengths], dtype=torch.float64
    )


def _signals(
    groups: Sequence[Directions], held_out: HeldOut, scores: ModelScores
) -> tuple[dict[tuple[str, str], Signals], Tensor, dict[str, Float[Tensor, "H p"]]]:
    """(the inner products, Adam's scale of each parameter, the gradients of the parts by objective)."""
    size = sum(p.numel() for p in scores.parameters)
    free = psutil.virtual_memory().available
    if 8 * held_out.parts * size > _MEMORY * free:
        raise ConfigError(
            f"parts: {held_out.parts} gradients of {size:,} numbers for two objectives do not fit into {_MEMORY:.0%} "
            f"of the {free / 2**30:.1f} GiB of free memory; give fewer, or a smaller model"
        )
    wanted = [held_out.requests(part) for part in range(held_out.parts)]
    bar = tqdm(total=len(wanted) + 2 * len(groups), desc="gradients", unit="", mininterval=1.0, leave=False)
    parts: dict[str, list[Tensor]] = {name: [] for name in OBJECTIVES}
    for requests in wanted:
        for name, own in requests.items():
            parts[name].append(scores.summed(own))
        bar.update()
    to = {name: torch.stack(own) for name, own in parts.items()}
    moments, steps, sums = torch.zeros_like(to["accuracy"][0]), 0, torch.zeros_like(to["accuracy"][0])
    for number, one in enumerate(groups, 1):
        sums += scores.summed([*one.rollouts, *one.demonstrations])
        if number % _ADAM_GROUPS == 0 or number == len(groups):
            moments, steps = moments + (sums / _ADAM_GROUPS).square(), steps + 1
            sums.zero_()
        bar.update()
    scale = 1 / ((moments / steps).sqrt() + _EPSILON)
    products: dict[tuple[str, str], list[list[Tensor]]] = {(m, o): [[], [], []] for m in METRICS for o in OBJECTIVES}
    for one in groups:
        pair = torch.stack([scores.summed(own) for own in (one.rollouts, one.demonstrations)])
        for metric in METRICS:
            step = pair * scale if metric == "adam" else pair
            square = (step @ step.T).double()
            for objective in OBJECTIVES:
                along = (step @ to[objective].T).double()
                values = (along[0], along[1], torch.stack([square[0, 0], square[0, 1], square[1, 1]]))
                for kept, value in zip(products[metric, objective], values, strict=True):
                    kept.append(value)
        bar.update()
    bar.close()
    return {name: Signals(*(torch.stack(own) for own in kept)) for name, kept in products.items()}, scale, to


def _finite(
    chosen: Chosen,
    prompts: Sequence[int],
    groups: Sequence[Directions],
    held_out: HeldOut,
    scores: ModelScores,
    scale: Tensor,
    parts: Mapping[str, Float[Tensor, "H p"]],
) -> tuple[Finite, ...]:
    """Make the steps of `finite` prompts, each on its first group with a signal of both kinds, and measure them."""
    config = chosen.config
    usable = [number for number, one in enumerate(groups) if one.rollouts and one.demonstrations]
    first = {prompts[n]: n for n in reversed(usable)}
    numbers = [first[prompt] for prompt in sorted(first)][: config.finite]
    problems = [i for part in range(config.finite_parts) for i in held_out.members(part)]
    rollouts = [(i, one) for i in problems for one in held_out.rollouts[i]]
    shown = [(i, one) for i in problems for one in held_out.demonstrations[i]]
    pairs = [pair_of(one) for _, one in (*rollouts, *shown)]
    rewards = torch.tensor([one.reward for _, one in rollouts], dtype=torch.float64)

    def evaluated() -> tuple[Tensor, float]:
        values = [logprobs for logprobs, _ in scores.columns(pairs)]
        sums = torch.stack([one.sum() for one in values[: len(rollouts)]])
        means = [
            one.mean() / len(held_out.demonstrations[i])
            for (i, _), one in zip(shown, values[len(rollouts) :], strict=True)
        ]
        return sums, float(sum(means)) / len(problems)

    if not numbers:
        return ()
    before, likelihood = evaluated()
    results = []
    for metric in METRICS:
        made = {name: Finite(metric, name, {o: [] for o in OBJECTIVES}, {o: [] for o in OBJECTIVES}, [])
                for name in ("rollouts", "demonstration", "both")}  # fmt: skip
        for number in tqdm(numbers, desc=f"steps ({metric})", unit="", mininterval=1.0, leave=False):
            one = groups[number]
            first, second = scores.summed(one.rollouts), scores.summed(one.demonstrations)
            for kept, direction in zip(made.values(), (first, second, first + second), strict=True):
                step = direction * scale if metric == "adam" else direction
                step = step * (config.lengths[metric] / step.norm())
                with scores.moved(step):
                    after, likely = evaluated()
                stepped = stepped_gain(after - before, rewards, [i for i, _ in rollouts])
                gained = {"accuracy": stepped.gain, "log-likelihood": likely - likelihood}
                for name in OBJECTIVES:
                    kept.gains[name].append(gained[name])
                    kept.predicted[name].append(float((parts[name][: config.finite_parts] @ step).mean()))
                kept.effective.append(stepped.effective)
        results += made.values()
    return tuple(results)
