"""The base class of all parts of an algorithm, and the four slots of the unified gradient.

A part is a frozen dataclass whose fields are its settings or other parts that it wraps. It declares `reads`, the
columns of the batch that it reads, and `reach`, how far it looks beyond its own token. These two determine what can be
computed before the forward pass, which columns the trainer must provide, and which trajectories must stay together in a
micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from upge.checks import check_fields
from upge.errors import nearest
from upge.formula import Formula
from upge.views import COLUMNS, LIVE_COLUMNS, TokenView, TrajectoryView, View

#: How much of the batch a part's value at one token may depend on, through the live columns, in increasing order.
REACHES = ("token", "trajectory", "group", "batch")


def floor_of(share: float, number: int) -> int:
    """⌊share·number⌋, without the rounding error of the product: 29 for 0.29 and 100, where floats give 28.99…"""
    return math.floor(share * number * (1 + 1e-12))


class Component(ABC):
    """A part of an algorithm: a pure function of the batch.

    Attributes:
        reads: class attribute; names of the columns of `Trajectories` that the part reads. `response_mask` need not be
            listed.
        reach: class attribute; what the value at a token needs: 'token' = only that token's columns (the part must then
            work for any leading shape); 'trajectory' = the whole response; 'group' = the whole group; 'batch' = all
            tokens of an update (see `spans_update`). It matters only for live parts: all others are evaluated once, on
            the whole batch.
        reward_names: class attribute; the names of the `named_rewards` that the part reads, where these are known.
        min_group_size: class attribute; the minimum number of rollouts per prompt.
        sees_advantages: class attribute; True if the part is also called with Â per token: it is then evaluated after
            the forward pass, because Â may be live. True for masks; a likelihood gradient or a denominator may set it.
        evaluated_separately: class attribute; fields whose parts are not evaluated when this part is called.
        needs_vocabulary: class attribute; True if the part's value at a candidate depends on the others, so that it
            has a meaning only where the support of its term is the whole vocabulary (`upge.FullVocabulary`).
    """

    reads: ClassVar[frozenset[str]]
    reach: ClassVar[str] = "token"
    reward_names: ClassVar[frozenset[str]] = frozenset()
    min_group_size: ClassVar[int] = 1
    sees_advantages: ClassVar[bool] = False
    evaluated_separately: ClassVar[frozenset[str]] = frozenset()
    needs_vocabulary: ClassVar[bool] = False

    def __init__(self) -> None:
        """Check a part that is not a dataclass, because it has no settings. A dataclass has its own constructor."""
        self.__post_init__()

    def __post_init__(self) -> None:
        check_fields(self)
        reads = getattr(self, "reads", None)
        if reads is None:
            raise TypeError(
                f"{type(self).__name__} does not say which columns it reads; add `reads = frozenset({{...}})` to the "
                f"class (known columns: {', '.join(sorted(COLUMNS))})"
            )
        unknown = set(reads) - COLUMNS
        if unknown:
            hint = nearest(min(unknown), COLUMNS)
            raise TypeError(f"{type(self).__name__}.reads names unknown columns {sorted(unknown)}; {hint}")
        if self.reach not in REACHES:
            raise TypeError(f"{type(self).__name__}.reach is {self.reach!r}; it must be one of {REACHES}")

    @cached_property
    def parts(self) -> dict[str, Component]:
        """The parts that this one wraps, by field. The members of a tuple are named `field.0`, `field.1`, ..."""
        parts: dict[str, Component] = {}
        for name, value in _fields(self).items():
            named = {f"{name}.{i}": member for i, member in enumerate(_members(value))} or {name: value}
            parts |= {path: part for path, part in named.items() if isinstance(part, Component)}
        return parts

    @cached_property
    def columns(self) -> frozenset[str]:
        """All columns that this part and the parts it wraps read."""
        return frozenset(self.reads).union(*(part.columns for part in self.parts.values()))

    @property
    def rewards_read(self) -> frozenset[str]:
        """The names of all rewards that this part and the parts it wraps read, where these are known."""
        return self.reward_names.union(*(part.rewards_read for part in self.parts.values()))

    @property
    def counts_demonstrations(self) -> bool:
        """True if the part's values for rollouts are meant to depend on the demonstrations of their group.

        A part that wants this sets the class attribute `counts_demonstrations = True`.
        """
        return False

    @property
    def is_live(self) -> bool:
        """True if the part is live: its value depends on the current policy, and so on the forward pass."""
        return bool(self.columns & LIVE_COLUMNS)

    def is_precomputed(self, live: frozenset[str] = LIVE_COLUMNS) -> bool:
        """True if the part's values are computed before the forward pass, on the whole batch.

        Args:
            live: the columns that exist only in or after the forward pass; a support has more (`upge.Support.live`).
        """
        return not (self.columns & live or self.sees_advantages)

    @property
    def live_reach(self) -> str:
        """The largest reach of this part and the parts it wraps; 'token' for what is precomputed."""
        return self.reach_with(LIVE_COLUMNS)

    def reach_with(self, live: frozenset[str]) -> str:
        """`live_reach` where the columns `live` exist only in or after the forward pass."""
        if self.is_precomputed(live):
            return "token"
        return max((self.reach, *(p.reach_with(live) for p in self.parts.values())), key=REACHES.index)

    @property
    def spans_update(self) -> bool:
        """True if the part is evaluated once per update, because it or a part that it wraps has reach 'batch'.

        It then sees the current log-probs of all tokens of its term in the update, on all ranks and in all
        micro-batches. A forward pass before the update provides them: see `Plan.with_current`.
        """
        return self.live_reach == "batch"

    @property
    def group_size_needed(self) -> int:
        """The largest `min_group_size` of this part and the parts it wraps."""
        return max((self.min_group_size, *(part.group_size_needed for part in self.parts.values())))

    def view(self, batch: TokenView) -> View:
        """`batch` restricted to the columns that this part declares."""
        return batch.restricted(self.columns, type(self).__name__)

    def precompute_parts(self, batch: TrajectoryView, live: frozenset[str] = LIVE_COLUMNS) -> Component:
        """This part with every wrapped part that reads none of the columns `live` replaced by its values.

        The result can be evaluated on any micro-batch of `batch`.
        """

        def ready(value: Any) -> Any:
            if isinstance(value, tuple):
                return _changed(value, ready)
            return value.precomputed(batch, live) if isinstance(value, Component) else value

        return _changed(self, ready, besides=self.evaluated_separately)

    def precomputed(self, batch: TrajectoryView, live: frozenset[str] = LIVE_COLUMNS) -> Component:
        """The part's values on the whole `batch`, if it reads none of `live`; otherwise `precompute_parts`."""
        return Precomputed(self(self.view(batch))) if self.is_precomputed(live) else self.precompute_parts(batch, live)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The part's value on a view of a batch. Each slot defines the arguments."""

    def formula(self) -> Formula:
        """The formula of the part. The default is the class name with its settings."""
        return self.named_formula()

    def named_formula(self, without: Collection[str] = ()) -> Formula:
        """The class name with the settings that are not in `without`."""
        settings = ", ".join(f"{key}={value}" for key, value in _fields(self).items() if key not in without)
        name = type(self).__name__
        return Formula(f"{name}({settings})", rf"\mathrm{{{name}}}")


@dataclass(frozen=True, eq=False)
class Precomputed(Component):
    """The values of a part on the whole batch, looked up for any micro-batch of it, padded or packed."""

    values: Tensor
    reads: ClassVar[frozenset[str]] = frozenset({"row"})

    def __post_init__(self) -> None:
        """Skip the checks: only `Component.precomputed` makes instances."""

    def __call__(self, batch: TokenView, *args: Any) -> Tensor:
        return batch.look_up(self.values)


class StabilizationMask(Component):
    """1_stable: which tokens may be updated."""

    sees_advantages: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, batch: View, advantages: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """A number in [0, 1] per token, from a view with the declared columns and Â per token."""


class ReferenceDenominator(Component):
    """1/π_ref: the policy by whose probability a token's gradient is divided."""

    @abstractmethod
    def __call__(self, batch: View) -> Float[Tensor, "*shape"]:
        """log π_ref per token, detached."""


class AdvantageEstimator(Component):
    """Â: how good a token was.

    Attributes:
        graded: class attribute; False if the estimator only checks whether a reward is a success. A small change of a
            reward then has no effect, or turns a success into a failure.
    """

    graded: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, batch: View) -> Float[Tensor, "*shape"]:
        """Â per token, detached."""


class LikelihoodGradient(Component):
    """How ∇π_θ enters: plain, or as ∇f(π_θ) = f′(π_θ)∇π_θ.

    A shape that depends on Â sets `sees_advantages = True` and is called as (batch, advantages).
    """

    @abstractmethod
    def __call__(self, batch: View, *args: Any, **kwargs: Any) -> Float[Tensor, "*shape"]:
        """log f′ per token, detached; 0 for the plain gradient."""


class TokenReward(Component):
    """r: the reward of each token, for advantages that add up rewards over time."""

    @abstractmethod
    def __call__(self, batch: View) -> Float[Tensor, "B T"]:
        """[B, T] the reward of each token, detached, 0 outside the response mask."""


for _slot in (StabilizationMask, ReferenceDenominator, AdvantageEstimator, LikelihoodGradient, TokenReward):
    _slot.register(Precomputed)


def like(batch: TokenView, value: float) -> Float[Tensor, "*shape"]:
    """`value` expanded to the shape of the batch's tokens, in float64, without allocating memory for each token.

    Everything that is known before the forward pass is in float64: these tensors are small, and sums then depend on
    the order of the trajectories only by float64 rounding.
    """
    mask = batch.response_mask
    return torch.full((), value, dtype=torch.float64, device=mask.device).expand(mask.shape)


def live_reads(part: Component, live: frozenset[str] = LIVE_COLUMNS) -> frozenset[str]:
    """The columns that `part` and the parts it wraps read in or after the forward pass, which fills those in `live`."""
    if part.is_precomputed(live):
        return frozenset()
    inner = [inner for name, inner in part.parts.items() if name not in part.evaluated_separately]
    own = part.columns.difference(*(one.columns for one in part.parts.values())) | part.reads
    return frozenset(own).union(*(live_reads(one, live) for one in inner))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value`, a part or an object made of parts, with `change` applied to every precomputed tensor in it.

    A tensor that is a setting of a part is not changed.
    """
    if isinstance(value, Precomputed):
        return Precomputed(change(value.values))
    return _changed(value, lambda item: mapped(item, change))


def walk(part: Component, path: str) -> Iterator[tuple[str, Component]]:
    """Yield (path, part) for a part and all parts that it wraps."""
    yield path, part
    for name, inner in part.parts.items():
        yield from walk(inner, f"{path}.{name}")


def mixes_demonstrations(part: Component) -> bool:
    """True if a part, without those it wraps, reads groups but not what tells rollouts from demonstrations in them."""
    tells = {"is_demonstration", "preference"} & part.reads
    return "group" in part.reads and not tells and not part.counts_demonstrations


def rewritten(value: Any, change: Callable[[Component], Component]) -> Any:
    """`value`, a part or a setting that may contain parts, with `change` applied to every part in it.

    If `change` returns a part unchanged, it is applied to the parts inside it.
    """
    if isinstance(value, Component):
        changed = change(value)
        if changed is not value:
            return changed
    elif not isinstance(value, tuple):
        return value
    return _changed(value, lambda item: rewritten(item, change))


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass instance by name; none for any other value."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    return {field.name: getattr(value, field.name) for field in fields}


def _members(value: Any) -> tuple[Any, ...]:
    """The members of a tuple; none for any other value."""
    return cast("tuple[Any, ...]", value) if isinstance(value, tuple) else ()


def _changed(value: Any, change: Callable[[Any], Any], besides: frozenset[str] = frozenset()) -> Any:
    """A tuple or a dataclass with `change` applied to its members or fields; `value` itself if none changes."""
    if isinstance(value, tuple):
        members = _members(value)
        changed = tuple(change(member) for member in members)
        return changed if any(a is not b for a, b in zip(changed, members, strict=True)) else members
    old = {name: field for name, field in _fields(value).items() if name not in besides}
    new = {name: change(field) for name, field in old.items()}
    return dataclasses.replace(value, **new) if any(new[name] is not old[name] for name in old) else value
