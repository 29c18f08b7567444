"""What the parts of an algorithm see of a batch: its columns, padded or packed, and no more than they declare.

Legend of shapes: see `upge.trajectories`.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

#: Columns with one number per response token, [B, T].
TOKEN_COLUMNS = (
    "logprobs",
    "response_mask",
    "behavior_logprobs",
    "sampler_logprobs",
    "reference_logprobs",
    "values",
    "entropies",
)
#: Columns with one number per trajectory, [B].
TRAJECTORY_COLUMNS = ("rewards", "group", "is_demonstration", "preference", "row")
COLUMNS = frozenset(TOKEN_COLUMNS + TRAJECTORY_COLUMNS)
#: Columns that exist only after the forward pass of the current policy. Whatever reads none of them is known before it.
LIVE_COLUMNS = frozenset({"logprobs", "entropies"})
#: None says something by itself: without the behaviour policy's log-probs the data are strictly on-policy.
MAY_BE_ABSENT = frozenset({"behavior_logprobs"})


class UndeclaredColumn(TypeError):
    """A part reads a column that it does not list in `reads`, so its value could depend on the micro-batch split."""


class TokenView:
    """What parts of reach `token` may use: per-token columns of any leading shape, and what follows from them."""

    logprobs: Tensor | None
    response_mask: Tensor
    behavior_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    values: Tensor | None
    entropies: Tensor | None
    step: int
    state: Mapping[str, float]

    @property
    def log_importance_ratio(self) -> Float[Tensor, "*shape"]:
        """log π_θ/π_behavior per token, detached; zero when the data are strictly on-policy (no behaviour column)."""
        current = self.logprobs.detach()
        behavior = self.behavior_logprobs
        return torch.zeros_like(current) if behavior is None else current - behavior

    @property
    def log_behavior(self) -> Float[Tensor, "*shape"]:
        """log π_behavior per token, detached: the behaviour column, or the current policy's when strictly on-policy."""
        behavior = self.behavior_logprobs
        return self.logprobs.detach() if behavior is None else behavior

    @property
    def log_sampler_ratio(self) -> Float[Tensor, "*shape"]:
        """log π_behavior/π_sampler per token, detached: how far the inference engine was from the trainer."""
        return self.log_behavior - self.sampler_logprobs

    def look_up(self, values: Tensor) -> Tensor:
        """The entries of `values`, one per trajectory ([B]) or token ([B, T]) of the batch that this one was selected
        from, that belong to this one's trajectories or tokens."""
        raise NotImplementedError

    def per_token(self, values: Tensor) -> Tensor:
        """One number for each entry of `look_up` of a [B] tensor, in a shape that multiplies per-token columns."""
        raise NotImplementedError

    @property
    def places(self) -> tuple[Int[Tensor, "*shape"], Int[Tensor, "*shape"]]:
        """The trajectory of each entry, as a row of the batch that this one was selected from, and its place in the
        response."""
        raise NotImplementedError

    def restricted(self, columns: frozenset[str], owner: str) -> Any:
        """This batch as `owner` may see it: reading a column outside `columns` raises `UndeclaredColumn`."""
        return Restricted(self, columns, owner)


@dataclass(frozen=True, eq=False)
class PackedTokens(TokenView):
    """The per-token columns of some trajectories without padding, one entry for each token that counts: [N].

    As in `Trajectories`, entries outside `response_mask` are set to zero.

    Attributes:
        row, column: [N] the trajectory and the place in its response of each token, in the batch that a plan was made
            for; None where nothing is looked up there.
    """

    logprobs: Float[Tensor, "N"] | None
    response_mask: Bool[Tensor, "N"]
    behavior_logprobs: Float[Tensor, "N"] | None = None
    sampler_logprobs: Float[Tensor, "N"] | None = None
    reference_logprobs: Float[Tensor, "N"] | None = None
    values: Float[Tensor, "N"] | None = None
    entropies: Float[Tensor, "N"] | None = None
    step: int = 0
    state: Mapping[str, float] = dataclasses.field(default_factory=dict)
    row: Int[Tensor, "N"] | None = None
    column: Int[Tensor, "N"] | None = None

    def __post_init__(self) -> None:
        if not bool(self.response_mask.all()):
            hide(self, self.response_mask)

    def __len__(self) -> int:
        return len(self.response_mask)

    def look_up(self, values: Tensor) -> Tensor:
        """[N] the entries of [B] or [B, T] values that belong to these tokens."""
        return values[self.row] if values.ndim == 1 else values[self.row, self.column]

    def per_token(self, values: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """`values` as they are: there is one for each token already."""
        return values

    @property
    def places(self) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
        """Row and place in the response of each token."""
        return self.row, self.column

    def chunk(self, tokens: slice, logprobs: Tensor, entropies: Tensor | None) -> PackedTokens:
        """Some neighbouring tokens, with what the forward pass of the current policy gave for them."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        cut = {n: c[tokens] if isinstance(c, Tensor) else c for n, c in columns.items()}
        return PackedTokens(**{**cut, "logprobs": logprobs, "entropies": entropies})


def hide(batch: TokenView, mask: Tensor) -> None:
    """Sets the entries of all token columns outside `mask` to zero, in a batch that is being made."""
    for name in TOKEN_COLUMNS:
        column = getattr(batch, name)
        if column is not None and name != "response_mask":
            object.__setattr__(batch, name, torch.where(mask, column, torch.zeros_like(column)))


class Restricted:
    """A batch of which only declared columns can be read; derived properties are checked by what they read."""

    def __init__(self, batch: TokenView, columns: frozenset[str], owner: str) -> None:
        self._batch, self._columns, self._owner = batch, columns | {"response_mask"}, owner

    def __len__(self) -> int:
        return len(self._batch)

    def with_rewards(self, rewards: Tensor) -> Restricted:
        """The same view of the same trajectories with other rewards."""
        return Restricted(self._batch.with_rewards(rewards), self._columns, self._owner)

    @property
    def __class__(self) -> type:
        """That of the batch itself, for `isinstance`: a part is written for a batch and need not know of this one."""
        return type(self._batch)

    def __getattr__(self, name: str) -> Any:
        if name in COLUMNS and name not in self._columns:
            raise UndeclaredColumn(
                f"{self._owner} reads the column '{name}' without declaring it; add \"{name}\" to its `reads`"
            )
        attribute = inspect.getattr_static(type(self._batch), name, None)
        if isinstance(attribute, property):
            return attribute.fget(self)
        if isinstance(attribute, types.FunctionType):
            return types.MethodType(attribute, self)
        value = getattr(self._batch, name)
        # Who reads the current policy knows what to do without the behaviour column; who does not needs it.
        may_be_absent = MAY_BE_ABSENT if "logprobs" in self._columns else frozenset()
        if value is None and name in COLUMNS - may_be_absent:
            raise ValueError(f"{name}: {self._owner} reads it, but this batch does not have it; pass `{name}=...`")
        return value
