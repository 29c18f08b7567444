"""How far a step's rollouts are from the policy that learns from them, as sums over micro-batches and ranks.

Two pairs of policies are compared on the tokens of rollouts, by the ratio r = π_new/π_old of each token and by the
ratio W = Π_t r of each response:

- 'sampler': the trainer's policy against the policy that the inference engine sampled from;
- 'behavior': the current policy against the behavior policy, from the second update of a step on.

Both are sums over samples of π_old, so Σ r²/N - 1 estimates χ²(π_new‖π_old), and (Σ r)²/Σ r² is the effective sample
size (Kish): the number of samples of π_new that are worth as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upge.estimate import Estimate, is_extreme
from upge.train.sample import Trajectory
from upge.views import PackedTokens

#: The number of parts (quarters) of a response that are also compared separately.
PARTS = 4
#: log r and log W are clipped to ± this value, so that squares and their sums stay finite.
_LARGEST = 300.0


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def quarters(
    row: Int[Tensor, "*shape"], column: Int[Tensor, "*shape"], trajectories: Sequence[Trajectory]
) -> Int[Tensor, "*shape"]:
    """The quarter of the response that each token is in, from 0: ⌊4·t/|τ|⌋ for the t-th token, t from 0.

    Args:
        row, column: for each token, its trajectory among `trajectories` and its index t in the response.
    """
    rows, place = row.unique(return_inverse=True)
    lengths = torch.tensor([max(len(trajectories[r].response_ids), 1) for r in rows.tolist()], dtype=torch.long)
    return (PARTS * column // lengths[place]).clamp(max=PARTS - 1)


@dataclass(frozen=True, eq=False)
class RatioSums:
    """Sums of the ratios of two policies; instances can be added.

    Attributes:
        tokens: [4, 5] for each quarter of the response: the number of tokens, Σ r, Σ r², Σ log r, and the number of
            tokens with r outside [1/2, 2].
        responses: [3] the number of responses, Σ W, Σ W².
    """

    tokens: Float[Tensor, "4 5"] = field(default_factory=lambda: _zeros(PARTS, 5))
    responses: Float[Tensor, "3"] = field(default_factory=lambda: _zeros(3))

    @staticmethod
    def of(log_ratio: Float[Tensor, "n"], row: Int[Tensor, "n"], quarter: Int[Tensor, "n"]) -> RatioSums:
        """The sums of some tokens: all compared tokens of their trajectories, which `row` identifies."""
        bounded = log_ratio.double().clamp(-_LARGEST, _LARGEST)
        ratio = bounded.exp()
        columns = torch.stack([torch.ones_like(ratio), ratio, ratio**2, bounded, is_extreme(log_ratio).double()], dim=1)
        rows, place = row.unique(return_inverse=True)
        whole = _zeros(len(rows)).index_add(0, place, bounded).clamp(-_LARGEST, _LARGEST).exp()
        responses = torch.stack([torch.ones_like(whole), whole, whole**2]).sum(dim=1)
        return RatioSums(_zeros(PARTS, 5).index_add(0, quarter, columns), responses)

    def __add__(self, other: RatioSums) -> RatioSums:
        return RatioSums(self.tokens + other.tokens, self.responses + other.responses)

    def metrics(self) -> dict[str, float]:
        """The metrics of this pair; empty without tokens. A quarter without tokens has none."""
        if not float(self.responses[0]):
            return {}
        number, ratio, square, log_ratio, extreme = self.tokens.sum(dim=0).tolist()
        responses, weight, weight_square = self.responses.tolist()
        metrics = {
            "chi2_tokens": square / number - 1,
            "chi2_responses": weight_square / responses - 1,
            "ess_tokens": ratio**2 / (number * square),
            "ess_responses": weight**2 / (responses * weight_square),
            "kl_k1": -log_ratio / number,
            "kl_k3": (ratio - log_ratio) / number - 1,
            "extreme_ratio_share": extreme / number,
        }
        for part, (number, ratio, square, log_ratio, extreme) in enumerate(self.tokens.tolist(), 1):
            if number:
                metrics[f"chi2_q{part}"] = square / number - 1
                metrics[f"kl_k3_q{part}"] = (ratio - log_ratio) / number - 1
                metrics[f"extreme_ratio_share_q{part}"] = extreme / number
        return metrics


@dataclass(frozen=True, eq=False)
class OffPolicySums:
    """Sums over a step's updates that say how far off-policy they are; instances can be added.

    Attributes:
        sampler, behavior: the two pairs of policies.
        masses: for each term, [4, 2] by quarter of the response: the sum of the absolute weights that its tokens would
            have without the stabilization mask, and the part of that sum that the mask removes.
    """

    sampler: RatioSums = field(default_factory=RatioSums)
    behavior: RatioSums = field(default_factory=RatioSums)
    masses: Mapping[str, Float[Tensor, "4 2"]] = field(default_factory=dict[str, Tensor])

    @staticmethod
    def of_sampler(
        tokens: PackedTokens, compared: Bool[Tensor, "n"], trajectories: Sequence[Trajectory]
    ) -> OffPolicySums:
        """The trainer's policy against the sampler's, on the tokens `compared`."""
        assert tokens.sampler_logprobs is not None
        return OffPolicySums(sampler=_ratios(tokens, tokens.sampler_logprobs, compared, trajectories))

    @staticmethod
    def of_behavior(
        tokens: PackedTokens, compared: Bool[Tensor, "n"], trajectories: Sequence[Trajectory]
    ) -> OffPolicySums:
        """The current policy against the behavior policy, on the tokens `compared`; zero where they are the same."""
        if tokens.behavior_logprobs is None:
            return OffPolicySums()
        return OffPolicySums(behavior=_ratios(tokens, tokens.behavior_logprobs, compared, trajectories))

    @staticmethod
    def of_estimate(estimate: Estimate, trajectories: Sequence[Trajectory]) -> OffPolicySums:
        """What an estimate's stabilization masks remove. `trajectories` are those of the update's batch, by row."""
        batch = estimate.batch
        assert batch.logprobs is not None
        row, column = batch.places
        quarter = quarters(row.cpu(), column.cpu(), trajectories).flatten()
        masses = {}
        for name, factors in estimate.terms.items():
            scale = factors.gate * factors.reduction * factors.advantages
            log_ratio = batch.logprobs.detach() - factors.log_denominator + factors.shape.log()
            mass = torch.where(scale == 0, 0.0, scale.abs().double() * log_ratio.double().clamp(max=_LARGEST).exp())
            columns = torch.stack([mass, mass * (1 - factors.mask)], dim=-1).detach().cpu()
            masses[name] = _zeros(PARTS, 2).index_add(0, quarter, columns.flatten(0, -2))
        return OffPolicySums(masses=masses)

    def __add__(self, other: OffPolicySums) -> OffPolicySums:
        names = dict.fromkeys([*self.masses, *other.masses])
        empty = _zeros(PARTS, 2)
        masses = {name: self.masses.get(name, empty) + other.masses.get(name, empty) for name in names}
        return OffPolicySums(self.sampler + other.sampler, self.behavior + other.behavior, masses)

    def metrics(self) -> dict[str, float]:
        """The metrics of both pairs and of each term's mask; docs/metrics.md lists them."""
        pairs = {"sampler": self.sampler, "behavior": self.behavior}
        metrics = {f"{pair}/{name}": value for pair, sums in pairs.items() for name, value in sums.metrics().items()}
        for term, sums in self.masses.items():
            parts = {"": sums.sum(dim=0), **{f"_q{part}": one for part, one in enumerate(sums, 1)}}
            shares = {f"{term}/masked_mass{part}": one.tolist() for part, one in parts.items()}
            metrics |= {name: removed / mass for name, (mass, removed) in shares.items() if mass}
        return metrics


def _ratios(
    tokens: PackedTokens, old: Float[Tensor, "n"], compared: Bool[Tensor, "n"], trajectories: Sequence[Trajectory]
) -> RatioSums:
    """The sums of π_θ against the policy with the log-probs `old`, on the tokens `compared`."""
    assert tokens.logprobs is not None
    log_ratio = (tokens.logprobs.detach().float() - old.float())[compared].cpu()
    row, column = (place[compared].cpu() for place in tokens.places)
    return RatioSums.of(log_ratio, row, quarters(row, column, trajectories))
