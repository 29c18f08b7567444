"""Views of a batch for the parts of an algorithm: its columns, padded or packed, restricted to what a part declares.

Legend of shapes: see `upge.trajectories`.
"""

# Columns that may be None in a batch are never None in a part's view of it, which raises instead.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

#: Columns with one number per response token, [B, T].
TOKEN_COLUMNS = (
    "logprobs",
    "response_mask",
    "is_demonstration_token",
    "behavior_logprobs",
    "sampler_logprobs",
    "reference_logprobs",
    "teacher_logprobs",
    "values",
    "entropies",
    "score_norms",
)
#: Columns with one number per trajectory, [B].
TRAJECTORY_COLUMNS = (
    "rewards",
    "group",
    "is_demonstration",
    "is_guided",
    "is_replayed",
    *("finished", "preference", "index", "row"),
    *("prompt_value", "prompt_attempts", "prompt_successes", "prompt_last_pass_rate", "prompt_age"),
)
#: Those of them that come from the memory of prompts: see `upge.prompt_memory`.
MEMORY_COLUMNS = frozenset(name for name in TRAJECTORY_COLUMNS if name.startswith("prompt_"))
#: The column of rewards by name, a mapping whose values have one number per trajectory.
NAMED_REWARDS = "named_rewards"
COLUMNS = frozenset((*TOKEN_COLUMNS, *TRAJECTORY_COLUMNS, NAMED_REWARDS, "is_sampled"))
#: Columns that exist only after the forward pass of the current policy. A part that reads one of them, itself or in a
#: part that it wraps, is *live*. Every other part is known before the forward pass.
LIVE_COLUMNS = frozenset({"logprobs", "entropies", "is_sampled"})
#: Columns that may be None in a view: without the behavior policy's log-probs the data are strictly on-policy.
MAY_BE_ABSENT = frozenset({"behavior_logprobs"})
#: A rollout counts as a success above this reward, unless a run sets another one.
PASS_THRESHOLD = 0.5
#: The argument of a part: a `TokenView`, or a `TrajectoryView` where the part's reach or columns require it. Which of
#: the two follows from the part's declarations, which a type cannot express.
View = Any
_View = TypeVar("_View", bound="TokenView")
#: The members of a group that its statistics count: its rollouts, or also its demonstrations.
Members = Literal["rollouts", "group"]


class UndeclaredColumn(TypeError):
    """A part reads a column that it does not list in `reads`, so its value could depend on the micro-batch split."""


class TokenView:
    """What parts of reach `token` may use: per-token columns of any leading shape, and values derived from them.

    A part may read the columns that it declares in `reads`. Reading one that the batch lacks raises an error, except
    for `behavior_logprobs`: it may be None, which means that the data are strictly on-policy.
    """

    logprobs: Float[Tensor, "*shape"]
    response_mask: Bool[Tensor, "*shape"]
    is_demonstration_token: Bool[Tensor, "*shape"]
    behavior_logprobs: Float[Tensor, "*shape"] | None
    sampler_logprobs: Float[Tensor, "*shape"]
    reference_logprobs: Float[Tensor, "*shape"]
    teacher_logprobs: Float[Tensor, "*shape"]
    values: Float[Tensor, "*shape"]
    entropies: Float[Tensor, "*shape"]
    score_norms: Float[Tensor, "*shape"]
    step: int
    state: Mapping[str, float]

    @property
    def is_sampled(self) -> Bool[Tensor, "*shape"]:
        """True for the sampled token, False for the other candidates of a support (see `upge.support`)."""
        return torch.ones_like(self.response_mask)

    @property
    def log_importance_ratio(self) -> Float[Tensor, "*shape"]:
        """log π_θ/π_behavior per token, detached; zero when the data are strictly on-policy (no behavior column)."""
        current = self.logprobs.detach()
        behavior = self.behavior_logprobs
        return torch.zeros_like(current) if behavior is None else current - behavior

    @property
    def log_behavior(self) -> Float[Tensor, "*shape"]:
        """log π_behavior per token, detached: the behavior column, or the current policy's when strictly on-policy."""
        behavior = self.behavior_logprobs
        return self.logprobs.detach() if behavior is None else behavior

    @property
    def log_sampler_ratio(self) -> Float[Tensor, "*shape"]:
        """log π_behavior/π_sampler per token, detached: the mismatch between trainer and inference engine."""
        return self.log_behavior - self.sampler_logprobs

    @abstractmethod
    def __len__(self) -> int:
        """The number of trajectories, or of packed tokens."""

    @abstractmethod
    def look_up(self, values: Tensor) -> Tensor:
        """The entries at this view's places of `values`, [B] or [B, T] of the batch that it was selected from."""

    def seeing(self: _View, tokens: Bool[Tensor, "B T"] | None) -> _View:
        """This batch with its response mask restricted to `tokens` of the planned batch; itself for None."""
        if tokens is None:
            return self
        return replace(self, response_mask=self.response_mask & self.look_up(tokens))  # pyright: ignore

    @abstractmethod
    def per_token(self, values: Tensor) -> Tensor:
        """The result of `look_up` on a [B] tensor, in a shape that broadcasts against per-token columns."""

    @property
    @abstractmethod
    def places(self) -> tuple[Int[Tensor, "*shape"], Int[Tensor, "*shape"]]:
        """The position of each token: its row in the batch that this view was selected from, and its index in the
        response."""

    def restricted(self: _View, columns: frozenset[str], owner: str) -> _View:
        """A view of this batch for the part `owner`, which declares `columns`.

        Reading a column outside `columns` raises `UndeclaredColumn`. Reading one that the batch lacks raises a
        `ValueError`.
        """
        if isinstance(self, _Declared):
            columns = columns & object.__getattribute__(self, "_columns")
            cls = type(self)
        else:
            cls = _restricted_class(type(self))
        view = object.__new__(cls)
        view.__dict__.update(self.__dict__, _columns=columns | {"response_mask"}, _owner=owner)
        return cast(_View, view)


class TrajectoryView(TokenView):
    """What parts of wider reach may also use: columns with one number per trajectory, and statistics of groups."""

    rewards: Float[Tensor, "B"]
    group: Int[Tensor, "B"]
    is_demonstration: Bool[Tensor, "B"]
    is_guided: Bool[Tensor, "B"]
    is_replayed: Bool[Tensor, "B"]
    finished: Bool[Tensor, "B"]
    preference: Int[Tensor, "B"]
    index: Int[Tensor, "B"]
    row: Int[Tensor, "B"]
    prompt_value: Float[Tensor, "B"]
    prompt_attempts: Int[Tensor, "B"]
    prompt_successes: Int[Tensor, "B"]
    prompt_last_pass_rate: Float[Tensor, "B"]
    prompt_age: Int[Tensor, "B"]
    total_lengths: Int[Tensor, "B"] | None
    named_rewards: Mapping[str, Float[Tensor, "B"]]
    reward_weights: Mapping[str, float]
    succeeded: Bool[Tensor, "B"] | None
    pass_threshold: float

    def look_up(self, values: Tensor) -> Tensor:
        """The rows of [B] or [B, T] `values` that belong to this view's trajectories."""
        rows = values[self.row]
        return rows if values.ndim == 1 else rows[:, : self.response_mask.shape[1]]

    def per_token(self, values: Float[Tensor, "B"]) -> Float[Tensor, "B 1"]:
        """[B, 1] `values` as a column."""
        return values[:, None]

    @property
    def places(self) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """[B, T] each token's row and its index in the response, including padding."""
        shape = self.response_mask.shape
        return self.row[:, None].expand(shape), torch.arange(shape[1], device=self.row.device).expand(shape)

    @property
    def lengths(self) -> Int[Tensor, "B"]:
        """[B] the number of tokens that count in each response."""
        return self.response_mask.sum(dim=1)

    @property
    def limited_lengths(self) -> Int[Tensor, "B"]:
        """[B] the number of tokens that count towards a response limit, including those that a part does not see."""
        return self.lengths if self.total_lengths is None else self.total_lengths

    def seeing(self: _View, tokens: Bool[Tensor, "B T"] | None) -> _View:
        """As in `TokenView`; `limited_lengths` does not change."""
        if tokens is None:
            return self
        mask = self.response_mask & self.look_up(tokens)
        return replace(self, response_mask=mask, total_lengths=self.limited_lengths)  # pyright: ignore

    @property
    def group_index(self) -> Int[Tensor, "B"]:
        """[B] `group` renumbered from 0 to Q - 1."""
        return torch.unique(self.group, return_inverse=True)[1]

    @property
    def success(self) -> Bool[Tensor, "B"]:
        """[B] True for successes: where `rewards` exceed `pass_threshold`, or as the batch's `succeeded` says."""
        passed = self.rewards > self.pass_threshold
        return passed if self.succeeded is None else self.succeeded

    @property
    def pass_rate(self) -> Float[Tensor, "B"]:
        """[B] the share of successes (`success`) among the rollouts of each trajectory's group.

        Demonstrations do not count. NaN for a group without rollouts.
        """
        successes = self.group_sum(self.success)
        return successes / self.group_sum(torch.ones_like(successes))

    def group_sum(
        self, values: Shaped[Tensor, "B *rest"], over: Members | Bool[Tensor, "B"] = "rollouts"
    ) -> Float[Tensor, "B *rest"]:
        """[B] the sum of `values` over the group of each trajectory, in float64.

        Args:
            values: [B], or [B, T] for the sum at each place in the response.
            over: the trajectories that count: the group's 'rollouts', the whole 'group', or those where a tensor is
                True. With 'group', a part must declare `counts_demonstrations = True`.
        """
        index = self.group_index
        counted = self._counted(over).view(-1, *[1] * (values.ndim - 1))
        return group_sum(values.double() * counted, index)[index]

    def group_mean(
        self, values: Shaped[Tensor, "B"], over: Members | Bool[Tensor, "B"] = "rollouts"
    ) -> Float[Tensor, "B"]:
        """[B] the mean of `values` over the group of each trajectory, in float64; 0 for a group without members.

        The mean of equal values is exactly their value, so that a difference from it is exactly 0.

        Args:
            over: as in `group_sum`.
        """
        index, counted, values = self.group_index, self._counted(over), values.double()
        number = group_sum(counted.double(), index)
        lowest, highest = (
            torch.zeros_like(number).scatter_reduce(0, index[counted], values[counted], kind, include_self=False)
            for kind in ("amin", "amax")
        )
        return (group_sum(values * counted, index) / number.clamp(min=1)).clamp(lowest, highest)[index]

    def _counted(self, over: Members | Bool[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """[B] True for the trajectories that count in statistics of groups."""
        if isinstance(over, Tensor):
            return over
        if over not in get_args(Members):
            raise ValueError(f"over: found {over!r}; use 'rollouts' or 'group'")
        return ~self.is_demonstration if over == "rollouts" else torch.ones_like(self.group, dtype=torch.bool)

    @abstractmethod
    def with_rewards(self, rewards: Float[Tensor, "B"]) -> TrajectoryView:
        """The same trajectories with other rewards, which then also determine success. For parts that wrap another."""


class Distributions(NamedTuple):
    """The next-token distributions at each token.

    Attributes:
        tokens: [*shape] the sampled tokens.
        policy: [*shape, V] log π_θ.
        reference: [*shape, V] log π_0 of the reference policy, or None.
        teacher: [*shape, V] log ν of the teacher, or None.
    """

    tokens: Int[Tensor, "*shape"]
    policy: Float[Tensor, "*shape V"]
    reference: Float[Tensor, "*shape V"] | None = None
    teacher: Float[Tensor, "*shape V"] | None = None

    def at(self, *index: Tensor | slice) -> Distributions:
        """The distributions at some tokens."""
        return Distributions(*(None if one is None else one[index] for one in self))  # pyright: ignore[reportArgumentType]

    def tempered(self, temperature: float) -> Distributions:
        """Every distribution to the power of 1/temperature, normalized."""
        if temperature == 1.0:
            return self
        models = (None if one is None else (one / temperature).log_softmax(-1) for one in self[1:])
        return Distributions(self.tokens, *models)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False)
class PackedTokens(TokenView):
    """The per-token columns of some trajectories without padding: [N], one entry per token that counts.

    The columns are those of `Trajectories`. As there, entries outside `response_mask` are set to zero.

    Attributes:
        row: [N] the row of each token's trajectory in the planned batch; None if nothing is looked up there.
        column: [N] the index of each token in its response; None if nothing is looked up there.
    """

    logprobs: Float[Tensor, "N"] | None
    response_mask: Bool[Tensor, "N"]
    behavior_logprobs: Float[Tensor, "N"] | None = None
    sampler_logprobs: Float[Tensor, "N"] | None = None
    reference_logprobs: Float[Tensor, "N"] | None = None
    teacher_logprobs: Float[Tensor, "N"] | None = None
    values: Float[Tensor, "N"] | None = None
    entropies: Float[Tensor, "N"] | None = None
    is_demonstration_token: Bool[Tensor, "N"] | None = None
    score_norms: Float[Tensor, "N"] | None = None
    step: int = 0
    state: Mapping[str, float] = dataclasses.field(default_factory=dict)
    row: Int[Tensor, "N"] | None = None
    column: Int[Tensor, "N"] | None = None

    def __post_init__(self) -> None:
        # Done even if all tokens count: a check would synchronize with the device in every chunk of the output head.
        hide(self, self.response_mask)

    def __len__(self) -> int:
        return len(self.response_mask)

    def look_up(self, values: Tensor) -> Tensor:
        """[N] the entries of [B] or [B, T] `values` that belong to these tokens."""
        return values[self.row] if values.ndim == 1 else values[self.row, self.column]

    def per_token(self, values: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """`values` unchanged, because `look_up` already gives one number per token."""
        return values

    @property
    def places(self) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
        """[N] each token's row and its index in the response."""
        assert self.row is not None and self.column is not None, "these tokens were not selected from a batch"
        return self.row, self.column

    def chunk(self, tokens: slice, logprobs: Tensor, entropies: Tensor | None) -> PackedTokens:
        """A contiguous range of these tokens, with the results of the current policy's forward pass on them."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        cut = {n: c[tokens] if isinstance(c, Tensor) else c for n, c in columns.items()}
        return PackedTokens(**{**cut, "logprobs": logprobs, "entropies": entropies})


def hide(batch: TokenView, mask: Tensor) -> None:
    """Set the entries of all token columns outside `mask` to zero, in a batch that is being constructed."""
    for name in TOKEN_COLUMNS:
        column = getattr(batch, name)
        if column is not None and name != "response_mask":
            object.__setattr__(batch, name, torch.where(mask, column, torch.zeros_like(column)))


class _Declared:
    """Mixin that makes only the declared columns of a batch readable.

    Derived properties are checked through the columns that they read.
    """

    _columns: frozenset[str]
    _owner: str

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in COLUMNS:
            return value
        columns, owner = super().__getattribute__("_columns"), super().__getattribute__("_owner")
        if name not in columns:
            raise UndeclaredColumn(
                f"{owner} reads the column '{name}' without declaring it; add \"{name}\" to its `reads`"
            )
        # Only a part that reads `logprobs` can replace a missing behavior column by them.
        may_be_absent = MAY_BE_ABSENT if "logprobs" in columns else frozenset()
        if value is None and name not in may_be_absent:
            raise ValueError(f"{name}: {owner} reads it, but this batch does not have it; pass `{name}=...`")
        return value


@functools.cache
def _restricted_class(cls: type) -> type:
    return type(f"Restricted{cls.__name__}", (_Declared, cls), {})


def group_sum(values: Tensor, index: Int[Tensor, "B"]) -> Tensor:
    """[Q, ...] the sum of [B, ...] `values` over each group; `index` numbers the groups from 0 to Q - 1."""
    size = int(index.max()) + 1 if len(index) else 0
    return torch.zeros(size, *values.shape[1:], dtype=values.dtype, device=values.device).index_add(0, index, values)


def masked_mean(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """[B, 1] the mean of `values` over the tokens of `mask` in each row; 0 for a row without tokens."""
    return (values * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
