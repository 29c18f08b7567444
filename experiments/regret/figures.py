"""The figure of one policy: gains by pass rate, the oracle's choices, and the regret of every gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.diagnose.figures import draw_line
from experiments.drawing import INK, SOFT, dress, in_figure, save
from experiments.regret.analysis import ACTIONS, UNITS, Analysis
from experiments.regret.measuring import Result
from upge.measure import Estimated

CAPTION = (
    "Top: the first-order gain of one prompt's step by the successes in its group. Bottom left: how often each action "
    "gains the most in accuracy. Bottom right: the oracle's gain in accuracy minus the gate's. Intervals are 95 %."
)
COLORS = {"nothing": "#c6c9c4", "rollouts": "#0072b2", "demonstration": "#c95000", "both": "#00805a"}
_MARKERS = {"rollouts": "o", "demonstration": "s", "both": "D"}


def draw(result: Result, analyses: Sequence[Analysis], name: str, folder: Path) -> list[Path]:
    """Draw NAME: `analyses` are those of one rule, the accuracy first."""

    def drawing(figure: Figure) -> None:
        (first, second), (third, fourth) = figure.subplots(2, 2, height_ratios=(1, 1.35))
        for axes, one in zip((first, second), analyses, strict=True):
            _gains(axes, result, one)
        _choices(third, result, analyses[0])
        _regrets(fourth, analyses[0])
        handles, labels = third.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False)

    return save(folder, name, (9.4, 7.6), drawing)


def _gains(axes, result: Result, analysis: Analysis) -> None:
    for place, (name, marker) in enumerate(_MARKERS.items()):
        points = [
            (at.successes + 0.08 * (place - 1), Estimated(*at.gains[name][:3])) for at in analysis.by_count if at.gains
        ]
        draw_line(axes, points, color=COLORS[name], marker=marker)
    axes.axhline(0, color=SOFT, linewidth=0.9)
    axes.set_title(f"Gain in {analysis.objective} ({UNITS[analysis.objective][0]})")
    _counts(axes, result)


def _choices(axes, result: Result, analysis: Analysis) -> None:
    at = [one.successes for one in analysis.by_count]
    bottom = [0.0] * len(at)
    for name in ACTIONS:
        shares = [100 * one.choices[name].value for one in analysis.by_count]
        axes.bar(at, shares, bottom=bottom, color=COLORS[name], width=0.8, label=name)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set_title("Best action for the accuracy (% of groups)")
    _counts(axes, result)


def _counts(axes, result: Result) -> None:
    axes.set_xticks(range(result.group_size + 1))
    axes.set_xlim(-0.6, result.group_size + 0.6)
    axes.set_xlabel(f"successes among the {result.group_size} rollouts")
    dress(axes)


def _regrets(axes, analysis: Analysis) -> None:
    shown = [one for one in analysis.scores if one.name != "oracle"]
    for place, one in enumerate(reversed(shown)):
        constant = one.p_holm != one.p_holm
        color = SOFT if constant else INK
        axes.plot([one.regret.low, one.regret.high], [place, place], color=color, alpha=0.45, linewidth=1.6)
        axes.plot(one.regret.value, place, marker="o", color=color, markersize=4.5)
    names = [in_figure(one.name) for one in reversed(shown)]
    axes.set_yticks(range(len(shown)), names, fontsize=7.5)
    axes.locator_params(axis="x", nbins=5)
    axes.axvline(0, color=SOFT, linewidth=0.9)
    axes.set_title(f"Regret in accuracy ({UNITS['accuracy'][0]})")
    dress(axes, grid="x")
