"""Alarms: problems that a run detects in its metrics. Each alarm is reported once per run, in one line.

An alarm is a function from a step's metrics to a problem, or None. It is raised when it finds a problem in
`alarms.steps` steps in a row (no_signal: in `alarms.no_signal`; gradient_split: in one). The main rank prints it and
writes it to alarms.jsonl; `stop.alarms` names those that also stop the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from upge.config import Settings, key

#: The metrics of a step, as in metrics.jsonl.
Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class AlarmConfig(Settings):
    """The limits of the alarms. docs/running.md says what each means; `stop.alarms` turns them into stops."""

    steps: int = key(3, "raise an alarm when its problem occurs in N steps in a row", minimum=1, limit=10**6)
    truncated: float = key(
        0.5, "raise above this share of rollouts cut at rollout.max_response_tokens", minimum=0, maximum=1
    )
    no_signal: int = key(10, "raise after N steps in a row in which no prompt had a signal", minimum=1, limit=10**6)
    sampler_drift: float = key(2.0, "raise above this |log π_trainer - log π_sampler| of any token", above=0)
    entropy: float = key(0.01, "raise below this entropy of the rollouts, in nats", minimum=0)
    same_answer: float = key(0.9, "raise above this share of rollouts with the same answer", minimum=0, maximum=1)
    verifier_errors: float = key(
        0.1, "raise above this share of rollouts without a verdict (error, timeout)", minimum=0, maximum=1
    )
    demonstrations_dropped: float = key(
        0.5,
        "raise above this share of prompts all of whose demonstrations exceeded the length limit",
        minimum=0,
        maximum=1,
    )
    demonstrations_cut: float = key(
        0.05, "raise above this share of demonstrations that do not end with a stop token", minimum=0, maximum=1
    )
    gradient_split: float = key(
        0.05, "raise above this relative difference of the gradients of two splits into micro-batches", minimum=0
    )
    extreme_ratios: float = key(
        0.05,
        "raise above this share of tokens whose probability changed by more than a factor of 2",
        minimum=0,
        maximum=1,
    )
    effective_samples: float = key(
        0.5, "raise below this effective sample size of the responses, relative to their number", minimum=0, maximum=1
    )


@dataclass(frozen=True)
class _Above:
    """Finds a problem where a metric exceeds the field `limit` of `AlarmConfig`.

    Attributes:
        text: the problem, a format of the metric's value.
    """

    metric: str
    limit: str
    text: str

    def __call__(self, metrics: Metrics, limits: AlarmConfig) -> str | None:
        value = metrics.get(self.metric)
        return None if value is None or value <= getattr(limits, self.limit) else self.text.format(value)


_THRESHOLDS = (
    _Above(
        "response_cut_share",
        "truncated",
        "{:.0%} of the responses were cut off; raise rollout.max_response_tokens, or check the stop tokens",
    ),
    _Above(
        "same_answer_share",
        "same_answer",
        "{:.0%} of the rollouts give the same answer to different prompts; look at rollouts/ and the verifier",
    ),
    _Above(
        "verify/failed_share",
        "verifier_errors",
        "{:.0%} of the rollouts got no verdict and therefore the smallest reward; see `status` in rollouts/, and "
        "verify.time_limit",
    ),
    _Above(
        "demonstrations_dropped_share",
        "demonstrations_dropped",
        "{:.0%} of the prompts lost their demonstrations to rollout.max_response_tokens; raise it, or set "
        "data_policy.overlong_demonstrations=truncate",
    ),
    _Above(
        "demonstrations_cut_share",
        "demonstrations_cut",
        "{:.0%} of the demonstrations end without a stop token, so the policy does not learn to stop; raise "
        "rollout.max_response_tokens, or check what cut them off",
    ),
    _Above(
        "gradient/split_error",
        "gradient_split",
        "smaller micro-batches change the gradient by {:.0%} of its norm, but an update must not depend on "
        "optimizer.micro_batch_tokens; run `upge doctor`, and report this as a bug",
    ),
)


def _no_signal(metrics: Metrics, limits: AlarmConfig) -> str | None:
    if metrics.get("gate/no_signal_prompts") != 1:
        return None
    return (
        "no prompt had a signal for the gradient, so nothing is learned; choose problems of another difficulty, a "
        "larger group_size or an algorithm with demonstrations"
    )


def _sampler_drift(metrics: Metrics, limits: AlarmConfig) -> str | None:
    largest = metrics.get("sampler/logprob_diff_max")
    if largest is None or largest <= limits.sampler_drift:
        return None
    what = f"log-probs of sampler and trainer differ by up to {largest:.3g}"
    if "noise/top_p" in metrics:
        return f"{what}, with rollout.noise; weaken it, or correct for it with correction=tis"
    return f"{what}; check precision and engine (`upge doctor`), or correct for it with correction=tis"


def _entropy(metrics: Metrics, limits: AlarmConfig) -> str | None:
    entropy = metrics.get("entropy")
    if entropy is None or entropy >= limits.entropy:
        return None
    return f"the entropy is {entropy:.2g} nats: sampling hardly explores; lower optimizer.lr, or add correction=entropy"


def _extreme_ratios(metrics: Metrics, limits: AlarmConfig) -> str | None:
    shares = {name: share for name, share in metrics.items() if name.endswith("/extreme_ratio_share") and share}
    if not shares or (share := max(shares.values())) <= limits.extreme_ratios:
        return None
    name = max(shares, key=lambda one: shares[one] or 0.0).rpartition("/")[0]
    which = "trainer and sampler" if name == "sampler" else "the policy and the behavior policy"
    which += "" if name in _PAIRS else f" (term {name})"
    what = f"{share:.0%} of the tokens have a probability ratio of {which} outside [1/2, 2]"
    if name == "sampler":
        return f"{what}; check precision and engine (`upge doctor`), or correct for it with correction=tis"
    return f"{what}; lower optimizer.lr, optimizer.epochs or optimizer.mini_batches"


#: The pair of policies → why they differ, and the corrections to add.
_PAIRS = {
    "sampler": ("the sampler's policy differs from the trainer's", "correction=tis, or correction=mis to drop"),
    "behavior": ("updates have moved the policy", "correction=sequence_mask to drop"),
}


def _effective_samples(metrics: Metrics, limits: AlarmConfig) -> str | None:
    shares = {pair: share for pair in _PAIRS if (share := metrics.get(f"{pair}/ess_responses")) is not None}
    if not shares or min(shares.values()) >= limits.effective_samples:
        return None
    pair = min(shares, key=lambda one: shares[one])
    why, correction = _PAIRS[pair]
    smaller = "" if pair == "sampler" else "lower optimizer.lr, optimizer.epochs or optimizer.mini_batches, or "
    return (
        f"the effective sample size is only {shares[pair]:.0%} of the number of rollouts, because {why}; "
        f"{smaller}add {correction} responses that are too far off-policy"
    )


#: Name → the function that finds the problem. The names are those of `AlarmConfig` and of `stop.alarms`.
ALARMS: dict[str, Callable[[Metrics, AlarmConfig], str | None]] = {
    **{one.limit: one for one in _THRESHOLDS},
    "no_signal": _no_signal,
    "sampler_drift": _sampler_drift,
    "entropy": _entropy,
    "extreme_ratios": _extreme_ratios,
    "effective_samples": _effective_samples,
}


#: How many steps in a row must show the problem, if not `alarms.steps`. The split is measured only every N steps.
_IN_A_ROW: dict[str, Callable[[AlarmConfig], int]] = {
    "no_signal": lambda limits: limits.no_signal,
    "gradient_split": lambda limits: 1,
}


def raised(recent: Sequence[Metrics], limits: AlarmConfig, steps: int) -> dict[str, str]:
    """Name → problem of the alarms that the last of these steps raises.

    Args:
        recent: the metrics of consecutive steps, the newest last.
        limits: when to raise each alarm.
        steps: the length of the run; if it is less than `limits.steps`, every step must show the problem.
    """
    problems: dict[str, str] = {}
    for name, find in ALARMS.items():
        needed = min(_IN_A_ROW.get(name, lambda limits: limits.steps)(limits), max(steps, 1))
        last = [find(metrics, limits) for metrics in recent[-needed:]]
        if len(last) == needed and last[-1] is not None and None not in last:
            problems[name] = f"{last[-1]} (alarm {name}, {needed} step{'s' * (needed > 1)} in a row)"
    return problems


class AlarmMonitor:
    """The alarms of a run: remembers recent steps, and which alarms were raised.

    Args:
        limits: when to raise each alarm.
        steps: the length of the run.
        recent: the metrics of the steps before a resumed run continues.
        known: names of the alarms that were already raised.
    """

    def __init__(
        self, limits: AlarmConfig, steps: int, recent: Sequence[Metrics] = (), known: Sequence[str] = ()
    ) -> None:
        self._limits, self._steps, self._known = limits, steps, set(known)
        self._longest = max(limits.steps, limits.no_signal)
        self._recent = list(recent)[-self._longest :]

    def step(self, metrics: Metrics) -> dict[str, str]:
        """Name → problem of the alarms that this step raises for the first time in the run."""
        self._recent = [*self._recent, metrics][-self._longest :]
        new = {n: text for n, text in raised(self._recent, self._limits, self._steps).items() if n not in self._known}
        self._known |= set(new)
        return new
