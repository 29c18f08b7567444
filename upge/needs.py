"""What an algorithm needs from the data and the trainer, derived from what its parts declare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from upge.components.base import Component, mixes_demonstrations, walk
from upge.errors import ConfigError
from upge.support import CANDIDATE_COLUMNS, Support
from upge.trajectories import Source
from upge.views import MEMORY_COLUMNS

#: Columns that a caller may lack. `behavior_logprobs` is not among them: without it the data are strictly on-policy.
_OPTIONAL = frozenset(
    {"sampler_logprobs", "reference_logprobs", "teacher_logprobs", "values", "entropies", "preference", "finished"}
    | {"score_norms"}
    | MEMORY_COLUMNS
)
#: Columns that are computed by a forward pass of a model.
COMPUTED = frozenset({"behavior_logprobs", "reference_logprobs", "teacher_logprobs", "values", "score_norms"})


@dataclass(frozen=True)
class Needs:
    """What an algorithm needs from the data and the trainer.

    Attributes:
        columns: every column that some part reads.
        rewards: the names of the rewards that some part reads.
        rollouts, demonstrations, preference_pairs: True if it learns from, or compares with, such trajectories.
        prefixes: True if rollouts continue the beginning of a demonstration. The batch then has no whole
            demonstrations.
        group_size: minimum number of rollouts per prompt.
        group_size_because: path of the part that requires `group_size`.
        precomputed: the columns of `COMPUTED` that must be filled before the policy's forward pass, because a part that
            is evaluated on the whole batch reads them.
        distributions: the models among 'reference' and 'teacher' whose distributions over the vocabulary some term or
            regularizer compares with.
    """

    columns: frozenset[str]
    rollouts: bool
    demonstrations: bool
    preference_pairs: bool
    group_size: int
    group_size_because: str
    precomputed: frozenset[str] = frozenset()
    distributions: frozenset[str] = frozenset()
    prefixes: bool = False
    rewards: frozenset[str] = frozenset()

    @property
    def data_demonstrations(self) -> bool:
        """True if it uses the demonstrations of the data, whole or their beginnings."""
        return self.demonstrations or self.prefixes

    @property
    def critic(self) -> bool:
        """True if some part reads the critic's values."""
        return "values" in self.columns

    @property
    def reference(self) -> bool:
        """True if some part reads log-probs of the reference policy."""
        return "reference_logprobs" in self.columns or "reference" in self.distributions

    @property
    def teacher(self) -> bool:
        """True if some part reads log-probs of the teacher."""
        return "teacher_logprobs" in self.columns or "teacher" in self.distributions

    def joined(self, other: Needs) -> Needs:
        """The needs of both together. For equal group sizes, `group_size_because` is this one's."""
        larger = self if self.group_size >= other.group_size else other
        return Needs(
            columns=self.columns | other.columns,
            rollouts=self.rollouts or other.rollouts,
            demonstrations=self.demonstrations or other.demonstrations,
            preference_pairs=self.preference_pairs or other.preference_pairs,
            group_size=larger.group_size,
            group_size_because=larger.group_size_because,
            precomputed=self.precomputed | other.precomputed,
            distributions=self.distributions | other.distributions,
            prefixes=self.prefixes or other.prefixes,
            rewards=self.rewards | other.rewards,
        )


def needs_of(
    parts: Mapping[str, Component], sources: Mapping[str, Source], supports: Mapping[str, Support] | None = None
) -> Needs:
    """The needs of an algorithm.

    Args:
        parts: by path.
        sources: of its terms and regularizers, by path.
        supports: those other than the sampled token, by the path of the estimator or regularizer.
    """
    columns, distributions = frozenset[str](), frozenset[str]()
    for path, part in parts.items():
        support = next((s for place, s in (supports or {}).items() if f"{path}.".startswith(f"{place}.")), None)
        columns |= part.columns if support is None else part.columns - CANDIDATE_COLUMNS
        distributions |= frozenset() if support is None else support.models(part)
    wanted = set(sources.values())
    largest = max(parts, key=lambda path: parts[path].group_size_needed)
    return Needs(
        columns=columns | ({"preference"} if "preference_pairs" in wanted else set()),
        rollouts=bool(wanted & {"rollouts", "all"}) or any(p.group_size_needed > 1 for p in parts.values()),
        demonstrations=bool(wanted & {"demonstrations", "all"}),
        preference_pairs="preference_pairs" in wanted,
        group_size=parts[largest].group_size_needed,
        group_size_because=largest,
        precomputed=frozenset().union(*(part.columns for p in parts.values() for part in _precomputed_parts(p)))
        & columns
        & COMPUTED,
        distributions=distributions,
        rewards=frozenset().union(*(part.rewards_read for part in parts.values())),
    )


def _precomputed_parts(part: Component) -> Iterator[Component]:
    """The outermost parts in `part` that are evaluated before the forward pass."""
    if part.is_precomputed():
        yield part
    else:
        for inner in part.parts.values():
            yield from _precomputed_parts(inner)


def check_columns(
    parts: Mapping[str, Component], sources: Mapping[str, Source], provided: frozenset[str], path: str = "algo"
) -> None:
    """Check that the caller provides every column that the parts and sources, by path, read.

    Raises:
        ConfigError: a column is missing; the message names the part by its path, the columns and the fix.
    """
    for place, part in parts.items():
        missing = (part.columns & _OPTIONAL) - provided
        if missing:
            fix = f"it needs a critic: give the algorithm one, for example {path}.critic={{_target_: upge.ValueLoss, "
            fix += "returns: {_target_: upge.GAE}}"
            if missing & MEMORY_COLUMNS:
                fix = f"it needs a memory of prompts, for example {path}.memory={{_target_: upge.DecayedMean}}"
            raise ConfigError(
                f"{type(part).__name__} reads {sorted(missing)}, which is not provided here; "
                + (fix if missing & ({"values"} | MEMORY_COLUMNS) else "it needs a data set or engine that fills it"),
                f"{path}.{place}",
            )
        owner = next((s for s in sources if place == s or place.startswith(f"{s}.")), None)
        if owner and sources[owner] != "rollouts" and "sampler_logprobs" in part.columns:
            raise ConfigError(
                f"{type(part).__name__} compares trainer and sampler, but {owner}.source is {sources[owner]} and no "
                "sampler generated those responses; use it where the source is rollouts",
                f"{path}.{place}",
            )
    for place, source in sources.items():
        if source == "preference_pairs" and "preference" not in provided:
            raise ConfigError(
                "preference_pairs, but the column `preference` is not provided here; give data with chosen and "
                "rejected responses, or another source",
                f"{path}.{place}.source",
            )


def check_rewards(parts: Mapping[str, Component], known: Iterable[str], path: str = "algo") -> None:
    """Check that every reward that a part names is among the `known` ones.

    Raises:
        ConfigError: one is not; the message names the part by its path, the reward and the fix.
    """
    known = tuple(known)
    for place, outer in parts.items():
        for inner, part in walk(outer, place):
            for name in sorted(part.reward_names - set(known)):
                raise ConfigError(
                    f"{type(part).__name__} reads the reward '{name}', but the rewards here are "
                    f"{', '.join(known) or 'without names'}; name one of them, or give one this name: by `as` in "
                    f"verify.verifier, such as 'math + 0.2*boxed as {name}', or as a key of the batch's named_rewards",
                    f"{path}.{inner}",
                )


def check_groups(parts: Mapping[str, Component], path: str = "algo") -> None:
    """Check that no part takes demonstrations for rollouts, in an algorithm whose batches hold both.

    Raises:
        ConfigError: a part reads groups without `is_demonstration`; the message names it by its path, and the fix.
    """
    for place, outer in parts.items():
        for inner, part in walk(outer, place):
            if mixes_demonstrations(part):
                raise ConfigError(
                    f"{type(part).__name__} reads `group` without `is_demonstration`, so demonstrations count in its "
                    "statistics of groups; read `is_demonstration` and leave them out (`batch.pass_rate` does), or set "
                    "`counts_demonstrations = True` in the class if they should count",
                    f"{path}.{inner}",
                )
