"""The plots of a report, and the lines that each one shows, made of the metrics of a run.

To add a plot, add a `Plot` to `PLOTS`. Keys are shell patterns (`time/*`, or `*/tokens` for the metric of every term).
A plot without any key in the metrics of the run is left out, and a key belongs to the first plot that names it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from experiments.grid import measures, number


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        identifier: its id on the page.
        unit: what the vertical axis shows.
        caption: how to read it, in a sentence or two.
        keys: patterns of metric keys.
        without: patterns of keys that it does not show.
        kind: "line", "stack" (areas), "band" or "evaluation" (few, marked points).
        limits: of the vertical axis.
        log_scale: whether the vertical axis is logarithmic.
        section: the part of the page, "training" or "gradient".
        palette: colours of the style sheet in place of the default ones.
    """

    identifier: str
    title: str
    unit: str
    caption: str
    keys: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    kind: str = "line"
    limits: tuple[float | None, float | None] = (None, None)
    log_scale: bool = False
    section: str = "training"
    palette: tuple[str, ...] = ()


# fmt: off
PLOTS = (
    Plot("plot-reward", "Reward", "mean reward per rollout",
         "Should rise. If it rises but the evaluation accuracy does not, the policy exploits the reward.",
         ("reward/mean", "reward/*")),
    Plot("plot-pass-rate", "Pass rate", "share of rollouts that are correct",
         "Near 0 or 1 most groups have equal rewards, and a group-relative advantage is 0 there.",
         ("pass_rate", "pass_rate/*"), limits=(0, None)),
    Plot("plot-demonstrations", "Share of demonstrations", "demonstrations among the active trajectories",
         "How often the gate chose imitation. Should fall as the policy learns to solve the prompts itself.",
         ("gate/demonstration_share", "gate/*share*"), limits=(0, None)),
    Plot("plot-entropy", "Entropy", "nats per token",
         "A quick fall towards 0 means that sampling no longer explores; a steady rise means that training diverges.",
         ("entropy", "entropy/*"), limits=(0, None)),
    Plot("plot-length", "Response length", "tokens per response",
         "A jump to the token limit, or a collapse, is usually seen here before the reward shows it.",
         ("response_length", "response_length/*"), limits=(0, None)),
    Plot("plot-gradient", "Gradient norm", "norm before clipping",
         "Spikes mark steps whose gradient was clipped; a slow rise suggests a lower learning rate.",
         ("grad_norm", "grad_norm/*", "critic/grad_norm", "interleaved_update/grad_norm"),
         limits=(0, None), section="gradient"),
    Plot("plot-term-gradients", "Gradient norm of each term", "norm of the term's gradient alone",
         "If the norms differ a lot, the largest term dominates the update, and clipping shrinks the others as well.",
         ("*/grad_norm",), limits=(0, None), section="gradient"),
    Plot("plot-cosine", "Angle between terms", "cosine of their gradients",
         "Near 0 the terms are independent; values that stay below 0 mean that they counteract each other.",
         ("cosine/*",), section="gradient"),
    Plot("plot-coefficient", "Coefficient of each term", "mean over the trajectories of its source",
         "The result of gates and schedules, including stateful gates, before the forward pass.",
         ("*/coefficient",), limits=(0, None), section="gradient"),
    Plot("plot-weights", "Weights of each term", "|weight| of a token; 1 = plain maximum likelihood",
         "If the 99th percentile (p99) is far above the mean, few tokens dominate the update.",
         ("*/weight_abs_*",), without=("*/weight_abs_p50",), limits=(0, None), section="gradient"),
    Plot("plot-signed", "Signed weights of each term", "weight: median, percentiles 10 to 90 and 1 to 99",
         "Weights below 0 make tokens less likely; a lower edge that keeps falling makes training unstable.",
         ("*/weight_p[0-9]*",), kind="band", section="gradient"),
    Plot("plot-advantage", "Advantage of each term", "mean Â per token",
         "Near 0 if groups are centred; a drift means that long and short responses get different advantages.",
         ("*/advantage_mean",), section="gradient"),
    Plot("plot-masked", "Masked share", "share of tokens with an advantage",
         "Tokens that the stabilization mask removes; a growing share means that updates leave the trust region.",
         ("*/masked_share",), limits=(0, None), section="gradient"),
    Plot("plot-sides", "Masked by side", "share of tokens with an advantage; above, below: ratio over, under 1",
         "For a clip: above, masked increases; below, masked decreases. The larger side shows which bound to change.",
         ("*/masked_above", "*/masked_below"), limits=(0, None), section="gradient"),
    Plot("plot-tokens", "Tokens behind the gradient", "tokens; effective = (Σ|w|)² / Σw²",
         "The further the effective count is below a term's tokens, the fewer tokens determine the update.",
         ("*/effective_tokens", "*/tokens"), limits=(0, None), section="gradient"),
    Plot("plot-trajectories", "Trajectories behind the gradient", "trajectories; effective = (Σ|w|)² / Σw²",
         "If few of many are effective, single responses dominate the update, and its noise grows.",
         ("*/effective_trajectories", "*/trajectories"), without=("trained/*",), limits=(0, None), section="gradient"),
    Plot("plot-effective", "Effective share of tokens", "effective tokens / tokens of the term",
         "1 means equal weights; a fall means that the weights of a term become unequal.",
         ("*/effective_share",), limits=(0, 1.02), section="gradient"),
    Plot("plot-memory", "Memory of prompts", "reward",
         "The value remembered of the step's prompts, and its distance to rewards: if it grows, memory lags behind.",
         ("memory/value_*",)),
    Plot("plot-curriculum", "Prompts of the curriculum", "prompts; effective = (Σw)² / Σw²",
         "If few are effective, the same prompts are drawn again and again.",
         ("sampling/effective_prompts", "memory/prompts"), limits=(0, None)),
    Plot("plot-drift", "Drift since the last visit", "|Δ log-prob| of a token",
         "How far the policy has moved on remembered responses; large values mean that old rewards say little.",
         ("memory/drift_mean",), limits=(0, None)),
    Plot("plot-state", "Held-out slope", "utility per unit of a gate's variable",
         "Above 0 the held-out objective improves with a larger variable; noise around 0 means no effect.",
         ("state/*_utility_slope",)),
    Plot("plot-noise", "Noise of the two gradients", "variance or mean square of coefficients",
         "What a share of demonstrations follows: it rises with the noise of rollouts, and falls with the other's.",
         ("state/*_noise", "state/*_disagreement")),
    Plot("plot-critic", "Critic", "share of the returns' variance that its values explain",
         "Near 0 the values do not help, and below 0 they harm; should rise before the policy has changed much.",
         ("critic/explained_variance",), limits=(None, 1)),
    Plot("plot-values", "Values against returns", "mean over the rollouts' tokens",
         "The two should converge; a lasting difference is a bias in every advantage.",
         ("critic/value_mean", "critic/return_mean")),
    Plot("plot-sampler", "Sampler against trainer", "|Δ log-prob| of a token, logarithmic",
         "Should stay at rounding level; growth means that the sampler's weights differ from the trainer's.",
         ("sampler/logprob_diff*",), log_scale=True),
    Plot("plot-samples", "Effective share of the rollouts", "(Σr)² / NΣr² of tokens and of whole responses",
         "1 means on-policy. Below 1/2 for responses (χ² above 1) a correction is due: see docs/metrics.md.",
         ("sampler/ess_*", "behavior/ess_*"), limits=(0, 1.02)),
    Plot("plot-divergence", "Divergence by quarter of the response", "KL per token (k3), logarithmic",
         "A rise from the first quarter (q1) to the last means that differences grow along the response.",
         ("sampler/kl_k3_q*", "behavior/kl_k3_q*"), log_scale=True),
    Plot("plot-masked-mass", "Mass that masks remove", "share of Σ|w| without the mask",
         "Above the masked share, the mask removes tokens with large weights; q1 to q4: quarters of the response.",
         ("*/masked_mass", "*/masked_mass_q*"), limits=(0, None), section="gradient"),
    Plot("plot-loss", "Surrogate loss", "no unit",
         "Only its gradient is meaningful: a flat or growing loss says nothing about progress.",
         ("loss", "loss/*", "*/loss")),
    Plot("plot-learning-rate", "Learning rate", "as applied",
         "Should follow the intended schedule, including warm-up.",
         ("learning_rate",), limits=(0, None)),
    Plot("plot-time", "Time per step", "seconds",
         "The thickest band shows where most time can be saved.",
         ("time/*",), without=("time/total",), kind="stack", limits=(0, None)),
)
# fmt: on


@dataclass(frozen=True)
class Series:
    """One line of a plot: `values[i]` at `steps[i]`, NaN where the recorded value is not a finite number."""

    label: str
    steps: tuple[float, ...]
    values: tuple[float, ...]

    def finite(self) -> list[float]:
        """The values without the gaps."""
        return [value for value in self.values if not math.isnan(value)]


@dataclass(frozen=True)
class Band(Series):
    """A line with bands around it: `ranges` are (lowest, highest) values at the same steps, the widest first."""

    ranges: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()


def select(metrics: Sequence[dict]) -> tuple[list[tuple[Plot, list[Series]]], dict[str, Series]]:
    """The plots with data in lines of metrics.jsonl, with their series, and the series that no plot shows."""
    remaining = _series_by_key(metrics)
    for key in ("step", "stage"):
        remaining.pop(key, None)
    chosen = []
    for plot in PLOTS:
        allowed = [key for key in remaining if not any(fnmatchcase(key, pattern) for pattern in plot.without)]
        keys = [key for pattern in plot.keys for key in allowed if fnmatchcase(key, pattern)]
        series = [remaining.pop(key) for key in dict.fromkeys(keys) if remaining[key].finite()]
        if plot.kind == "stack":
            series = _with_rest(series, remaining.pop("time/total", None))
        if plot.kind == "band":
            series = _bands(series)
        if series:
            chosen.append((plot, _shorten(series)))
    return chosen, remaining


def stages(metrics: Sequence[dict], names: Sequence[str] = ()) -> list[tuple[str, int, int]]:
    """(name, first step, last step) of each stage of a run, by the lines' key `stage`; empty without stages."""
    steps_of: dict[int, list[int]] = {}
    for line in metrics:
        if type(line.get("stage")) is int and line["stage"] > 0:
            steps_of.setdefault(int(line["stage"]), []).append(int(line["step"]))
    labels = {number: names[number - 1] if number <= len(names) else f"stage {number}" for number in steps_of}
    return [(labels[number], min(steps), max(steps)) for number, steps in sorted(steps_of.items())]


def evaluation_plots(evaluations: Sequence[dict]) -> list[tuple[Plot, list[Series]]]:
    """A plot for each accuracy of evaluations.jsonl, with a series for each difficulty level."""
    levels = list(dict.fromkeys(name for line in evaluations for name in line.get("levels", {})))
    levels += ["all"] if any("all" in line for line in evaluations) else []
    plots = []
    for measure in measures(*evaluations):
        series = [series for level in levels if (series := _evaluation_series(evaluations, level, measure)).finite()]
        if series:
            plots.append((_evaluation_plot(measure), series))
    return plots


def _evaluation_plot(measure: str) -> Plot:
    kind, _, samples = measure.partition("@")
    title = {"greedy": "greedy", "mean": f"sampled (mean@{samples})", "pass": f"pass@{samples}"}[kind]
    caption = {
        "greedy": "The accuracy of the most likely answers; training should raise it at every level.",
        "mean": "The accuracy of an average sample; it approaches the greedy curve as the policy becomes more certain.",
        "pass": f"At least one of {samples} samples correct. If it falls while greedy rises, training only sharpens.",
    }[kind]
    about = (f"plot-evaluation-{kind}", f"Evaluation, {title}", "% of problems correct", caption)
    return Plot(*about, kind="evaluation", limits=(-2, 102))


def _evaluation_series(evaluations: Sequence[dict], level: str, measure: str) -> Series:
    each = {line["step"]: {**line.get("levels", {}), "all": line.get("all", {})} for line in evaluations}
    points = [(step, of[level][measure]) for step, of in each.items() if measure in of.get(level, {})]
    return Series(level, tuple(step for step, _ in points), tuple(100 * _gap(value) for _, value in points))


def _series_by_key(metrics: Sequence[dict]) -> dict[str, Series]:
    """A series for every key with a finite number; a step whose line lacks the key is left out, not a gap."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for key, value in line.items():
            points.setdefault(key, []).append((line["step"], _gap(value)))
    series = {key: Series(key, *zip(*pairs, strict=True)) for key, pairs in points.items()}
    return {key: one for key, one in series.items() if one.finite()}


def _gap(value: object) -> float:
    finite = number(value)
    return math.nan if finite is None else finite


def _with_rest(parts: list[Series], total: Series | None) -> list[Series]:
    """The parts of the time, and the rest of the total, on the steps of the total."""
    if total is None:
        return parts
    if not parts:
        return [total]
    columns = [dict(zip(part.steps, part.values, strict=True)) for part in parts]
    rest = tuple(
        max(whole - sum(_zero_if_gap(column.get(step, 0.0)) for column in columns), 0.0)  # a gap stays a gap
        for step, whole in zip(total.steps, total.values, strict=True)
    )
    known = sum(_zero_if_gap(value) for value in total.values)
    rest_share = sum(map(_zero_if_gap, rest)) / known if known else 0.0
    return parts + ([Series("time/other", total.steps, rest)] if rest_share > 0.01 else [])


def _bands(percentiles: list[Series]) -> list[Series]:
    """A band for each term, from its percentiles TERM/..._p1, p10, p50 and so on that have the median's steps."""
    terms: dict[str, dict[int, Series]] = {}
    for one in percentiles:
        name, _, percent = one.label.rpartition("_p")
        if percent.isdecimal() and len(percent) < 3:
            terms.setdefault(name, {})[int(percent)] = one
    bands = []
    for name, percents in terms.items():
        if 50 in percents:
            middle = percents[50]
            lows = [low for low in sorted(percents) if low < 50 and 100 - low in percents]
            pairs = [(percents[low], percents[100 - low]) for low in lows]
            ranges = tuple((low.values, high.values) for low, high in pairs if low.steps == high.steps == middle.steps)
            bands.append(Band(name, middle.steps, middle.values, ranges))
    return bands


def _zero_if_gap(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _shorten(series: list[Series]) -> list[Series]:
    """Removes from the labels the words, divided by / or _, with which all of them begin or end."""
    if len(series) < 2:
        return series
    words = [re.split(r"([/_])", one.label) for one in series]
    start = len(os.path.commonprefix(words)) // 2 * 2
    end = len(os.path.commonprefix([label[start:][::-1] for label in words])) // 2 * 2
    labels = ["".join(label[start : len(label) - end]) for label in words]
    return [replace(one, label=label or one.label) for label, one in zip(labels, series, strict=True)]
