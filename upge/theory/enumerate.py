"""The exact expectation of an algorithm's gradient, as a sum over every batch that can be drawn.

With few responses, a group of n rollouts is one of finitely many multisets, each with a multinomial probability. The
algorithm is evaluated on each of them as in training, its weights are multiplied by ∇log π_θ of the table, and the sum
weighted by probability is the expected gradient, without sampling:

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

#: More batches than this are refused; this many take about an hour.
MOST_BATCHES = 200_000
#: A gradient shorter than this is a rounding error of zero.
_ZERO = 1e-13


@dataclass(frozen=True, eq=False)
class Expectation:
    """The expectation of an algorithm's gradient, with the exact gradient that it is compared with.

    Attributes:
        mean: [P, V] the expectation, in the direction of ascent.
        scale: the known positive factor of the algorithm's normalization, such as 1/length; an unbiased algorithm has
            mean = scale · exact.
        variance: the trace of the covariance of one batch's gradient.
        accepted: the probability that a drawn group is kept (below 1 with dynamic sampling or preference pairs).
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
        """The cosine between the expectation and the exact gradient; 0 if one of them vanishes."""
        lengths = float(self.mean.norm() * self.exact.norm())
        return float((self.mean * self.exact).sum()) / lengths if lengths > _ZERO**2 else 0.0

    @property
    def snr(self) -> float:
        """The signal-to-noise ratio of one batch: ‖mean‖/√variance."""
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
    """The exact expectation and variance of the gradient that an algorithm takes from one batch.

    An algorithm with preference pairs gets one pair per question: two responses drawn like rollouts, given that their
    rewards differ. An algorithm with dynamic sampling gets groups conditioned on its gate, as after unlimited rounds.
    The critic's loss, interleaved updates and validation objectives are not part of this gradient.

    Args:
        group_size: rollouts per question, drawn independently.
        demonstrations: demonstrations per question, drawn independently of each other and of the rollouts.
        questions: groups per batch, drawn independently for the one prompt of the setting.
        target: [P, V] the gradient to compare with. The default is ∇E[R], or -∇KL(π_β‖π_θ) for an algorithm that learns
            from demonstrations only.
        scale: the known positive factor that the algorithm's normalization puts in front of the target.

    Raises:
        ConfigError: the setting lacks something that the algorithm reads or learns from, or there are too many batches.
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
    evaluator, rows, probability = Evaluator(algorithm, setting), [g for g, _ in groups], [p for _, p in groups]
    if questions == 1:
        gradients = evaluator.gradients(rows)
    else:
        batches = list(multisets(probability, questions))
        gradients = torch.stack([evaluator.gradient([rows[g] for g in chosen]) for chosen, _ in batches])
        probability = [p for _, p in batches]
    p = torch.tensor(probability, dtype=torch.float64)
    mean = torch.einsum("m,mpv->pv", p, gradients)
    variance = float((p * (gradients - mean).square().sum(dim=(1, 2))).sum())
    if target is None:
        objectives = setting.objectives
        target = objectives["reward" if needs.rollouts or needs.preference_pairs else "imitation"]
    return Expectation(mean, target, scale, variance, len(p), accepted)


def mixture(mean: Float[Tensor, "P V"], objectives: Iterable[Tensor]) -> tuple[tuple[float, ...], float]:
    """Decompose an expected gradient [P, V] into the gradients of objectives by least squares.

    Returns:
        The coefficients c that minimize ‖mean - Σ c·objective‖, and this remainder relative to ‖mean‖: 0 if `mean` is a
        combination of the objectives, 1 if it is orthogonal to all of them.
    """
    basis = torch.stack([objective.flatten() for objective in objectives], dim=1)
    coefficients = torch.linalg.lstsq(basis, mean.flatten()[:, None], driver="gelsd").solution[:, 0]
    remainder = float((mean.flatten() - basis @ coefficients).norm())
    return tuple(coefficients.tolist()), _ratio(remainder, float(mean.norm()))


def _ratio(above: float, below: float) -> float:
    """above/below; 0 if both vanish, infinity if only the divisor does."""
    return above / below if below > _ZERO else 0.0 if above <= _ZERO else math.inf


@dataclass(frozen=True)
class BiasRow:
    """The bias and noise of one algorithm.

    Attributes:
        coefficients: objective → its coefficient in the expected gradient, by least squares (see `mixture`).
        remainder: the length of the rest, relative to the expected gradient's.
        cosine: with the gradient of the first objective.
    """

    name: str
    coefficients: Mapping[str, float]
    remainder: float
    cosine: float
    snr: float
    accepted: float


def bias_table(algorithms: Iterable[Algorithm], setting: Setting, **settings: int) -> list[BiasRow]:
    """One row per algorithm; the other arguments are those of `expectation`.

    The objectives of a row depend on the algorithm's trajectories: the reward if it learns from rollouts or pairs,
    imitation if it learns from demonstrations.
    """
    rows: list[BiasRow] = []
    for algorithm in algorithms:
        needs, objectives = algorithm.needs, setting.objectives
        relevant = {"reward": needs.rollouts or needs.preference_pairs, "imitation": needs.demonstrations}
        chosen = {name: objectives[name] for name, is_relevant in relevant.items() if is_relevant}
        first = next(iter(chosen.values()))
        report = expectation(algorithm, setting, target=first, **settings)
        coefficients, remainder = mixture(report.mean, chosen.values())
        named = dict(zip(chosen, coefficients, strict=True))
        rows.append(BiasRow(algorithm.name, named, remainder, report.cosine, report.snr, report.accepted))
    return rows
