"""Gains of single prompts' steps, the best choice of a prompt's signal, and the regret of gates.

A prompt offers two directions: the gradient g_R of its rollouts' term and the gradient g_S of its demonstration's term.
A gate turns a prompt into two coefficients (α, β), so its step is along d = α·g_R + β·g_S. With the gradient u of a
held-out objective, a step of length c gains, to first order,

    c·⟨u, d⟩/‖d‖ = c·(α⟨u, g_R⟩ + β⟨u, g_S⟩)/√(α²‖g_R‖² + 2αβ⟨g_R, g_S⟩ + β²‖g_S‖²).

Five inner products per prompt therefore give the gain of every gate. With a common learning rate instead of a common
length, the denominator is missing. A direction of length 0 (rollouts that all succeed or all fail) makes no step.

u is estimated from H independent parts of the held-out data, u = mean of u_h, and every gain is kept per part. The
error of u is common to all prompts, so it does not average out over them: `two_way` takes prompts and parts as two
crossed samples. A choice that is valued by the estimate of u that it was made with looks too good. Therefore the
choices in `best` and `learned` for part h use only the other parts, and `learned` uses only the other prompts.

Legend: N groups of M prompts, H parts of the held-out data, A actions, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

#: The quantile of Student's distribution at the upper end of a 95 % interval.
_UPPER_QUANTILE = 0.975


class Signals(NamedTuple):
    """The inner products of the two directions of each group, for one held-out objective.

    Attributes:
        rollouts: [N, H] ⟨u_h, g_R⟩.
        demonstrations: [N, H] ⟨u_h, g_S⟩.
        squares: [N, 3] ‖g_R‖², ⟨g_R, g_S⟩ and ‖g_S‖².
    """

    rollouts: Float[Tensor, "N H"]
    demonstrations: Float[Tensor, "N H"]
    squares: Float[Tensor, "N 3"]

    def lengths(self, coefficients: Float[Tensor, "N 2"]) -> Float[Tensor, "N"]:
        """‖α·g_R + β·g_S‖ of each group."""
        a, b = coefficients.unbind(dim=-1)
        own, cross, other = self.squares.unbind(dim=-1)
        return (a * a * own + 2 * a * b * cross + b * b * other).clamp(min=0).sqrt()


def gains(signals: Signals, coefficients: Float[Tensor, "N 2"], fixed_length: bool = True) -> Float[Tensor, "N H"]:
    """The first-order gain of each group's step, by each part of the held-out data.

    Args:
        coefficients: α and β of each group.
        fixed_length: the gain of a step of length 1, else that of a step at learning rate 1.
    """
    a, b = coefficients[:, :1], coefficients[:, 1:]
    along = a * signals.rollouts + b * signals.demonstrations
    if not fixed_length:
        return along
    lengths = signals.lengths(coefficients)[:, None]
    return torch.where(lengths > 0, along / lengths, 0.0)


def by_prompt(values: Float[Tensor, "N H"], prompts: Int[Tensor, "N"]) -> Float[Tensor, "M H"]:
    """The mean over each prompt's groups; `prompts` are numbers from 0 to M - 1, each of which occurs."""
    sums = values.new_zeros(int(prompts.max()) + 1, *values.shape[1:]).index_add(0, prompts, values)
    return sums / torch.bincount(prompts).to(values)[:, None]


class Mean(NamedTuple):
    """A mean with its 95 % interval, and the two-sided p-value of the hypothesis that it is 0."""

    value: float
    low: float
    high: float
    p_value: float


def two_way(values: Float[Tensor, "G M H"]) -> list[Mean]:
    """The mean of each of G tables over M prompts and H parts that are both random samples (crossed random effects).

    With the variances s_M² of the M row means and s_H² of the H column means, and the mean square e² of the residuals
    without both (degrees of freedom (M - 1)(H - 1)):

        σ² = s_M²/M + s_H²/H - e²/(M·H),

    because both summands contain the interaction. It is unbiased; it is not taken below either summand. The interval
    is mean ± t·σ with the degrees of freedom of Welch and Satterthwaite. Where all values are equal the interval has
    no width, and p is NaN.

    Raises:
        ValueError: fewer than two prompts or parts.
    """
    prompts, parts = values.shape[1:]
    if min(prompts, parts) < 2:
        raise ValueError(f"found {prompts} prompts and {parts} parts of the held-out data; two of each are needed")
    values = values.double()
    mean, rows, columns = values.mean(dim=(1, 2)), values.mean(dim=2), values.mean(dim=1)
    by_row, by_column = rows.var(dim=1) / prompts, columns.var(dim=1) / parts
    rest = values - rows[:, :, None] - columns[:, None] + mean[:, None, None]
    interaction = rest.square().sum(dim=(1, 2)) / ((prompts - 1) * (parts - 1) * prompts * parts)
    variance = torch.maximum(by_row + by_column - interaction, torch.maximum(by_row, by_column))
    freedom = variance.square() / (by_row.square() / (prompts - 1) + by_column.square() / (parts - 1))
    results = []
    for m, v, f in zip(mean.tolist(), variance.tolist(), freedom.tolist(), strict=True):
        if not v > 0:
            results.append(Mean(m, m, m, float("nan")))
            continue
        error = v**0.5
        half = float(stats.t.ppf(_UPPER_QUANTILE, f)) * error
        results.append(Mean(m, m - half, m + half, float(2 * stats.t.sf(abs(m) / error, f))))
    return results


def best(values: Float[Tensor, "A N H"], crossed: bool = True) -> Int[Tensor, "N H"]:
    """The action with the largest gain of each group, for each part; ties go to the first action.

    Args:
        crossed: True = choose for part h by the mean over the other parts. False = choose by the mean over all parts;
            valued by the same parts, that choice looks better than it is.
    """
    return _others(values, crossed).argmax(dim=0)


def learned(
    values: Float[Tensor, "A N H"],
    features: Float[Tensor, "N F"],
    prompts: Int[Tensor, "N"],
    folds: int = 8,
    ridge: float = 1e-3,
) -> Int[Tensor, "N H"]:
    """The action with the largest predicted gain of each group, for each part, by cross-validation.

    A ridge regression predicts the gain of each action from the features. For part h of a group it is fitted to the
    mean over the other parts, on the groups of the prompts of other folds. With a constant feature alone it is the
    best single action; with an indicator per pass rate it is the best table of pass rates.

    Args:
        features: those that vary are standardized, so that `ridge`, which is relative to the number of groups, affects
            them equally.
        folds: prompts are assigned to folds by their number; at most M are used.
    """
    actions, groups, parts = values.shape
    x = features.double()
    spread = x.std(dim=0, correction=0)
    x = torch.where(spread > 0, (x - x.mean(dim=0)) / spread.clamp(min=1e-12), 1.0)
    x = torch.cat([torch.ones(groups, 1, dtype=torch.float64), x], dim=1)
    targets = _others(values, True).double().permute(1, 0, 2).reshape(groups, -1)
    fold = prompts % min(folds, int(prompts.max()) + 1)
    predicted = torch.zeros_like(targets)
    for number in fold.unique().tolist():
        rest, own = fold != number, fold == number
        square = x[rest].T @ x[rest] + ridge * int(rest.sum()) * torch.eye(x.shape[1], dtype=torch.float64)
        predicted[own] = x[own] @ torch.linalg.solve(square, x[rest].T @ targets[rest])
    return predicted.reshape(groups, actions, parts).argmax(dim=1)


def taken(values: Float[Tensor, "A N H"], choices: Int[Tensor, "N H"]) -> Float[Tensor, "N H"]:
    """The values of the chosen actions."""
    return values.gather(0, choices[None])[0]


def _others(values: Tensor, crossed: bool) -> Float[Tensor, "A N H"]:
    """For each part the mean over the other parts; without `crossed`, over all."""
    total, parts = values.sum(dim=-1, keepdim=True), values.shape[-1]
    return (total - values) / (parts - 1) if crossed else (total / parts).expand_as(values)


class Stepped(NamedTuple):
    """The gain in expected reward of a step, from rollouts of the policy before it.

    Attributes:
        gain: by importance sampling.
        effective: (Σw)²/Σw² relative to the number of rollouts, between 0 and 1; small = the gain is unreliable.
    """

    gain: float
    effective: float


def stepped_gain(log_weights: Float[Tensor, "n"], rewards: Float[Tensor, "n"], prompts: Sequence[int]) -> Stepped:
    """The mean over prompts of E_{π′}[R] - E_π[R], from n rollouts of π, at least two per prompt:

        (1/m) Σ_i w_i·(R_i - mean of the prompt's other rewards),  w_i = π′(y_i)/π(y_i).

    It is unbiased, because the other rewards are independent of rollout i and E w = 1. To first order in the step it
    is the inner product of the step with the leave-one-out estimate of the gradient from the same rollouts.
    """
    number = torch.tensor(prompts, dtype=torch.long).unique(return_inverse=True)[1]
    count = torch.bincount(number).double()[number]
    sums = torch.zeros(int(number.max()) + 1, dtype=torch.float64).index_add(0, number, rewards.double())[number]
    advantages = rewards.double() - (sums - rewards.double()) / (count - 1)
    weights = log_weights.double().exp()
    gain = float((weights * advantages / count).sum() / (number.max() + 1))
    return Stepped(gain, float(weights.sum().square() / weights.square().sum() / len(weights)))
