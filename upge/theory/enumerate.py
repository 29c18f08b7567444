"""The exact expectation of an algorithm's gradient, by adding up every batch that could have been drawn.

On a policy of a few responses a group of n rollouts is one of finitely many multisets, each with a multinomial
probability. The algorithm is evaluated on each of them as it would be in training, its weights are chained with
∇log π_θ of the table, and the sum weighted by probability is the expected gradient, without sampling:

    E[g] = Σ_{multisets} n!/Π k_y! · Π_y π_b(y)^{k_y} · g(batch).

    policy = SoftmaxPolicy.random(vocabulary=3, horizon=2)
    setting = Setting(policy, reward=lambda tokens: float(len(tokens) == 2))
    report = expectation(algorithm, setting, group_size=3)
    report.relative_bias, report.cosine, report.snr
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.theory.draws import Evaluator, Setting, all_groups, check, multisets
from upge.theory.policy import (
    Responses,
    SoftmaxPolicy,
    exact_gradient,
    exact_values,
    forward_kl,
    forward_kl_gradient,
    reverse_kl,
    reverse_kl_gradient,
)

__all__ = [
    "BiasRow",
    "Expectation",
    "Responses",
    "Setting",
    "SoftmaxPolicy",
    "bias_table",
    "exact_gradient",
    "exact_values",
    "expectation",
    "forward_kl",
    "forward_kl_gradient",
    "mixture",
    "reverse_kl",
    "reverse_kl_gradient",
]

#: More batches than that are refused: an hour of small tensors.
MOST_BATCHES = 200_000
#: Lengths of gradients below this are rounding errors of zero.
_ZERO = 1e-13


@dataclass(frozen=True, eq=False)
class Expectation:
    """What an algorithm's gradient is on average, beside the exact gradient that it is held against.

    Attributes:
        mean: [P, V] its expectation, in the direction of ascent.
        exact: [P, V] the gradient that it should be.
        scale: the known positive number that its own normalization puts in front, such as 1/length: unbiased means
            mean = scale · exact.
        variance: trace of the covariance of one batch's gradient.
        batches: how many different batches were added up.
        accepted: probability that a drawn group is kept (below 1 with dynamic sampling or preference pairs).
    """

    mean: Float[Tensor, "P V"]
    exact: Float[Tensor, "P V"]
    scale: float
    variance: float
    batches: int
    accepted: float

    @property
    def bias(self) -> Float[Tensor, "P V"]:
        """[P, V] mean/scale - exact."""
        return self.mean / self.scale - self.exact

    @property
    def relative_bias(self) -> float:
        """‖bias‖/‖exact‖."""
        return _ratio(float(self.bias.norm()), float(self.exact.norm()))

    @property
    def cosine(self) -> float:
        """Of the angle between the expectation and the exact gradient; 0 if one of them vanishes."""
        lengths = float(self.mean.norm() * self.exact.norm())
        return float((self.mean * self.exact).sum()) / lengths if lengths > _ZERO**2 else 0.0

    @property
    def snr(self) -> float:
        """Signal to noise of one batch: ‖mean‖/√variance."""
        return _ratio(float(self.mean.norm()), math.sqrt(self.variance))


def expectation(
    algorithm: Algorithm,
    setting: Setting,
    *,
    group_size: int = 3,
    demonstrations: int = 1,
    questions: int = 1,
    target: Float[Tensor, "P V"] | None = None,
    scale: float = 1.0,
) -> Expectation:
    """The exact expectation and variance of the gradient that `algorithm` takes from one batch.

    Args:
        group_size: rollouts per question, drawn independently.
        demonstrations: per question, drawn independently of each other and of the rollouts.
        questions: groups per batch. All are of one prompt, whose policy `setting.policy` is, and drawn independently.
        target: what it is held against; by default ∇E[R], or -∇KL(π_β‖π_θ) for one that learns from demonstrations
            alone.
        scale: the known positive factor that its normalization puts in front of the target.

    An algorithm with preference pairs gets one a question, two responses of unequal reward out of two drawn like
    rollouts. One with dynamic sampling gets its groups conditioned on the gate, as after unlimited rounds.
    Its critic's loss, an interleaved update and a validation objective are no part of this gradient.

    Raises:
        ConfigError: the setting lacks what the algorithm reads or learns from, or there are too many batches.
    """
    needs = algorithm.needs
    check(algorithm, setting, group_size, demonstrations)
    groups, accepted = all_groups(algorithm, setting, group_size, demonstrations)
    count = math.comb(len(groups) + questions - 1, questions)
    if count > MOST_BATCHES:
        raise ConfigError(
            f"expectation: {count} batches, more than {MOST_BATCHES}; take fewer responses, a smaller group_size, "
            "or an expert with fewer responses"
        )
    probability, slopes = [], []
    sums = Evaluator(algorithm, setting)
    for chosen, weight in multisets([p for _, p in groups], questions):
        probability.append(weight)
        slopes.append(sums.gradient([groups[g][0] for g in chosen]))
    p, gradients = torch.tensor(probability, dtype=torch.float64), torch.stack(slopes)
    mean = torch.einsum("m,mpv->pv", p, gradients)
    variance = float((p * (gradients - mean).square().sum(dim=(1, 2))).sum())
    if target is None:
        objectives = setting.objectives
        target = objectives["reward" if needs.rollouts or needs.preference_pairs else "imitation"]
    return Expectation(mean, target, scale, variance, len(p), accepted)


def mixture(mean: Float[Tensor, "P V"], objectives: Iterable[Tensor]) -> tuple[tuple[float, ...], float]:
    """How much of each objective an expected gradient holds, and how much of it is none of them.

    Returns:
        the coefficients c of least ‖mean - Σ c·objective‖, and that remainder relative to ‖mean‖: 0 if `mean` is a
        combination of the objectives, 1 if it is orthogonal to them all.
    """
    basis = torch.stack([objective.flatten() for objective in objectives], dim=1)
    found = torch.linalg.lstsq(basis, mean.flatten()[:, None], driver="gelsd").solution[:, 0]
    return tuple(found.tolist()), _ratio(float((mean.flatten() - basis @ found).norm()), float(mean.norm()))


def _ratio(above: float, below: float) -> float:
    """above/below; of two that vanish 0, of a vanishing divisor infinity."""
    return above / below if below > _ZERO else 0.0 if above <= _ZERO else math.inf


@dataclass(frozen=True)
class BiasRow:
    """One algorithm's expectation in figures: what it climbs, what else it does, and how noisy it is.

    Attributes:
        name: the algorithm's.
        coefficients: objective → its coefficient in the expected gradient, of least squares (see `mixture`).
        remainder: the share of the expected gradient's length that is none of these objectives.
        cosine: with the first of the objectives.
        snr: of one batch.
        accepted: probability that a drawn group is kept.
    """

    name: str
    coefficients: Mapping[str, float]
    remainder: float
    cosine: float
    snr: float
    accepted: float


def bias_table(algorithms: Iterable[Algorithm], setting: Setting, **settings: int) -> list[BiasRow]:
    """A row for each algorithm, in their order; `settings` are those of `expectation`.

    The objectives of a row are those that its trajectories can tell of: the reward if it sees rollouts or pairs,
    imitation if it sees demonstrations.
    """
    found = []
    for algorithm in algorithms:
        needs, objectives = algorithm.needs, setting.objectives
        seen = {"reward": needs.rollouts or needs.preference_pairs, "imitation": needs.demonstrations}
        chosen = {name: objectives[name] for name, is_seen in seen.items() if is_seen}
        first = next(iter(chosen.values()))
        report = expectation(algorithm, setting, target=first, **settings)
        coefficients, remainder = mixture(report.mean, chosen.values())
        named = dict(zip(chosen, coefficients, strict=True))
        found.append(BiasRow(algorithm.name, named, remainder, report.cosine, report.snr, report.accepted))
    return found
