"""The plots of a report: the keys of metrics.jsonl that each one shows, its unit and how to read it.

To add a plot, add a `Plot` to `PLOTS`. Keys are shell patterns (`time/*`, or `*/tokens` for the metric of every term).
A plot without any key in the run's metrics is left out, and a key belongs to the first plot that names it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        identifier: its id on the page.
        title: its title.
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


PLOTS = (
    Plot(
        "plot-reward",
        "Reward",
        "mean reward per rollout",
        "Should rise. If it rises but the evaluation accuracy does not, the policy exploits the reward.",
        ("reward/mean", "reward/*mean*"),
    ),
    Plot(
        "plot-pass-rate",
        "Pass rate",
        "share of rollouts that are correct",
        "Near 0 or 1 most groups have equal rewards, and a group-relative advantage is 0 there.",
        ("pass_rate", "pass_rate/*"),
        limits=(0, None),
    ),
    Plot(
        "plot-demonstrations",
        "Share of demonstrations",
        "demonstrations among the active trajectories",
        "How often the gate chose imitation. Should fall as the policy learns to solve the prompts itself.",
        ("gate/demonstration_share", "gate/*share*"),
        limits=(0, None),
    ),
    Plot(
        "plot-entropy",
        "Entropy",
        "nats per token",
        "A quick fall towards 0 means that sampling no longer explores; a steady rise means that training diverges.",
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
        "Spikes mark steps whose gradient was clipped; a slow rise suggests a lower learning rate.",
        ("grad_norm", "grad_norm/*", "critic/grad_norm", "interleaved_update/grad_norm"),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-term-gradients",
        "Gradient norm of each term",
        "norm of the term's gradient alone",
        "If the norms differ a lot, the largest term dominates the update, and clipping shrinks the others as well.",
        ("*/grad_norm",),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-cosine",
        "Angle between terms",
        "cosine of their gradients",
        "Near 0 the terms are independent; values that stay below 0 mean that they counteract each other.",
        ("cosine/*",),
        limits=(None, None),
        section="gradient",
    ),
    Plot(
        "plot-coefficient",
        "Coefficient of each term",
        "mean over the trajectories of its source",
        "The result of gates and schedules, including stateful gates, before the forward pass.",
        ("*/coefficient",),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-weights",
        "Weights of each term",
        "|weight| of a token; 1 = plain maximum likelihood",
        "If the 99th percentile (p99) is far above the mean, few tokens dominate the update.",
        ("*/weight_abs_*",),
        without=("*/weight_abs_p50",),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-signed",
        "Signed weights of each term",
        "weight: median, percentiles 10 to 90 and 1 to 99",
        "Weights below 0 make tokens less likely; a lower edge that keeps falling makes training unstable.",
        ("*/weight_p[0-9]*",),
        kind="band",
        section="gradient",
    ),
    Plot(
        "plot-advantage",
        "Advantage of each term",
        "mean Â per token",
        "Near 0 if groups are centred; a drift means that long and short responses get different advantages.",
        ("*/advantage_mean",),
        section="gradient",
    ),
    Plot(
        "plot-masked",
        "Masked share",
        "share of tokens with an advantage",
        "Tokens that the stabilization mask removes; a growing share means that updates leave the trust region.",
        ("*/masked_share",),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-sides",
        "Masked by side",
        "share of tokens with an advantage; above, below: ratio over, under 1",
        "For a clip: above, masked increases; below, masked decreases. The larger side shows which bound to change.",
        ("*/masked_above", "*/masked_below"),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-tokens",
        "Tokens behind the gradient",
        "tokens; effective = (Σ|w|)² / Σw²",
        "The further the effective count is below a term's tokens, the fewer tokens determine the update.",
        ("*/effective_tokens", "*/tokens"),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-trajectories",
        "Trajectories behind the gradient",
        "trajectories; effective = (Σ|w|)² / Σw²",
        "If few of many are effective, single responses dominate the update, and its noise grows.",
        ("*/effective_trajectories", "*/trajectories"),
        without=("trained/*",),
        limits=(0, None),
        section="gradient",
    ),
    Plot(
        "plot-effective",
        "Effective share of tokens",
        "effective tokens / tokens of the term",
        "1 means equal weights; a fall means that the weights of a term become unequal.",
        ("*/effective_share",),
        limits=(0, 1.02),
        section="gradient",
    ),
    Plot(
        "plot-state",
        "Held-out slope",
        "utility per unit of a gate's variable",
        "Above 0 the held-out objective improves with a larger variable; noise around 0 means no effect.",
        ("state/*_utility_slope",),
    ),
    Plot(
        "plot-critic",
        "Critic",
        "share of the returns' variance that its values explain",
        "Near 0 the values do not help, and below 0 they harm; should rise before the policy has changed much.",
        ("critic/explained_variance",),
        limits=(None, 1),
    ),
    Plot(
        "plot-values",
        "Values against returns",
        "mean over the rollouts' tokens",
        "The two should converge; a lasting difference is a bias in every advantage.",
        ("critic/value_mean", "critic/return_mean"),
    ),
    Plot(
        "plot-sampler",
        "Sampler against trainer",
        "|Δ log-prob| of a token, logarithmic",
        "Should stay at rounding level; growth means that the sampler's weights differ from the trainer's.",
        ("sampler/logprob_diff*",),
        log_scale=True,
    ),
    Plot(
        "plot-loss",
        "Surrogate loss",
        "no unit",
        "Only its gradient is meaningful: a flat or growing loss says nothing about progress.",
        ("loss", "loss/*", "*/loss"),
    ),
    Plot(
        "plot-learning-rate",
        "Learning rate",
        "as applied",
        "Should follow the intended schedule, including warm-up.",
        ("learning_rate",),
        limits=(0, None),
    ),
    Plot(
        "plot-time",
        "Time per step",
        "seconds",
        "The thickest band shows where most time can be saved.",
        ("time/*",),
        without=("time/total",),
        kind="stack",
        limits=(0, None),
    ),
)
