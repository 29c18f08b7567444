"""The plots of a report: the metrics that each one shows, and how to read it.

To add a plot, add a `Plot` to `PLOTS`. Keys are shell patterns (`time/*`, or `*/tokens` for the metric of every term).
A key belongs to the first plot that names it and fits the algorithm of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_GROUP_ADVANTAGES = {"GroupRelative", "LeaveOneOut", "GuidedRelative", "MeanNormalized", "RewardDecoupled"}
_CLIPS = {"PPOClip", "SequenceClip", "DivergenceClip", "LogRatioClip", "ImportanceBand", "AllOf"}
_NEGATIVE_LOG_LIKELIHOOD = {"NoMask", "CurrentPolicy", "ConstantAdvantage", "PolicyLikelihood"}


@dataclass(frozen=True)
class Parts:
    """What the captions depend on: an algorithm's sources and the names of its classes; both empty if unknown."""

    sources: frozenset[str] = frozenset()
    gates: frozenset[str] = frozenset()
    estimator: frozenset[str] = frozenset()
    terms: int = 0

    @property
    def compares_groups(self) -> bool:
        """Whether an advantage compares the rollouts to one prompt."""
        return bool(self.estimator & _GROUP_ADVANTAGES)

    @property
    def clips(self) -> bool:
        """Whether a mask stops updates that would leave a trust region."""
        return bool(self.estimator & _CLIPS)

    @property
    def is_gated(self) -> bool:
        """Whether a gate decides between the sources, or nothing is known of the algorithm."""
        return not self.terms or (len(self.sources) > 1 and bool(self.gates - {"ConstantGate"}))

    @property
    def is_imitation(self) -> bool:
        """Whether the loss is the negative log-likelihood of the demonstrations."""
        return self.sources == {"demonstrations"} and self.terms == 1 and self.estimator == _NEGATIVE_LOG_LIKELIHOOD


def parts_of(algorithm: Any) -> Parts:
    """The parts of an algorithm, or of all its stages, as config.yaml holds it; empty for any other form."""
    stages = [one.get("algorithm") for one in _mappings(algorithm, "stages")]
    whole = [term for one in (algorithm, *stages) for term in _mappings(one, "terms")]
    sources = frozenset(str(one.get("source")) for one in whole)
    gates = frozenset(name for one in whole for name in _classes(one.get("gate")))
    estimator = frozenset(name for one in whole for name in _classes(one.get("estimator")))
    return Parts(sources, gates, estimator, len(whole))


def _mappings(tree: Any, key: str) -> list[Mapping]:
    """The mappings among the values of a mapping under `key`; none if it is not there."""
    inner = tree.get(key) if isinstance(tree, Mapping) else None
    return [one for one in inner.values() if isinstance(one, Mapping)] if isinstance(inner, Mapping) else []


def _classes(tree: Any) -> list[str]:
    """The names of all classes in a part of a configuration, without their modules."""
    if isinstance(tree, list):
        return [name for one in tree for name in _classes(one)]
    if not isinstance(tree, Mapping):
        return []
    own = [str(tree["_target_"]).rpartition(".")[2]] if "_target_" in tree else []
    return own + [name for one in tree.values() for name in _classes(one)]


def _always(parts: Parts) -> bool:
    return True


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
        palette: colors of the style sheet in place of the default ones, one for each line.
        when: whether the plot and its caption fit an algorithm.
        fewest: the fewest lines with which it says something.
        floor: values up to it are rounding errors.
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
    when: Callable[[Parts], bool] = _always
    fewest: int = 1
    floor: float = 0.0


# fmt: off
PLOTS = (
    Plot("plot-reward", "Reward", "mean reward per rollout",
         "Should rise. If it rises but the evaluation accuracy does not, the policy exploits the reward.",
         ("reward/mean", "reward/*")),
    Plot("plot-pass-rate", "Pass rate", "share of rollouts that are correct",
         "Near 0 or 1 most groups have equal rewards, and a group-relative advantage is 0 there.",
         ("pass_rate", "pass_rate/*"), limits=(0, None), when=lambda parts: parts.compares_groups),
    Plot("plot-pass-rate", "Pass rate", "share of rollouts that are correct",
         "Should rise with the reward, but counts success alone.",
         ("pass_rate", "pass_rate/*"), limits=(0, None)),
    Plot("plot-demonstrations", "Share of demonstrations", "demonstrations among the active trajectories",
         "How often the gate chose imitation. Should fall as the policy learns to solve the prompts itself.",
         ("gate/demonstration_share", "gate/*share*"), limits=(0, None), when=lambda parts: parts.is_gated),
    Plot("plot-demonstrations", "Share of demonstrations", "demonstrations among the active trajectories",
         "No gate chooses between the sources; the share changes with stages and the number of active rollouts.",
         ("gate/demonstration_share", "gate/*share*"), limits=(0, None), when=lambda parts: len(parts.sources) > 1),
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
         ("*/grad_norm",), limits=(0, None), section="gradient", fewest=2),
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
         "Near 0 if groups are centered; a drift means that long and short responses get different advantages.",
         ("*/advantage_mean",), section="gradient", when=lambda parts: parts.compares_groups),
    Plot("plot-advantage", "Advantage of each term", "mean Â per token",
         "Above 0, more tokens are made likelier than less likely; a drift moves this balance.",
         ("*/advantage_mean",), section="gradient"),
    Plot("plot-masked", "Masked share", "share of tokens with an advantage",
         "Tokens that the stabilization mask removes; a growing share means that updates leave the trust region.",
         ("*/masked_share",), limits=(0, None), section="gradient", when=lambda parts: parts.clips),
    Plot("plot-masked", "Masked share", "share of tokens with an advantage",
         "Tokens that the stabilization mask removes.",
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
         "The remembered value of the step's prompts, and its distance to rewards; if that grows, memory lags.",
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
         "The share of demonstrations rises with the noise of rollouts and falls with that of demonstrations.",
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
         ("sampler/kl_k3_q*", "behavior/kl_k3_q*"), log_scale=True, floor=1e-9),
    Plot("plot-masked-mass", "Mass that masks remove", "share of Σ|w| without the mask",
         "If it exceeds the masked share, the mask removes large weights; q1 to q4: quarters of the response.",
         ("*/masked_mass", "*/masked_mass_q*"), limits=(0, None), section="gradient"),
    Plot("plot-loss", "Loss", "negative log-likelihood of the demonstrations, weighted as in the gradient",
         "Should fall. If it keeps falling while the evaluation does not improve, the demonstrations are memorized.",
         ("loss", "loss/*", "*/loss"), when=lambda parts: parts.is_imitation),
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
