"""The names of the metrics that a run may record for an algorithm. Stateful gates name their signals by them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from upge.algorithm import Algorithm
from upge.errors import ConfigError, nearest
from upge.estimate import PERCENTILES
from upge.stateful import GRADIENT_NOISE, UTILITY_SLOPE, stateful_gates

#: docs/metrics.md says what each means. A metric may be absent in a step. `time/total` is recorded after all others.
ALWAYS = (
    *("step", "stage", "loss", "grad_norm", "updates", "updates_above_limit", "skipped_updates", "learning_rate"),
    *("trained/trajectories", "trained/tokens", "trained/computed_tokens", "trained/skipped_share", "trained/entropy"),
    *("gate/demonstration_share", "gate/no_signal_prompts", "gradient/split_error"),
    *("time/rollout", "time/verify", "time/train", "time/sync"),
)
QUARTERS = ("q1", "q2", "q3", "q4")
#: Comparisons of the trainer's policy with the sampler's, and of the current policy with the behavior policy.
OF_RATIOS = (
    *("chi2_tokens", "chi2_responses", "ess_tokens", "ess_responses", "kl_k1", "kl_k3", "extreme_ratio_share"),
    *(f"{name}_{part}" for name in ("chi2", "kl_k3", "extreme_ratio_share") for part in QUARTERS),
)
OF_ROLLOUTS = (
    *("reward/mean", "pass_rate", "prompts_solved", "entropy", "response_length", "response_cut_share"),
    *("verify/timeouts", "verify/errors", "verify/failed_share", "same_answer_share"),
    *("sampler/logprob_diff_mean", "sampler/logprob_diff_max"),
    *("noise/weight_bits", "noise/bfloat16_logits", "noise/top_p"),
    *(f"{pair}/{name}" for pair in ("sampler", "behavior") for name in OF_RATIOS),
)
OF_DEMONSTRATIONS = ("demonstrations_dropped_share", "demonstrations_cut_share")
OF_GUIDANCE = ("guidance/share", "guidance/prefix_tokens", "guidance/pass_rate")
OF_SAMPLING = ("sampling/rounds", "sampling/prompts")
OF_CURRICULUM = ("sampling/effective_prompts",)
OF_MEMORY = tuple(
    f"memory/{name}" for name in ("prompts", "new_share", "value_mean", "value_error", "age_mean", "drift_mean")
)
OF_REPLAY = ("replay/size", "replay/prompts", "replay/share", "replay/age")
OF_CRITIC = tuple(f"critic/{n}" for n in ("loss", "grad_norm", "value_mean", "return_mean", "explained_variance"))
OF_INTERLEAVED = tuple(
    f"interleaved_update/{name}" for name in ("updates", "updates_above_limit", "remembered", "grad_norm")
)
OF_TERM = (
    *("tokens", "trajectories", "weight_abs_mean", "weight_abs_p50", "weight_abs_p99"),
    *(f"weight_p{percent}" for percent in PERCENTILES),
    *("masked_share", "masked_above", "masked_below", "extreme_ratio_share"),
    *("masked_mass", *(f"masked_mass_{part}" for part in QUARTERS)),
    *("effective_tokens", "effective_share", "effective_trajectories", "advantage_mean", "coefficient", "grad_norm"),
)
OF_REGULARIZER = ("value", "grad_norm")


def metric_names(algorithm: Algorithm) -> Iterator[str]:
    """The names of all metrics that a step of the algorithm may have."""
    yield from ALWAYS
    yield from OF_ROLLOUTS if algorithm.step_needs.rollouts else ()
    yield from OF_DEMONSTRATIONS if algorithm.step_needs.data_demonstrations else ()
    yield from OF_GUIDANCE if algorithm.guidance is not None else ()
    yield from OF_SAMPLING if algorithm.dynamic_sampling is not None else ()
    yield from OF_CURRICULUM if algorithm.curriculum is not None else ()
    yield from OF_MEMORY if algorithm.memory is not None else ()
    yield from OF_REPLAY if algorithm.replay is not None else ()
    yield from OF_CRITIC if algorithm.critic is not None else ()
    yield from OF_INTERLEAVED if algorithm.interleaved_update is not None else ()
    yield from (f"{term}/{name}" for term in algorithm.terms for name in OF_TERM)
    yield from (f"{regularizer}/{name}" for regularizer in algorithm.regularizers for name in OF_REGULARIZER)
    yield from (f"cosine/{a}_{b}" for a, b in combinations((*algorithm.terms, *algorithm.regularizers), 2))
    for variable in algorithm.stateful:
        yield f"state/{variable}"
        yield from (f"state/{variable}_{signal}" for signal in (UTILITY_SLOPE, *GRADIENT_NOISE))


def check_signals(algorithm: Algorithm, path: str = "algo.") -> None:
    """Check that every signal that a stateful gate needs exists.

    Args:
        path: the path of the algorithm's settings, with a trailing dot, for messages.

    Raises:
        ConfigError: no step of the algorithm can have a metric of this name.
    """
    known = {UTILITY_SLOPE, *GRADIENT_NOISE, *metric_names(algorithm)}
    for place, part in algorithm.parts.items():
        for gate in stateful_gates({place: part}).values():
            for name in sorted(gate.wants - known):
                raise ConfigError(
                    f"{type(gate).__name__} needs '{name}', but '{algorithm.name}' has no such metric (docs/metrics.md "
                    f"lists them); {nearest(name, known)}",
                    f"{path}{place}",
                )
