"""Every batch that can be drawn, with its probability, and the gradient that an algorithm takes from it.

A group of n rollouts is one of finitely many multisets, because order does not matter to any algorithm. Each draw is a
separate batch, so divisors that count tokens or trajectories have the same values as in training.

Legend: S responses, T tokens of the longest, P prefixes, V vocabulary (see `upge.theory.policy`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.gates import Gate
from upge.theory.policy import (
    Reward,
    SoftmaxPolicy,
    exact_gradient,
    forward_kl_gradient,
    reverse_kl_gradient,
    rewards_of,
)
from upge.trajectories import Trajectories
from upge.views import Distributions

#: A trajectory: (number of its response, whether it is a demonstration, preference).
Row = tuple[int, bool, int]
#: The trajectories of a group, and its probability.
WeightedGroup = tuple[tuple[Row, ...], float]


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
        step: the training steps before the batch, for schedules.

    Raises:
        ConfigError: a policy has other responses than `policy`.
    """

    policy: SoftmaxPolicy
    reward: Reward
    behavior: SoftmaxPolicy | None = None
    sampler: SoftmaxPolicy | None = None
    expert: SoftmaxPolicy | None = None
    reference: SoftmaxPolicy | None = None
    teacher: SoftmaxPolicy | None = None
    values: Float[Tensor, "P"] | None = None
    step: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", rewards_of(self.policy, self.reward))
        for name in ("behavior", "sampler", "expert", "reference", "teacher"):
            other = getattr(self, name)
            if other is not None and other.responses is not self.policy.responses:
                raise ConfigError(f"{name}: its responses are not those of `policy`; give both the same sizes and end")

    @property
    def rewards(self) -> Float[Tensor, "S"]:
        """[S] the reward of every response."""
        return rewards_of(self.policy, self.reward)

    @property
    def drawn_from(self) -> SoftmaxPolicy:
        """The policy that the rollouts are drawn from."""
        return self.sampler or self.behavior or self.policy

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
        return columns


class Evaluator:
    """The gradient of one algorithm on batches of one setting.

    Attributes:
        scores: [S, T, P, V] ∇ log π of each token.
        entropy_scores: [S, T, P, V] the gradient of each token's entropy.
        mask: [S, T] True on the tokens of each response.
    """

    def __init__(self, algorithm: Algorithm, setting: Setting) -> None:
        self.algorithm, self.setting, self.columns = algorithm, setting, setting.columns
        self.scores, self.entropy_scores = setting.policy.token_scores, setting.policy.entropy_scores
        self.mask = setting.policy.responses.mask

    def batch(self, groups: Iterable[tuple[Row, ...]]) -> Trajectories:
        """The batch of these groups; log-probs and entropies are leaves that require a gradient."""
        listed = [(g, *row) for g, rows in enumerate(groups) for row in rows]
        group, number, is_demonstration, preference = (torch.tensor(column) for column in zip(*listed, strict=True))
        columns: dict[str, Any] = {name: column[number] for name, column in self.columns.items()}
        for name in ("logprobs", "entropies"):
            columns[name].requires_grad_()
        return Trajectories(
            **columns,
            response_mask=self.mask[number],
            rewards=self.setting.rewards[number],
            group=group,
            is_demonstration=is_demonstration,
            preference=preference if bool(preference.any()) else None,
            step=self.setting.step,
            state={},
            row=None,
            distributions=self.setting.distributions(number) if self.algorithm.supports else None,
        )

    def gradient(self, groups: list[tuple[Row, ...]]) -> Float[Tensor, "P V"]:
        """[P, V] minus the gradient of the loss with respect to the policy's table.

        It is Σ (-∂loss/∂log π)·∇log π, plus the same sums over entropies and over all tokens of the vocabulary.
        """
        batch = self.batch(groups)
        assert batch.logprobs is not None and batch.entropies is not None
        number = torch.tensor([row[0] for rows in groups for row in rows])
        loss = self.algorithm.estimate(batch).loss
        given = batch.distributions
        full = [] if given is None else [given.policy]
        slopes = torch.autograd.grad(loss, [batch.logprobs, batch.entropies, *full], allow_unused=True)
        total = torch.zeros_like(self.setting.policy.logits)
        if given is not None and slopes[2] is not None:
            total -= self.through_vocabulary(slopes[2], number)
        for slope, scores in zip(slopes[:2], (self.scores, self.entropy_scores), strict=True):
            if slope is not None:
                total -= torch.einsum("bt,btpv->pv", slope, scores[number])
        return total

    def through_vocabulary(self, slopes: Float[Tensor, "b T V"], number: Int[Tensor, "b"]) -> Float[Tensor, "P V"]:
        """[P, V] Σ slopes_tv·∇log π(v|t) over the tokens of some responses, by their numbers."""
        policy, prefix = self.setting.policy, self.setting.policy.responses.prefix[number]
        by_logits = slopes - slopes.sum(dim=-1, keepdim=True) * policy.logits.detach().softmax(dim=-1)[prefix]
        return torch.zeros_like(policy.logits).index_add(0, prefix.flatten(), by_logits.flatten(0, 1))


def check(algorithm: Algorithm, setting: Setting, group_size: int, demonstrations: int) -> None:
    """Checks that the setting provides all that the algorithm reads or learns from.

    Raises:
        ConfigError: something is missing; the message says what to give.
    """
    needs = algorithm.needs
    if algorithm.guidance is not None:
        raise ConfigError(
            f"{algorithm.name}: its rollouts continue demonstrations, which are not enumerated; leave guidance out"
        )
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
        kinds.append([(tuple((y, False, 0) for y in ys), p) for ys, p in multisets(drawn, group_size)])
    if needs.demonstrations:
        assert setting.expert is not None, "check() requires an expert"
        shown = setting.expert.probabilities.tolist()
        kinds.append([(tuple((y, True, 0) for y in ys), p) for ys, p in multisets(shown, demonstrations)])
    if needs.preference_pairs:
        reward = setting.rewards.tolist()
        pairs = [(a, b) for a in space for b in space if reward[a] > reward[b]]
        kinds.append([(((a, True, 1), (b, True, -1)), 2 * drawn[a] * drawn[b]) for a, b in pairs])
    groups: list[WeightedGroup] = []
    for members in itertools.product(*kinds):
        rows = tuple(row for member, _ in members for row in member)
        groups.append((rows, math.prod(p for _, p in members)))
    if algorithm.sampling is not None:
        groups = _open_groups(algorithm.sampling.gate, groups, Evaluator(algorithm, setting))
    accepted = sum(p for _, p in groups)
    if accepted <= 0:
        raise ConfigError(f"{algorithm.name}: no group can be drawn; give rewards that differ between responses")
    return [(rows, p / accepted) for rows, p in groups if p > 0], accepted


def _open_groups(gate: Gate, groups: list[WeightedGroup], evaluator: Evaluator) -> list[WeightedGroup]:
    """The groups on whose rollouts the gate is open."""
    open_groups: list[WeightedGroup] = []
    for rows, p in groups:
        batch = evaluator.batch([tuple(row for row in rows if not row[1])])
        if not bool(gate.closed(batch).all()):
            open_groups.append((rows, p))
    return open_groups


def multisets(probabilities: Sequence[float], n: int) -> Iterable[tuple[tuple[int, ...], float]]:
    """All possible multisets of n independent draws, as sorted numbers, with their probabilities."""
    possible = [y for y, p in enumerate(probabilities) if p > 0]
    for ys in itertools.combinations_with_replacement(possible, n):
        orders = math.factorial(n)
        for times in Counter(ys).values():
            orders //= math.factorial(times)
        yield ys, orders * math.prod(probabilities[y] for y in ys)
