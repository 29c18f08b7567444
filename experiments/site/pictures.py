"""The pictures of docs/concepts/, drawn from the parts themselves: `python -m experiments.site --docs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import Tensor

import algorithms
import upge
from experiments import drawing
from experiments.files import DOCS

FOLDER = DOCS / "concepts"
#: Lengths of the responses in the pictures of reductions and sources, and the prompts that they answer.
_LENGTHS, _GROUP = (2, 6, 4, 9), (0, 0, 1, 1)


def draw_all(folder: Path) -> list[Path]:
    """Write every picture into a folder; return the files."""
    sizes = {"slots": (7.6, 5.6), "gates": (7.6, 2.9), "reductions": (7.6, 4.0), "sources": (7.6, 4.3)}
    files = []
    for name, size in sizes.items():
        bitmap, vector = drawing.save(folder, name, size, PICTURES[name])
        bitmap.unlink()
        files.append(vector)
    return files


def tokens(probability: Tensor, old: Tensor | float, reward: float = 1.0) -> upge.Trajectories:
    """One token per row, with these probabilities under the current and the behavior policy."""
    logprobs = probability.double().log()[:, None]
    behavior = torch.as_tensor(old, dtype=torch.float64).expand(len(probability)).log()[:, None]
    size = len(probability)
    return upge.Trajectories(
        logprobs=logprobs,
        response_mask=torch.ones(size, 1, dtype=torch.bool),
        rewards=torch.full((size,), reward, dtype=torch.float64),
        group=torch.arange(size),
        behavior_logprobs=behavior,
    )


# The four slots.


def _slots(figure: Figure) -> None:
    mask, denominator, advantage, likelihood = figure.subplots(2, 2).flat
    ratio = torch.linspace(0.4, 1.8, 281, dtype=torch.float64)
    batch, ones = tokens(0.4 * ratio, 0.4), torch.ones(len(ratio), 1, dtype=torch.float64)
    masks = {
        "PPOClip, Â > 0": (upge.PPOClip(), 1),
        "PPOClip, Â < 0": (upge.PPOClip(), -1),
        "SigmoidGate": (upge.SigmoidGate(), 1),
    }
    _lines(mask, ratio, {name: part(batch, sign * ones)[:, 0] for name, (part, sign) in masks.items()})
    _name(mask, "mask: which tokens may move", "ratio r = π_θ/π_old", "1_stable")
    probability = torch.linspace(0.02, 0.98, 193, dtype=torch.float64)
    batch = tokens(probability, 0.4)
    parts = {"CurrentPolicy: 1": upge.CurrentPolicy(), "BehaviorPolicy: r": upge.BehaviorPolicy(),
             "UnitDenominator: π_θ": upge.UnitDenominator()}  # fmt: skip
    values = {name: (batch.logprobs - part(batch)).exp()[:, 0] for name, part in parts.items()}
    _lines(denominator, probability, values)
    _name(denominator, "denominator: the weight of ∇log π_θ", "π_θ of the token, π_old = 0.4", "π_θ/π_ref")
    _advantages(advantage)
    shapes = {"PolicyLikelihood": upge.PolicyLikelihood(), "ShapedLikelihood": upge.ShapedLikelihood(),
              "PowerLikelihood(1, 0)": upge.PowerLikelihood(likely=1.0, unlikely=0.0)}  # fmt: skip
    _lines(
        likelihood,
        probability,
        {name: part(batch).exp()[:, 0] * torch.ones(len(probability)) for name, part in shapes.items()},
    )
    _name(likelihood, "likelihood: the shape of the gradient", "π_θ of the token", "f′(π_θ)")


def _advantages(axes: Axes) -> None:
    """Â of a right rollout by the number of right ones among 8."""
    counts = range(1, 8)
    parts = {"GroupRelative": upge.GroupRelative(), "without std": upge.GroupRelative(normalize_std=False),
             "SignedReward": upge.SignedReward()}  # fmt: skip
    values: dict[str, list[float]] = {name: [] for name in parts}
    for right in counts:
        rewards = torch.tensor([1.0] * right + [0.0] * (8 - right), dtype=torch.float64)
        mask = torch.ones(8, 1, dtype=torch.bool)
        batch = upge.Trajectories(
            logprobs=None, response_mask=mask, rewards=rewards, group=torch.zeros(8, dtype=torch.long)
        )
        for name, part in parts.items():
            values[name].append(float(part(batch)[0, 0]))
    _lines(
        axes,
        torch.tensor(list(counts)) / 8,
        {name: torch.tensor(v) for name, v in values.items()},
        marker="o",
        markersize=3,
    )
    _name(axes, "advantage: how much, up or down", "pass rate of the prompt", "Â of a right rollout")


# Gates.


def _gates(figure: Figure) -> None:
    by_rate, by_step = figure.subplots(1, 2)
    rates = torch.linspace(0, 1, 9)
    gates = {"PassRateAbove(0): rollouts": upge.PassRateAbove(),
             "PassRateAtMost(0): demonstration": upge.PassRateAtMost(),
             "PassRateTable, 0 → 1, 0.5 → 0": upge.PassRateTable((0.0, 0.5), (1.0, 0.0))}  # fmt: skip
    values = {name: torch.tensor([gate.at_pass_rate(float(rate)) for rate in rates]) for name, gate in gates.items()}
    _lines(by_rate, rates, values, marker="o", markersize=3.5)
    by_rate.set_ylim(-0.06, 1.5)  # room for the legend
    by_rate.legend(frameon=False, fontsize=8, loc="upper right")
    _name(by_rate, "by pass rate", "pass rate P of 8 rollouts", "coefficient")
    steps = torch.arange(0, 131)
    schedule = upge.Schedule(start=0.0, peak=0.9, end=0.05, warmup=20, decay=80)
    shown = {"Schedule": [schedule.coefficient_at(int(s)) for s in steps], "ConstantGate(0.5)": [0.5] * len(steps)}
    _lines(by_step, steps, {name: torch.tensor(v) for name, v in shown.items()})
    _name(by_step, "by step", "training step", "coefficient")


# Reductions.


def _reductions(figure: Figure) -> None:
    mask = _mask(_LENGTHS)
    batch = upge.Trajectories(logprobs=None, response_mask=mask, rewards=torch.zeros(4), group=torch.tensor(_GROUP))
    active = torch.tensor([True, True, True, True])
    parts = {"TokenMean": upge.TokenMean(), "SequenceMean": upge.SequenceMean(),
             "FixedLength(length=9)": upge.FixedLength(9),
             "QuestionMean, 3 of 4 active": upge.QuestionMean()}  # fmt: skip
    for axes, (name, part) in zip(figure.subplots(2, 2).flat, parts.items(), strict=True):
        chosen = torch.tensor([True, True, False, True]) if "3 of 4" in name else active
        weights = part(batch, chosen)
        _tokens(axes, weights, mask, 0.25)
        for row, total in enumerate(weights.sum(1).tolist()):
            axes.text(mask.shape[1] - 0.2, row, f"{total:.2f}", va="center", fontsize=8.5, color=drawing.INK)
        axes.set_title(name, fontsize=9.5)


# Sources.


def _sources(figure: Figure) -> None:
    """What four algorithms do with the same two prompts, one of them solved by one of two rollouts."""
    lengths = (5, 7, 6, 6, 8, 9)
    mask = _mask(lengths)
    demonstration = torch.tensor([False, False, True, False, False, True])
    logprobs = torch.full(mask.shape, -0.7, dtype=torch.float64) * mask
    batch = upge.Trajectories(
        logprobs=logprobs.requires_grad_(),
        response_mask=mask,
        rewards=torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64),
        group=torch.tensor([0, 0, 0, 1, 1, 1]),
        is_demonstration=demonstration,
    )
    rows = ["A, right", "A, wrong", "A, demonstration", "B, wrong", "B, wrong", "B, demonstration"]
    for axes, name in zip(figure.subplots(2, 2).flat, ("sft", "grpo", "hpt", "luffy"), strict=True):
        tree = OmegaConf.create({"algo": algorithms.read(name), "rollout": {"max_response_tokens": 9}})
        algorithm = algorithms.compose(tree.algo, name)
        weights = algorithm.estimate(batch).weights.detach()
        _tokens(axes, weights, mask, float(weights.abs().max()), rows)
        axes.set_title(name, fontsize=10)


def _mask(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def _tokens(axes: Axes, weights: Tensor, mask: Tensor, most: float, rows: list[str] | None = None) -> None:
    """A square for each token: blue is raised, orange is lowered, white has no weight."""
    for row in range(mask.shape[0]):
        for column in range(int(mask[row].sum())):
            value = float(weights[row, column])
            color = drawing.COLORS[0] if value > 0 else drawing.COLORS[1]
            strength = 0.0 if value == 0 else 0.2 + 0.75 * min(1.0, abs(value) / most)
            axes.fill(*_square(row, column), facecolor=(color, strength), edgecolor=drawing.RULE, linewidth=0.8)
    axes.set_xlim(-0.6, mask.shape[1] + 0.6)
    axes.set_ylim(mask.shape[0] - 0.4, -0.6)
    axes.set_xticks([])
    axes.set_yticks(range(mask.shape[0]), rows or [f"prompt {'AB'[g]}" for g in _GROUP], fontsize=8.5)
    axes.spines[:].set_visible(False)


def _square(row: int, column: int) -> tuple[list[float], list[float]]:
    left, right, top, bottom = column - 0.45, column + 0.45, row - 0.42, row + 0.42
    return [left, right, right, left], [top, top, bottom, bottom]


def _lines(axes: Axes, x: Tensor, values: Mapping[str, Tensor], **style: Any) -> None:
    for index, (name, y) in enumerate(values.items()):
        dash = ("-", "--", "-.", ":")[index]
        axes.plot(x.tolist(), y.tolist(), dash, color=drawing.COLORS[index], label=name, **style)
    axes.legend(frameon=False, fontsize=8, loc="best")
    drawing.dress(axes)


def _name(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


PICTURES: dict[str, Callable[[Figure], None]] = {
    "slots": _slots,
    "gates": _gates,
    "reductions": _reductions,
    "sources": _sources,
}
