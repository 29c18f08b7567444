"""A softmax policy small enough to enumerate, and the exact gradients of its possible objectives.

The policy is a table: a row of logits [V] for each prefix of a response. Legend: S responses, T tokens of the longest,
P prefixes, V vocabulary. All gradients are with respect to the table, have its shape [P, V], and are exact sums over
all responses, in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from upge.errors import ConfigError

#: More responses than this are not enumerated, because enumerating groups of them would take too long.
MOST_RESPONSES = 1000
#: [S] the reward of every response, or a function of a response's tokens.
Reward = Tensor | Callable[[tuple[int, ...]], float]


@dataclass(frozen=True, eq=False)
class Responses:
    """All possible responses; short responses come first.

    Attributes:
        tokens: [S, T] the responses.
        mask: [S, T] True on the tokens of each response.
        prefix: [S, T] the row of the policy's table that each token is drawn from.
        finished: [S] False for the responses that are cut before their end token.
        prefixes: P, the number of rows.
    """

    tokens: Int[Tensor, "S T"]
    mask: Bool[Tensor, "S T"]
    prefix: Int[Tensor, "S T"]
    finished: Bool[Tensor, "S"]
    prefixes: int

    def __len__(self) -> int:
        return len(self.tokens)

    def lists(self) -> list[tuple[int, ...]]:
        """The responses as tuples of tokens, the end token included."""
        return [tuple(row[keep].tolist()) for row, keep in zip(self.tokens, self.mask, strict=True)]


@functools.cache
def responses(vocabulary: int, horizon: int, end: int | None) -> Responses:
    """All responses of at most `horizon` tokens.

    Args:
        end: the token after which a response ends, which belongs to it; None = all have `horizon` tokens.

    Raises:
        ConfigError: an argument is out of range, or there are more than `MOST_RESPONSES` responses.
    """
    if vocabulary < 2 or horizon < 1 or not (end is None or 0 <= end < vocabulary):
        raise ConfigError(
            f"responses: vocabulary={vocabulary}, horizon={horizon}, end={end}; need at least 2 tokens, 1 step, and an "
            "end token of the vocabulary or None"
        )
    rows: dict[tuple[int, ...], int] = {(): 0}
    done: list[tuple[int, ...]] = []
    growing: list[tuple[int, ...]] = [()]
    for t in range(horizon):
        longer = [prefix + (token,) for prefix in growing for token in range(vocabulary)]
        ended = [r for r in longer if r[-1] == end or t == horizon - 1]
        growing = [r for r in longer if r[-1] != end and t < horizon - 1]
        done += ended
        rows |= {prefix: len(rows) + i for i, prefix in enumerate(growing)}
        if len(done) + len(growing) > MOST_RESPONSES:
            raise ConfigError(
                f"responses: vocabulary={vocabulary}, horizon={horizon} make more than {MOST_RESPONSES} responses; "
                "take fewer tokens or steps"
            )
    padded = [r + (0,) * (horizon - len(r)) for r in done]
    prefix = [[rows[r[:t]] if t < len(r) else 0 for t in range(horizon)] for r in done]
    lengths = torch.tensor([len(r) for r in done])
    mask = lengths[:, None] > torch.arange(horizon)
    finished = torch.tensor([end is None or r[-1] == end for r in done])
    return Responses(torch.tensor(padded), mask, torch.tensor(prefix), finished, len(rows))


@dataclass(frozen=True, eq=False)
class SoftmaxPolicy:
    """π_θ(y) = Π_t softmax(θ[y_<t])[y_t], where θ is the table of logits.

    Attributes:
        logits: [P, V] float64, a row for each prefix in the order of `responses`; -inf for impossible tokens.
        horizon: maximum number of tokens of a response.
        end: the token after which a response ends; None = all responses have `horizon` tokens.

    Raises:
        ConfigError: the table does not have a row for each prefix.
    """

    logits: Float[Tensor, "P V"]
    horizon: int
    end: int | None = 0

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or self.logits.dtype != torch.float64:
            raise ConfigError(
                f"SoftmaxPolicy.logits: found {self.logits.dtype} {list(self.logits.shape)}; give float64 [P, V]"
            )
        if len(self.logits) != self.responses.prefixes:
            raise ConfigError(
                f"SoftmaxPolicy.logits: {len(self.logits)} rows, but there are {self.responses.prefixes} prefixes; "
                "use SoftmaxPolicy.random(vocabulary, horizon)"
            )

    @classmethod
    def random(
        cls, vocabulary: int = 3, horizon: int = 2, seed: int = 0, *, end: int | None = 0, scale: float = 1.0
    ) -> SoftmaxPolicy:
        """Normally distributed logits with standard deviation `scale`."""
        shape = (responses(vocabulary, horizon, end).prefixes, vocabulary)
        return cls(_noise(shape, seed) * scale, horizon, end)

    def moved(self, scale: float, seed: int = 1) -> SoftmaxPolicy:
        """A nearby policy, with normal noise of standard deviation `scale` added to every logit."""
        return SoftmaxPolicy(self.logits + scale * _noise(self.logits.shape, seed), self.horizon, self.end)

    def conditioned(self, weights: Float[Tensor, "S"]) -> SoftmaxPolicy:
        """The policy with response probabilities proportional to π(y)·weights(y), for example conditioned on success.

        Raises:
            ConfigError: a weight is negative, or no response remains.
        """
        mass = self.probabilities * weights
        if not bool((mass >= 0).all()) or float(mass.sum()) <= 0:
            raise ConfigError("conditioned: weights must not be negative, and some must be positive")
        space, taken = self.responses, torch.zeros_like(self.logits)
        spread = mass[:, None].expand(space.mask.shape)[space.mask]
        taken.index_put_((space.prefix[space.mask], space.tokens[space.mask]), spread, accumulate=True)
        reached = taken.sum(dim=1, keepdim=True) > 0
        return SoftmaxPolicy(torch.where(reached, taken.log(), 0.0), self.horizon, self.end)

    @property
    def responses(self) -> Responses:
        """All possible responses."""
        return responses(self.logits.shape[1], self.horizon, self.end)

    @property
    def token_logprobs(self) -> Float[Tensor, "S T"]:
        """[S, T] log π(y_t | y_<t), 0 after the response's end; differentiable with respect to the logits."""
        space = self.responses
        chosen = self.logits.log_softmax(dim=1)[space.prefix, space.tokens]
        return torch.where(space.mask, chosen, torch.zeros_like(chosen))

    @property
    def logprobs(self) -> Float[Tensor, "S"]:
        """[S] log π(y) of whole responses."""
        return self.token_logprobs.sum(dim=1)

    @property
    def probabilities(self) -> Float[Tensor, "S"]:
        """[S] π(y); they sum to 1."""
        return self.logprobs.exp()

    @property
    def token_entropies(self) -> Float[Tensor, "S T"]:
        """[S, T] entropy of the distribution that each token is drawn from (nats)."""
        space = self.responses
        return torch.where(space.mask, _entropies(self.logits)[space.prefix], 0.0)

    @property
    def token_scores(self) -> Float[Tensor, "S T P V"]:
        """[S, T, P, V] ∇ log π(y_t | y_<t) = onehot(prefix) ⊗ (onehot(y_t) - π(· | y_<t))."""
        probabilities = self.logits.softmax(dim=1)[self.responses.prefix]
        return self._at_prefix(one_hot(self.responses.tokens, self.logits.shape[1]) - probabilities)

    @property
    def entropy_scores(self) -> Float[Tensor, "S T P V"]:
        """[S, T, P, V] the gradient of each token's entropy: onehot(prefix) ⊗ -π·(log π + H)."""
        log_p = self.logits.log_softmax(dim=1)
        p = log_p.exp()
        slope = torch.where(p > 0, -p * (log_p + _entropies(self.logits)[:, None]), 0.0)
        return self._at_prefix(slope[self.responses.prefix])

    def _at_prefix(self, rows: Float[Tensor, "S T V"]) -> Float[Tensor, "S T P V"]:
        """Gradients with respect to each token's row of the table, as gradients with respect to the whole table.

        They are 0 after the response's end.
        """
        where = one_hot(self.responses.prefix, self.responses.prefixes) * self.responses.mask[..., None]
        return where[..., None] * rows[:, :, None, :]


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _entropies(logits: Tensor) -> Float[Tensor, "P"]:
    return torch.special.entr(logits.softmax(dim=1)).sum(dim=1)


def rewards_of(policy: SoftmaxPolicy, reward: Reward) -> Float[Tensor, "S"]:
    """[S] the reward of every response, from [S] rewards or a function of a response's tokens.

    Raises:
        ConfigError: the tensor has another shape.
    """
    if not isinstance(reward, Tensor):
        reward = torch.tensor([float(reward(tokens)) for tokens in policy.responses.lists()], dtype=torch.float64)
    if reward.shape != (len(policy.responses),):
        raise ConfigError(f"reward: found shape {list(reward.shape)}; there are {len(policy.responses)} responses")
    return reward.double()


def exact_gradient(policy: SoftmaxPolicy, reward: Reward) -> Float[Tensor, "P V"]:
    """∇ E_π[R] = Σ_y π(y)·R(y)·∇ log π(y)."""
    return _weighted_scores(policy, policy.probabilities * rewards_of(policy, reward))


def exact_values(policy: SoftmaxPolicy, reward: Reward) -> Float[Tensor, "P"]:
    """[P] V(prefix) = E_π[R | prefix], the values of a perfect critic; 0 for unreachable prefixes."""
    space = policy.responses
    taken = torch.stack([policy.probabilities.detach(), (policy.probabilities * rewards_of(policy, reward)).detach()])
    spread = taken[:, :, None].expand(2, *space.mask.shape)[:, space.mask]
    reached, earned = torch.zeros(2, space.prefixes, dtype=torch.float64).index_add(1, space.prefix[space.mask], spread)
    return torch.where(reached > 0, earned / reached, 0.0)


def forward_kl(policy: SoftmaxPolicy, expert: SoftmaxPolicy) -> float:
    """KL(π_β‖π_θ) = Σ_y π_β(y)·log π_β(y)/π_θ(y), over whole responses (nats)."""
    return reverse_kl(expert, policy)


def forward_kl_gradient(policy: SoftmaxPolicy, expert: SoftmaxPolicy) -> Float[Tensor, "P V"]:
    """∇ KL(π_β‖π_θ) = -Σ_y π_β(y)·∇ log π_θ(y): the gradient of maximum likelihood on π_β's responses, negated."""
    return -_weighted_scores(policy, expert.probabilities)


def reverse_kl(policy: SoftmaxPolicy, reference: SoftmaxPolicy) -> float:
    """KL(π_θ‖π_0) = Σ_y π_θ(y)·log π_θ(y)/π_0(y), over whole responses (nats)."""
    p = policy.probabilities.detach()
    return float(torch.where(p > 0, p * (policy.logprobs.detach() - reference.logprobs), 0.0).sum())


def reverse_kl_gradient(policy: SoftmaxPolicy, reference: SoftmaxPolicy) -> Float[Tensor, "P V"]:
    """∇ KL(π_θ‖π_0) = Σ_y π_θ(y)·log(π_θ(y)/π_0(y))·∇ log π_θ(y).

    The derivative of the logarithm adds Σ_y π_θ(y)·∇ log π_θ(y) = 0.
    """
    return _weighted_scores(policy, policy.probabilities * (policy.logprobs - reference.logprobs))


def _weighted_scores(policy: SoftmaxPolicy, weights: Float[Tensor, "S"]) -> Float[Tensor, "P V"]:
    """Σ_y weights(y)·∇ log π(y)."""
    return torch.einsum("s,stpv->pv", weights, policy.token_scores).detach()
