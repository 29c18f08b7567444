"""Which plots a report has: the keys of metrics.jsonl that each one shows, its unit and what to look for in it.

To add a plot, add a `Plot` to `PLOTS`. Keys are shell patterns (`time/*`, or `*/tokens` for the figure of every term).
A plot without any key in the run's metrics is left out, and a key belongs to the first plot that names it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from experiments.table import measures, number


@dataclass(frozen=True)
class Plot:
    """One figure: `identifier` is its id on the page, `keys` patterns of metric keys, `caption` one sentence."""

    identifier: str
    title: str
    unit: str
    caption: str
    keys: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    kind: str = "line"  # or "stack" (areas), "band" or "evaluation" (few, marked points)
    limits: tuple[float | None, float | None] = (None, None)
    log_scale: bool = False
    section: str = "training"  # or "gradient": in which part of the page it is
    palette: tuple[str, ...] = ()  # colours of the style sheet, where the usual ones will not do


@dataclass(frozen=True)
class Series:
    """One line of a plot: `values[i]` at `steps[i]`, NaN where what was recorded is no finite number."""

    label: str
    steps: tuple[float, ...]
    values: tuple[float, ...]

    def finite(self) -> list[float]:
        """The values without the gaps."""
        return [value for value in self.values if not math.isnan(value)]


@dataclass(frozen=True)
class Band(Series):
    """A line with what lies around it: `ranges` are (lowest, highest) values at the same steps, the widest first."""

    ranges: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()


PLOTS = (
    Plot(
        "plot-reward",
        "Reward",
        "mean reward per rollout",
        "Should rise; a rise here without one in evaluation accuracy means the reward is being gamed.",
        ("reward/mean", "reward/*mean*"),
    ),
    Plot(
        "plot-pass-rate",
        "Pass rate",
        "share of rollouts that are correct",
        "Near 0 or near 1 most groups agree and a group-relative advantage has nothing to say.",
        ("pass_rate", "pass_rate/*"),
        limits=(0, None),
    ),
    Plot(
        "plot-demonstrations",
        "Share of demonstrations",
        "demonstrations among the trajectories that count",
        "How often the gate chose imitation; should fall as the policy learns to solve the prompts itself.",
        ("gate/demonstration_share", "gate/*share*"),
        limits=(0, None),
    ),
    Plot(
        "plot-entropy",
        "Entropy",
        "nats per token",
        "A quick fall towards 0 means that sampling no longer explores; a steady rise means the policy comes apart.",
        ("entropy", "entropy/*"),
        limits=(0, None),
    ),
    Plot(
        "plot-length",
        "Response length",
        "tokens per response",
        "A jump to the token limit, or a collapse, is usually seen here before the reward shows it.",
        ("response_length", "response_length/*"),
        limits=(0, None),
    ),
    Plot(
        "plot-gradient",
        "Gradient norm",
        "norm before clipping",
        "Spikes mark steps that clipping held back; a slow climb calls for a lower learning rate.",
        ("grad_norm", "grad_norm/*", "critic/grad_norm", "interleaved_update/grad_norm"),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-pulls",
        "Gradient norm of each term",
        "norm of its gradient alone",
        "Of terms with very different norms the update is the longest one's, and clipping shrinks the others with it.",
        ("*/grad_norm",),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-cosine",
        "Angle between terms",
        "cosine of their gradients",
        "Near 0 they work on different things; lasting values below 0 mean that one undoes what the other does.",
        ("cosine/*",),
        limits=(None, None),
        section="gradient",
    ),
    Plot(
        "plot-coefficient",
        "Coefficient of each term",
        "mean over the trajectories of its source",
        "What gates and schedules gave each term before the forward pass; a stateful gate shows its course here.",
        ("*/coefficient",),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-weights",
        "Weights of each term",
        "|weight| of a token; 1 = plain maximum likelihood",
        "A 99th percentile (p99) far above the mean says that a few tokens steer the update.",
        ("*/weight_abs_*",),
        without=("*/weight_abs_p50",),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-signed",
        "Signed weights of each term",
        "weight: median, percentiles 10 to 90 and 1 to 99",
        "Below 0 tokens are made less likely; a lower edge that sinks away from the upper one makes training brittle.",
        ("*/weight_p[0-9]*",),
        kind="band",
        section="gradient",
    ),
    Plot(
        "plot-advantage",
        "Advantage of each term",
        "mean Â per token",
        "Near 0 where groups are centred; a drift means long and short responses fare differently.",
        ("*/advantage_mean",),
        section="gradient",
    ),
    Plot(
        "plot-masked",
        "Masked share",
        "share of tokens with an advantage",
        "Tokens that the stabilization mask stopped; a growing share means the updates outrun the trust region.",
        ("*/masked_share",),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-sides",
        "Masked by side",
        "share of tokens with an advantage; above, below: ratio over, under 1",
        "Of a clip: above, pushes up that were stopped, below, pushes down; one side alone says which bound to move.",
        ("*/masked_above", "*/masked_below"),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-tokens",
        "Tokens behind the gradient",
        "tokens; effective = (Σ|w|)² / Σw²",
        "The further the effective count is below the tokens of a term, the fewer of them decide.",
        ("*/effective_tokens", "*/tokens"),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-trajectories",
        "Trajectories behind the gradient",
        "trajectories; effective = (Σ|w|)² / Σw²",
        "Few effective ones among many: the update follows single responses, and its noise grows.",
        ("*/effective_trajectories", "*/trajectories"),
        without=("trained/*",),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-effective",
        "Effective share of tokens",
        "effective tokens / tokens of the term",
        "1: all weigh the same; a fall says that the weights of a term become unequal.",
        ("*/effective_share",),
        limits=(0, 1.02),
        section="gradient",
    ),
    Plot(
        "plot-state",
        "Held-out slope",
        "utility per unit of a gate's variable",
        "Above 0 the held-out objective asks for more of the variable; noise around 0 means it has no opinion.",
        ("state/*_utility_slope",),
    ),
    Plot(
        "plot-critic",
        "Critic",
        "share of the returns' variance that its values explain",
        "Near 0 the values are no better than none; below 0 they do harm; it should rise before the policy moves far.",
        ("critic/explained_variance",),
        limits=(None, 1),
    ),
    Plot(
        "plot-values",
        "Values against returns",
        "mean over the rollouts' tokens",
        "The two should meet; a lasting distance is a bias in every advantage.",
        ("critic/value_mean", "critic/return_mean"),
    ),
    Plot(
        "plot-sampler",
        "Sampler against trainer",
        "|Δ log-prob| of a token, logarithmic",
        "Should stay flat at rounding level; growth means the sampler holds other weights than the trainer.",
        ("sampler/logprob_diff*",),
        log_scale=True,
    ),
    Plot(
        "plot-loss",
        "Surrogate loss",
        "no unit",
        "Only its gradient has a meaning: a flat or growing loss says nothing about progress.",
        ("loss", "loss/*", "*/loss"),
    ),
    Plot(
        "plot-learning-rate",
        "Learning rate",
        "as applied",
        "Should be the schedule that was meant, warm-up included.",
        ("learning_rate",),
        limits=(0, None),
    ),
    Plot(
        "plot-time",
        "Time per step",
        "seconds",
        "The thickest band is where a faster run is to be had.",
        ("time/*",),
        without=("time/total",),
        kind="stack",
        limits=(0, None),
    ),
)


def select(metrics: Sequence[dict]) -> tuple[list[tuple[Plot, list[Series]]], dict[str, Series]]:
    """The plots that lines of metrics.jsonl can fill, with their series, and the series that no plot shows."""
    remaining = _series_by_key(metrics)
    for key in ("step", "stage"):
        remaining.pop(key, None)
    chosen = []
    for plot in PLOTS:
        keys = [
            key
            for pattern in plot.keys
            for key in remaining
            if fnmatchcase(key, pattern) and not any(fnmatchcase(key, other) for other in plot.without)
        ]
        found = [remaining.pop(key) for key in dict.fromkeys(keys) if remaining[key].finite()]
        if plot.kind == "stack":
            found = _with_rest(found, remaining.pop("time/total", None))
        if plot.kind == "band":
            found = _bands(found)
        if found:
            chosen.append((plot, _shorten(found)))
    return chosen, remaining


def stages(metrics: Sequence[dict], names: Sequence[str] = ()) -> list[tuple[str, int, int]]:
    """(name, first step, last step) of each stage of a run, as the lines' `stage` says; empty without stages."""
    found: dict[int, list[int]] = {}
    for line in metrics:
        if "stage" in line:
            found.setdefault(int(line["stage"]), []).append(int(line["step"]))
    labels = {number: names[number - 1] if number <= len(names) else f"stage {number}" for number in found}
    return [(labels[number], min(steps), max(steps)) for number, steps in sorted(found.items())]


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
    title, caption = {
        "greedy": (
            "Evaluation, greedy",
            "The most likely answer to each problem: what training should raise at every level.",
        ),
        "mean": (
            f"Evaluation, sampled (mean@{samples})",
            "The average answer; it nears the greedy curve as the policy grows sure.",
        ),
        "pass": (
            f"Evaluation, pass@{samples}",
            f"One of {samples} samples correct; if it falls while greedy rises, training only sharpens.",
        ),
    }[kind]
    return Plot(f"plot-evaluation-{kind}", title, "% of problems correct", caption, kind="evaluation", limits=(-2, 102))


def _evaluation_series(evaluations: Sequence[dict], level: str, measure: str) -> Series:
    points = [
        (line["step"], (line.get("levels", {}) | {"all": line.get("all", {})}).get(level, {})) for line in evaluations
    ]
    points = [(step, scores[measure]) for step, scores in points if measure in scores]
    return Series(level, tuple(step for step, _ in points), tuple(100 * _gap(value) for _, value in points))


def _series_by_key(metrics: Sequence[dict]) -> dict[str, Series]:
    """Every key that is a number somewhere; a step whose line lacks the key is no gap, only a point fewer."""
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
    """The parts of the time, and what the total has beyond them, on the steps of the total."""
    if total is None:
        return parts
    if not parts:
        return [total]
    columns = [dict(zip(part.steps, part.values, strict=True)) for part in parts]
    rest = tuple(
        max(0.0, whole - sum(_zero_if_gap(column.get(step, 0.0)) for column in columns))
        for step, whole in zip(total.steps, total.values, strict=True)
    )
    known = sum(_zero_if_gap(value) for value in total.values)
    rest_share = sum(map(_zero_if_gap, rest)) / known if known else 0.0
    return parts + ([Series("time/other", total.steps, rest)] if rest_share > 0.01 else [])


def _bands(found: list[Series]) -> list[Series]:
    """One for each term, of its percentiles TERM/..._p1, p10, p50 and so on that have the steps of the median."""
    terms: dict[str, dict[int, Series]] = {}
    for one in found:
        name, _, percent = one.label.rpartition("_p")
        terms.setdefault(name, {})[int(percent)] = one
    bands = []
    for name, percents in terms.items():
        if 50 in percents:
            middle = percents[50]
            pairs = [
                (percents[low], percents[100 - low]) for low in sorted(percents) if low < 50 and 100 - low in percents
            ]
            ranges = tuple((low.values, high.values) for low, high in pairs if low.steps == high.steps == middle.steps)
            bands.append(Band(name, middle.steps, middle.values, ranges))
    return bands


def _zero_if_gap(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _shorten(found: list[Series]) -> list[Series]:
    """Labels without the words, divided by / or _, that all of them begin or end with."""
    if len(found) < 2:
        return found
    words = [re.split(r"([/_])", one.label) for one in found]
    start = len(os.path.commonprefix(words)) // 2 * 2
    end = len(os.path.commonprefix([label[start:][::-1] for label in words])) // 2 * 2
    labels = ["".join(label[start : len(label) - end]) for label in words]
    return [replace(one, label=label or one.label) for label, one in zip(labels, found, strict=True)]
