"""Every batch that can be drawn, with its probability, and the gradient that an algorithm takes from it.

A group of n rollouts is one of finitely many multisets, because order does not matter to any algorithm. Each draw is a
separate batch, so divisors that count tokens or trajectories have the same values as in training.

Legend: S responses, T tokens of the longest, P prefixes, V vocabulary (see `upge.theory.policy`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.gates import Gate
from upge.prompt_memory import PromptColumns, Remembered
from upge.reduction import Over, Reduction
from upge.theory.policy import (
    Reward,
    SoftmaxPolicy,
    exact_gradient,
    forward_kl_gradient,
    reverse_kl_gradient,
    rewards_of,
)
from upge.trajectories import Trajectories
from upge.views import Distributions, TrajectoryView


class Row(NamedTuple):
    """A trajectory.

    Attributes:
        number: of its response.
        prefix: the number of tokens of a demonstration that the response begins with.
    """

    number: int
    is_demonstration: bool = False
    preference: int = 0
    prefix: int = 0


#: The trajectories of a group, and its probability.
WeightedGroup = tuple[tuple[Row, ...], float]
#: Maximum number of groups in one evaluation, and the number of groups that are also evaluated alone.
MOST_GROUPS, PROBES = 64, 2


@dataclass(frozen=True, eq=False)
class Setting:
    """The policies, the reward and the critic's values that batches are made from.

    Attributes:
        policy: π_θ, the policy whose gradient is computed.
        reward: [S], or a function of a response's tokens.
        behavior: π_old, which fills `behavior_logprobs`; None = π_θ itself, strictly on-policy.
        sampler: the policy that the rollouts are drawn from, which fills `sampler_logprobs`; None = the behavior
            policy.
        expert: π_β, the policy that the demonstrations are drawn from, independently; a demonstration's reward is that
            of its response.
        reference: the reference policy, which fills `reference_logprobs`.
        teacher: the teacher, which fills `teacher_logprobs`.
        values: [P] the critic's value of each prefix.
        prefixes: prefix → its probability, for an algorithm with guided rollouts: the distribution of the prefix that
            the guided rollouts of a group continue. It replaces the algorithm's own distribution of lengths.
        step: number of training steps before the batch, for schedules.
        remembered: what is remembered of the prompt.
        named_rewards: name → (weight, reward) of the rewards that `reward` is the weighted sum of; empty = one reward.

    Raises:
        ConfigError: a policy has other responses than `policy`, `prefixes` is not a distribution of beginnings, or
            `reward` is not the weighted sum of `named_rewards`.
    """

    policy: SoftmaxPolicy
    reward: Reward
    behavior: SoftmaxPolicy | None = None
    sampler: SoftmaxPolicy | None = None
    expert: SoftmaxPolicy | None = None
    reference: SoftmaxPolicy | None = None
    teacher: SoftmaxPolicy | None = None
    values: Float[Tensor, "P"] | None = None
    prefixes: Mapping[tuple[int, ...], float] | None = None
    step: int = 0
    remembered: Remembered = Remembered(value=0.5, attempts=0, successes=0, last_pass_rate=math.nan, age=1)
    named_rewards: Mapping[str, tuple[float, Reward]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", rewards_of(self.policy, self.reward))
        for name in ("behavior", "sampler", "expert", "reference", "teacher"):
            other = getattr(self, name)
            if other is not None and other.responses is not self.policy.responses:
                raise ConfigError(f"{name}: its responses are not those of `policy`; give both the same sizes and end")
        for prefix in self.prefixes or {}:
            if not any(len(prefix) < len(one) and one[: len(prefix)] == prefix for one in self._lists):
                raise ConfigError(
                    f"prefixes: found {prefix}; give beginnings of responses that leave at least one token"
                )
        if self.prefixes is not None and not math.isclose(total := math.fsum(self.prefixes.values()), 1):
            raise ConfigError(f"prefixes: the probabilities sum to {total:g}; give a distribution")
        summed = sum((weight * rewards_of(self.policy, one) for weight, one in self.named_rewards.values()))
        if isinstance(summed, Tensor) and not torch.allclose(summed, self.rewards):
            raise ConfigError(f"reward: it is not the weighted sum of {', '.join(self.named_rewards)}; give this sum")

    @property
    def _lists(self) -> list[tuple[int, ...]]:
        return self.policy.responses.lists()

    @property
    def rewards(self) -> Float[Tensor, "S"]:
        """[S] the reward of every response."""
        return rewards_of(self.policy, self.reward)

    @property
    def drawn_from(self) -> SoftmaxPolicy:
        """The policy that the rollouts are drawn from."""
        return self.sampler or self.behavior or self.policy

    def continuing(self, prefix: tuple[int, ...]) -> list[float]:
        """For each response, the probability that a rollout which continues these tokens becomes it."""
        own, n = self.drawn_from.token_logprobs.detach(), len(prefix)
        chances = own[:, n:].sum(dim=1).exp().tolist()
        return [p if one[:n] == prefix else 0.0 for one, p in zip(self._lists, chances, strict=True)]

    @property
    def objectives(self) -> dict[str, Tensor]:
        """The exact gradients [P, V] of the objectives, in the direction of ascent.

        'reward' is ∇E_π[R]. With an expert, 'imitation' is -∇KL(π_β‖π_θ). With a reference policy, 'proximity' is
        -∇KL(π_θ‖π_0).
        """
        gradients = {"reward": exact_gradient(self.policy, self.reward)}
        if self.expert is not None:
            gradients["imitation"] = -forward_kl_gradient(self.policy, self.expert)
        if self.reference is not None:
            gradients["proximity"] = -reverse_kl_gradient(self.policy, self.reference)
        return gradients

    def distributions(self, number: Int[Tensor, "b"]) -> Distributions:
        """Whole distributions at each token of some responses, [b, T, V] each; the policy's requires a gradient."""
        space = self.policy.responses
        models = (self.policy, self.reference, self.teacher)
        full = [None if m is None else m.logits.log_softmax(dim=-1)[space.prefix[number]].detach() for m in models]
        assert full[0] is not None
        return Distributions(space.tokens[number], full[0].requires_grad_(), *full[1:])

    @property
    def columns(self) -> dict[str, Tensor]:
        """The columns of a batch, for every response: [S, T] or [S] each, detached."""
        space, own = self.policy.responses, self.policy.token_logprobs.detach()
        columns = {"logprobs": own, "entropies": self.policy.token_entropies.detach(), "finished": space.finished}
        columns["score_norms"] = self.policy.token_scores.detach().square().sum(dim=(2, 3))
        # The column also exists on-policy, equal to the current log-probs, because some parts read it before the
        # forward pass.
        columns["behavior_logprobs"] = (self.behavior or self.policy).token_logprobs.detach()
        if self.sampler is not None:
            columns["sampler_logprobs"] = self.sampler.token_logprobs.detach()
        if self.reference is not None:
            columns["reference_logprobs"] = self.reference.token_logprobs.detach()
        if self.teacher is not None:
            columns["teacher_logprobs"] = self.teacher.token_logprobs.detach()
        if self.values is not None:
            columns["values"] = self.values.double()[space.prefix]
        return columns | PromptColumns.of([self.remembered] * len(space)).named()


class Evaluator:
    """The gradient of one algorithm on batches of one setting.

    Attributes:
        apart: the algorithm whose divisors count each group alone.
        scores: [S, T, P, V] ∇ log π of each token.
        entropy_scores: [S, T, P, V] the gradient of each token's entropy.
        mask: [S, T] True on the tokens of each response.
    """

    def __init__(self, algorithm: Algorithm, setting: Setting) -> None:
        self.algorithm, self.setting, self.columns = algorithm, setting, setting.columns
        self.apart = EachGroup.of(algorithm)
        self.scores, self.entropy_scores = setting.policy.token_scores, setting.policy.entropy_scores
        self.mask = setting.policy.responses.mask

    def batch(self, groups: Iterable[tuple[Row, ...]]) -> Trajectories:
        """The batch of these groups; log-probs and entropies are leaves that require a gradient."""
        listed = [(g, *row) for g, rows in enumerate(groups) for row in rows]
        group, number, is_demonstration, preference, prefix = map(torch.tensor, zip(*listed, strict=True))
        mask = self.mask[number]
        shown = torch.arange(mask.shape[1]) < prefix[:, None]
        in_prompt = self.algorithm.guidance is not None and self.algorithm.guidance.in_prompt
        columns: dict[str, Any] = {name: column[number] for name, column in self.columns.items()}
        for name in ("logprobs", "entropies"):
            columns[name].requires_grad_()
        return Trajectories(
            **columns,
            response_mask=mask & ~shown if in_prompt else mask,
            rewards=self.setting.rewards[number],
            named_rewards={
                name: rewards_of(self.setting.policy, one)[number]
                for name, (_, one) in self.setting.named_rewards.items()
            },
            reward_weights={name: weight for name, (weight, _) in self.setting.named_rewards.items()},
            group=group,
            is_demonstration=is_demonstration,
            is_demonstration_token=shown,
            is_guided=prefix > 0,
            total_lengths=mask.sum(dim=1),
            preference=preference if bool(preference.any()) else None,
            step=self.setting.step,
            state={},
            row=None,
            distributions=self.setting.distributions(number) if self.algorithm.supports else None,
        )

    def gradient(self, groups: Sequence[tuple[Row, ...]]) -> Float[Tensor, "P V"]:
        """[P, V] minus the gradient of the loss of one batch, made of these groups, with respect to the policy's table.

        It is Σ (-∂loss/∂log π)·∇log π, plus the same sums over entropies and over all tokens of the vocabulary.
        """
        return self._by_row(self.algorithm, groups).sum(dim=0)

    def gradients(self, groups: Sequence[tuple[Row, ...]]) -> Float[Tensor, "G P V"]:
        """[G, P, V] `gradient` of each group as a batch of its own.

        Many groups are evaluated as one batch in which every divisor counts a group alone (`EachGroup`). An algorithm
        whose groups also depend on each other in other ways, such as through whitened advantages, is evaluated group by
        group. To detect such an algorithm, the groups with the largest gradients are evaluated both ways.
        """
        if not self.algorithm.parts_per_update and len(groups) > PROBES:
            together = torch.cat(
                [self._of_each(groups[i : i + MOST_GROUPS]) for i in range(0, len(groups), MOST_GROUPS)]
            )
            probes = together.flatten(1).norm(dim=1).topk(PROBES).indices.tolist()
            alone = torch.stack([self.gradient([groups[g]]) for g in probes])
            if torch.allclose(alone, together[probes], rtol=1e-9, atol=1e-12):
                return together
        return torch.stack([self.gradient([group]) for group in groups])

    def _of_each(self, groups: Sequence[tuple[Row, ...]]) -> Float[Tensor, "G P V"]:
        by_row = self._by_row(self.apart, groups)
        group = torch.tensor([g for g, rows in enumerate(groups) for _ in rows])
        return by_row.new_zeros(len(groups), *by_row.shape[1:]).index_add(0, group, by_row)

    def _by_row(self, algorithm: Algorithm, groups: Sequence[tuple[Row, ...]]) -> Float[Tensor, "b P V"]:
        """[b, P, V] the part of each trajectory in the gradient of an algorithm on one batch."""
        batch = self.batch(groups)
        assert batch.logprobs is not None and batch.entropies is not None
        number = torch.tensor([row.number for rows in groups for row in rows])
        loss = algorithm.estimate(batch).loss
        given = batch.distributions
        full = [] if given is None else [given.policy]
        slopes = torch.autograd.grad(loss, [batch.logprobs, batch.entropies, *full], allow_unused=True)
        total = self.scores.new_zeros(len(number), *self.setting.policy.logits.shape)
        if given is not None and slopes[2] is not None:
            total -= self.through_vocabulary(slopes[2], number)
        for slope, scores in zip(slopes[:2], (self.scores, self.entropy_scores), strict=True):
            if slope is not None:
                total -= torch.einsum("bt,btpv->bpv", slope, scores[number])
        return total

    def through_vocabulary(self, slopes: Float[Tensor, "b T V"], number: Int[Tensor, "b"]) -> Float[Tensor, "b P V"]:
        """[b, P, V] Σ_tv slopes·∇log π(v|t) over the tokens of each response that `number` lists."""
        policy, prefix = self.setting.policy, self.setting.policy.responses.prefix[number]
        by_logits = slopes - slopes.sum(dim=-1, keepdim=True) * policy.logits.detach().softmax(dim=-1)[prefix]
        return torch.einsum("btp,btv->bpv", one_hot(prefix, len(policy.logits)).double(), by_logits)


@dataclass(frozen=True)
class EachGroup(Reduction):
    """The weights that a reduction gives the tokens of each group if the group is a batch of its own."""

    reduction: Reduction
    over: Over
    reads: ClassVar[frozenset[str]] = frozenset({"group"})

    def __call__(self, batch: TrajectoryView, active: Bool[Tensor, "B"]) -> Float[Tensor, "B T"]:
        weights = torch.zeros(batch.response_mask.shape, dtype=torch.float64)
        for group in batch.group[active].unique():
            weights += self.reduction(batch, active & (batch.group == group))
        return weights

    @staticmethod
    def of(algorithm: Algorithm) -> Algorithm:
        """The algorithm with all its divisors counted for each group alone."""

        def apart(owner: Any) -> Any:
            return replace(owner, reduction=EachGroup(owner.reduction, owner.reduction.over))

        terms, regularizers = (
            {n: apart(o) for n, o in some.items()} for some in (algorithm.terms, algorithm.regularizers)
        )
        return replace(algorithm, terms=terms, regularizers=regularizers)


def check(algorithm: Algorithm, setting: Setting, group_size: int, demonstrations: int) -> None:
    """Check that the setting provides all that the algorithm reads or learns from.

    Raises:
        ConfigError: something is missing; the message says what to give.
    """
    needs = algorithm.needs
    if algorithm.guidance is not None and setting.prefixes is None:
        raise ConfigError(f"{algorithm.name}: its rollouts continue demonstrations; give `prefixes`")
    if algorithm.replay is not None:
        raise ConfigError(f"{algorithm.name}: earlier rollouts are not enumerated; leave replay out")
    if needs.demonstrations and setting.expert is None:
        raise ConfigError(f"{algorithm.name}: learns from demonstrations, but the setting has none; give `expert`")
    algorithm.check(
        group_size=group_size,
        demonstrations=demonstrations if needs.demonstrations else None,
        provided={*setting.columns, "preference"},
    )


def all_groups(
    algorithm: Algorithm, setting: Setting, group_size: int, demonstrations: int
) -> tuple[list[WeightedGroup], float]:
    """Every group that an algorithm can train on.

    Args:
        algorithm: decides which trajectories a group has, and by dynamic sampling which groups it keeps.

    Returns:
        The groups, with their probabilities given that a group is kept, and the probability that a group is kept.

    Raises:
        ConfigError: no group can be drawn.
    """
    needs, space = algorithm.needs, range(len(setting.policy.responses))
    drawn = setting.drawn_from.probabilities.tolist()
    kinds: list[list[WeightedGroup]] = []
    if needs.rollouts:
        kinds.append(_rollouts(algorithm, setting, group_size))
    if needs.demonstrations:
        assert setting.expert is not None, "check() requires an expert"
        shown = setting.expert.probabilities.tolist()
        kinds.append([(tuple(Row(y, True) for y in ys), p) for ys, p in multisets(shown, demonstrations)])
    if needs.preference_pairs:
        reward = setting.rewards.tolist()
        pairs = [(a, b) for a in space for b in space if reward[a] > reward[b]]
        kinds.append([((Row(a, True, 1), Row(b, True, -1)), 2 * drawn[a] * drawn[b]) for a, b in pairs])
    groups: list[WeightedGroup] = []
    for members in itertools.product(*kinds):
        rows = tuple(row for member, _ in members for row in member)
        groups.append((rows, math.prod(p for _, p in members)))
    if algorithm.dynamic_sampling is not None:
        groups = _open_groups(algorithm.dynamic_sampling.gate, groups, Evaluator(algorithm, setting))
    accepted = sum(p for _, p in groups)
    if accepted <= 0:
        raise ConfigError(f"{algorithm.name}: no group can be drawn; give rewards that differ between responses")
    return [(rows, p / accepted) for rows, p in groups if p > 0], accepted


def _rollouts(algorithm: Algorithm, setting: Setting, group_size: int) -> list[WeightedGroup]:
    """The rollouts of a group: independent draws, or the plain ones and then those that continue the same prefix."""
    guidance, drawn = algorithm.guidance, setting.drawn_from.probabilities.tolist()
    if guidance is None:
        return [(tuple(Row(y) for y in ys), p) for ys, p in multisets(drawn, group_size)]
    count = group_size if guidance.rollouts is None else guidance.rollouts
    assert setting.prefixes is not None, "check() requires prefixes"
    groups: list[WeightedGroup] = []
    for prefix, chance in setting.prefixes.items():
        continued = list(multisets(setting.continuing(prefix), count))
        for plain, p in multisets(drawn, group_size - count):
            rows = tuple(Row(y) for y in plain)
            groups += [(rows + tuple(Row(y, prefix=len(prefix)) for y in ys), chance * p * q) for ys, q in continued]
    return groups


def _open_groups(gate: Gate, groups: list[WeightedGroup], evaluator: Evaluator) -> list[WeightedGroup]:
    """The groups on whose rollouts the gate is open."""
    drawn = [tuple(row for row in rows if not row.is_demonstration) for rows, _ in groups]
    is_open = (~gate.closed(evaluator.batch(drawn))).split([len(rows) for rows in drawn])
    return [group for group, rows in zip(groups, is_open, strict=True) if bool(rows.any())]


def multisets(probabilities: Sequence[float], n: int) -> Iterable[tuple[tuple[int, ...], float]]:
    """All possible multisets of n independent draws, as sorted numbers, with their probabilities."""
    possible = [y for y, p in enumerate(probabilities) if p > 0]
    for ys in itertools.combinations_with_replacement(possible, n):
        orders = math.factorial(n)
        for times in Counter(ys).values():
            orders //= math.factorial(times)
        yield ys, orders * math.prod(probabilities[y] for y in ys)
